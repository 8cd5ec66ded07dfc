"""Settings: what a process is told from outside its code.

Code wins over the environment, the environment over the file.

    SAGA_DATABASE=postgresql://...        the environment, or
    SAGA_SETTINGS_FILE=/etc/saga.env      a file of such lines
    App("postgresql://...")               code

A name that begins with SAGA_ and is no setting stops the start, with the nearest one that is (I-08). The page
docs/settings.md is made from this module.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Collection, Sequence
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple

from dotenv import dotenv_values
from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from saga.errors import ConfigurationError

PREFIX: Final = "SAGA_"
FILE: Final = "SAGA_SETTINGS_FILE"
FAILPOINTS: Final = ("SAGA_FAIL", "SAGA_FAIL_LOG")
"""Crash points of a test run; read by `saga.cli` alone."""
PROGRAM: Final = ("SAGA_APP", "SAGA_ACTOR", "SAGA_HEALTH")
"""Options of the program `saga` that stand for one process, as `--app`, `--actor` and `--health` do."""
OURS: Final = re.compile(r"SAGA_(TEST|DEMO|DEVSERVICES)_\w+")
"""Set by the library's own tests, demo and tools for the processes that they start."""
_CREDENTIALS: Final = re.compile(r"(?<=//)(?P<user>[^/@:]*):.*(?=@)")
_PARAMETERS: Final = re.compile(r"(?<=[?&])(?P<name>[^=&#]+)=[^&#]*")


def _seconds(value: object) -> object:
    """A duration in a text is a number of seconds."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?", value) else value


Seconds = Annotated[timedelta, BeforeValidator(_seconds)]
AGE_MAX: Final = timedelta(days=36_500)
"""So that no age goes back before the first year that there is."""


class Settings(BaseSettings):
    """The values, and where each comes from. Made by `load`."""

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix=PREFIX, extra="ignore", frozen=True, hide_input_in_errors=True, env_ignore_empty=True
    )

    database: SecretStr | None = Field(
        None,
        description=(
            "Database: `postgresql://user:password@host/name`, `mysql://...` or `sqlite:///file`; none without."
        ),
    )
    broker: SecretStr = Field(
        SecretStr("memory://"),
        description=(
            "Broker: `amqp://user:password@host/vhost`, `kafka://host:port,host:port`, `database://` for queues in "
            "the database, or `memory://` in one process."
        ),
    )
    namespace: str = Field(
        "default", description="Prefix of queues and part of every row's key: what is not of it is not seen."
    )
    # `schema` alone is a method of the base class
    schema_: str | None = Field(
        None,
        validation_alias="SAGA_SCHEMA",
        description="Schema of our tables, PostgreSQL only; else the role's own.",
    )
    concurrency: int = Field(
        64, ge=1, le=10_000, description="Commands that the participants of a process work on at once."
    )
    pool_size: int = Field(
        10, ge=1, le=1_000, description="Connections for handlers, and so their transactions at once."
    )
    redrive: Seconds = Field(
        timedelta(seconds=30),
        gt=timedelta(0),
        description="A command without an answer is sent again after this time, doubling to ten times it; in seconds.",
    )
    grace: Seconds = Field(
        timedelta(seconds=30),
        ge=timedelta(0),
        description="Time to finish what is under way when the app is stopped; in seconds.",
    )
    production: bool = Field(
        False,
        description=(
            "Refuse at start what is good for a developer's machine only: links to other hosts in plain text or to "
            "whoever answers, a broker that was not said, topics that would lose messages. Else they are warned of."
        ),
    )
    retention: Seconds = Field(
        timedelta(days=30),
        gt=timedelta(0),
        le=AGE_MAX,
        description=(
            "How long completed and compensated runs are kept after they closed, where the saga does not say itself; "
            "in seconds."
        ),
    )
    barrier_retention: Seconds = Field(
        timedelta(days=90),
        gt=timedelta(0),
        le=AGE_MAX,
        description=(
            "Participants refuse commands of runs that began longer ago, and purge their rows a day later; in seconds."
        ),
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Level of the program `saga`; an app in your own process leaves logging to you."
    )

    _origins: dict[str, str] = {}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Leave out an environment that says nothing and a file that there is not: asking each takes long."""
        found: Collection[str] = getattr(env_settings, "env_vars", ())
        says = any(variable.lower() in found for _, variable, _ in _fields())
        is_there = getattr(dotenv_settings, "env_file", None) is not None
        return (
            init_settings,
            *((env_settings,) if says else ()),
            *((dotenv_settings,) if is_there else ()),
        )

    def origin(self, name: str) -> str:
        """Return where a setting comes from: `code`, `environment`, the file's path, or `default`."""
        return self._origins.get(name, "default")


class Row(NamedTuple):
    """A setting as people look at it; secrets are masked."""

    name: str
    variable: str
    value: str | int | float | None
    origin: str
    default: str | int | float | None


def load(**code: Any) -> Settings:
    """Return the settings of this process; `code` gives those that the program says, None says nothing.

    Raises ConfigurationError for an unknown name, a value that does not fit, or a file that is not there.
    """
    path = os.environ.get(FILE)
    if path and not Path(path).is_file():
        raise ConfigurationError(f"{FILE} names {path}, and there is no such file.")
    from_file = {name.upper() for name in dotenv_values(path)} if path else set[str]()
    from_environment = {
        name.upper() for name in os.environ if name.upper().startswith(PREFIX) and os.environ[name]
    }
    _refuse_unknown(from_environment, "the environment")
    _refuse_unknown(from_file, path or "")
    said = {name: value for name, value in code.items() if value is not None}
    origins = {
        name: "code" if name in said else "environment" if variable in from_environment else path or ""
        for name, variable, _ in _fields()
        if name in said or variable in from_environment or variable in from_file
    }
    given = {str(_field(name).validation_alias or name): value for name, value in said.items()}
    try:
        settings = Settings(_env_file=path, **given)
    except ValidationError as error:
        raise ConfigurationError(_complaint(error, origins)) from None
    settings._origins.update(origins)
    return settings


def rows(settings: Settings) -> list[Row]:
    """Return every setting, in the order of the reference page."""
    return [
        Row(name, variable, shown(_value(settings, name)), settings.origin(name), shown(field.default))
        for name, variable, field in _fields()
    ]


def shown(value: object) -> str | int | float | None:
    """Return a value as people may see it: durations in seconds, addresses without password and parameters."""
    if isinstance(value, SecretStr):
        return masked(value.get_secret_value())
    if isinstance(value, timedelta):
        return value.total_seconds()
    return value if isinstance(value, int | float) or value is None else str(value)


def masked(url: str) -> str:
    """Return an address with stars for its password and for the value of each parameter."""
    if "//" not in url:
        return "***"
    return _PARAMETERS.sub(r"\g<name>=***", _CREDENTIALS.sub(r"\g<user>:***", url))


def reference() -> str:
    """Return the reference page."""
    lines = [
        "# Settings",
        "",
        "Each is said in code (`App(database=...)`), in the environment (`SAGA_DATABASE=...`) or in a file of such",
        f"lines that `{FILE}` names. Code wins over the environment, the environment over the file. A name that",
        f"begins with `{PREFIX}` and is no setting stops the start, and so does a value that does not fit.",
        "`saga config` lists each value with its origin; passwords are masked.",
        "",
        "| Setting | Variable | Default | What it does |",
        "|---|---|---|---|",
    ]
    for name, variable, field in _fields():
        default = shown(field.default)
        lines.append(
            f"| `{name}` | `{variable}` | {'none' if default is None else f'`{default}`'} | {field.description} |"
        )
    names = " and ".join(f"`{name}`" for name in FAILPOINTS)
    options = ", ".join(f"`{name}`" for name in PROGRAM)
    return "\n".join(
        [
            *lines,
            "",
            f"{options} stand for the options of the same names of the program `saga`.",
            f"{names} arm crash points in tests; never set them otherwise.",
            "",
        ]
    )


@functools.cache
def _fields() -> Sequence[tuple[str, str, FieldInfo]]:
    """Return name, variable and field of each setting."""
    return [
        (name.rstrip("_"), PREFIX + name.rstrip("_").upper(), field)
        for name, field in Settings.model_fields.items()
    ]


def _field(name: str) -> FieldInfo:
    return next(field for known, _, field in _fields() if known == name)


def _value(settings: Settings, name: str) -> object:
    return settings.schema_ if name == "schema" else getattr(settings, name)


def _refuse_unknown(names: Collection[str], where: str) -> None:
    known = [variable for _, variable, _ in _fields()] + [FILE, *PROGRAM]
    for name in sorted(names):
        if name.startswith(PREFIX) and name not in (*known, *FAILPOINTS) and not OURS.fullmatch(name):
            near = get_close_matches(name, known, n=1, cutoff=0.6)
            advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
            raise ConfigurationError(f"{name} in {where} is no setting; {advice}")


def _complaint(error: ValidationError, origins: dict[str, str]) -> str:
    """Return which setting does not fit and why, never what it said."""
    (first, *_) = error.errors(include_input=False, include_context=False, include_url=False)
    name = str(first["loc"][0]).removeprefix(PREFIX).lower()
    return f"{PREFIX}{name.upper()} ({origins.get(name, 'default')}) does not fit: {first['msg']}."

"""`saga coordinator | participant MODULE:APP`: loads an app, runs one of its roles, and ends it as signals ask.

The first SIGTERM or SIGINT lets the app hand everything back within its grace; the second ends the process at once.
This is the only place that configures logging.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, NoReturn, Protocol, cast

import typer

from saga import failpoints, settings
from saga.cli import collector, health
from saga.cli.errors import FINDING, told
from saga.statelog import ABOUT
from saga.views import plain

log: Final[logging.Logger] = logging.getLogger("saga.cli")

LEVELS: Final = ("debug", "info", "warning", "error")
HAND_BACK: Final = timedelta(seconds=10)
"""What an app gets on top of its grace to close connections, before the process ends without it."""


class Runnable(Protocol):
    """What the program needs of an app. Both return when `stop` is set and everything is handed back."""

    async def run_coordinator(self, stop: asyncio.Event, grace: timedelta) -> None:
        """Run the coordinator until `stop`."""
        ...

    async def run_participant(self, stop: asyncio.Event, grace: timedelta) -> None:
        """Run the participants until `stop`."""
        ...


Role = Callable[[asyncio.Event, timedelta], Awaitable[None]]

AppArgument = Annotated[
    str,
    typer.Argument(metavar="MODULE:APP", help="where the app is, e.g. shop.sagas:app", show_default=False),
]
GraceOption = Annotated[
    float | None,
    typer.Option("--grace", min=0.0, metavar="SECONDS", help="time to finish work after the first signal"),
]
LevelOption = Annotated[str | None, typer.Option("--log-level", help=f"one of {', '.join(LEVELS)}")]


HealthOption = Annotated[
    str | None,
    typer.Option(
        "--health",
        envvar="SAGA_HEALTH",
        metavar="FILE|PORT",
        help="tell probes: a file that is there while ready, or GET /live and /ready",
        show_default=False,
    ),
]


JsonLinesOption = Annotated[
    bool, typer.Option("--json", help="write each log line, and the error that ends it, as JSON")
]


class JsonLines(logging.Formatter):
    """One JSON object a line: time in UTC, level, logger, text, and what the record says of a saga (`statelog`)."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "text": record.getMessage(),
        }
        line |= {name: plain(value) for name in ABOUT if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


def coordinator(
    app: AppArgument,
    grace: GraceOption = None,
    log_level: LevelOption = None,
    probes: HealthOption = None,
    as_json: JsonLinesOption = False,
) -> None:
    """Run the app's coordinator: it receives replies, decides, sends commands and serves timers."""
    _run(app, "run_coordinator", grace, log_level, probes, as_json)


def participant(
    app: AppArgument,
    grace: GraceOption = None,
    log_level: LevelOption = None,
    probes: HealthOption = None,
    as_json: JsonLinesOption = False,
) -> None:
    """Run the app's participants: they take commands, run activities and reply."""
    _run(app, "run_participant", grace, log_level, probes, as_json)


def load(place: str) -> Any:
    """Return the object at MODULE:ATTRIBUTE, with the working directory importable as under `python -m`.

    Raises typer.BadParameter if there is none; what the module itself raises comes through.
    """
    module_name, colon, attribute = place.partition(":")
    if not module_name or not colon or not attribute:
        raise typer.BadParameter(f"{place!r} is not of the form MODULE:APP")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        # lint: allow unsafe-import because the operator names it on the command line
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that is missing further down is the app's own problem and keeps its traceback.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise typer.BadParameter(f"there is no module {error.name!r} in {here} or on the path") from None
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise typer.BadParameter(f"module {module_name!r} has no {attribute!r}")
        found = getattr(found, name)
    return found


def _run(
    place: str,
    role: str,
    grace_seconds: float | None,
    log_level: str | None,
    probed: str | None,
    as_json: bool,
) -> None:
    with told():
        known = settings.load()
    log_level = log_level or known.log_level
    if log_level.lower() not in LEVELS:
        raise typer.BadParameter(f"{log_level!r} is none of {', '.join(LEVELS)}", param_hint="--log-level")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    )
    logging.basicConfig(level=log_level.upper(), handlers=[handler])
    # Crash points of a test run (reliability.md 3); without these two variables nothing is armed.
    specification, passed = os.environ.get("SAGA_FAIL", ""), os.environ.get("SAGA_FAIL_LOG")
    if specification or passed:
        failpoints.arm(specification, passed)
    with told(configuration=FINDING):
        app = load(place)
        if not callable(getattr(app, role, None)):
            raise typer.BadParameter(f"{place!r} is not an app: it cannot {role.replace('_', ' a ')}")
        collector.spare()
        grace = (
            getattr(app, "settings", known).grace
            if grace_seconds is None
            else timedelta(seconds=grace_seconds)
        )
        asyncio.run(_serve(cast(Role, getattr(app, role)), grace, probed, getattr(app, "health", None)))


async def _serve(role: Role, grace: timedelta, probed: str | None, asked: health.Ask | None) -> None:
    """Run a role until it returns by itself or a signal asks it to; never longer than the grace after that."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def ask(number: signal.Signals) -> None:
        if stop.is_set():
            _leave(f"second signal {number.name}: ending at once", 128 + number)
        log.info("%s: stopping, %g s for what is under way", number.name, grace.total_seconds())
        stop.set()
        loop.call_later((grace + HAND_BACK).total_seconds(), _leave, "did not stop within the grace", FINDING)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask, number)
    if asked is None:
        await role(stop, grace)
        return
    async with health.told(probed, asked):
        await role(stop, grace)


def _leave(why: str, status: int) -> NoReturn:
    """End the process without waiting for anything: what was not committed is done again elsewhere."""
    print(f"saga: {why}", file=sys.stderr, flush=True)
    os._exit(status)

"""How the program ends: exit statuses, and what it tells of an error, as lines or with `--json` as one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from saga.errors import ConfigurationError, SagaError, VerbNotAllowed

FINDING: Final = 1
USAGE: Final = 2


class Failure(Exception):
    """An error of ours on its way to the end of the program."""

    def __init__(self, error: SagaError, status: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.status = status


class Program(TyperGroup):
    """The commands, whose errors are told in the form that was asked for."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command. With `--json` typer leaves its errors to us instead of drawing them."""
        arguments = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in arguments
        try:
            status = super().main(
                arguments,
                prog_name,
                complete_var,
                standalone_mode and not as_json,
                windows_expand_args,
                **extra,
            )
            sys.exit(status)
        except Failure as failure:
            if as_json:
                _tell(described(failure.error))
            else:
                typer.echo(f"saga: {render(failure.error)}", err=True)
            sys.exit(failure.status)
        except TyperException as error:
            _tell({"code": "usage", "class": type(error).__name__, "text": error.format_message()})
            sys.exit(error.exit_code)
        except typer.Abort:
            _tell({"code": "aborted", "class": "Abort", "text": "Not confirmed, so nothing was done."})
            sys.exit(FINDING)


def render(error: SagaError) -> str:
    """Return class, code and place of an error, and on the next line what to do about it."""
    return f"{error}\n  {error.text}"


def described(error: SagaError) -> dict[str, Any]:
    """Return an error as JSON has it, the same in every document; what an error does not name is null."""
    known: dict[str, Any] = {
        "code": error.code,
        "class": type(error).__name__,
        "text": error.text,
        "saga": error.saga,
        "id": error.saga_id,
        "step": error.step,
    }
    if isinstance(error, VerbNotAllowed):
        known["allowed"] = list(error.allowed)
    return known


@contextmanager
def told(*, configuration: int = USAGE) -> Iterator[None]:
    """End the program with an error of ours and a status: `configuration` for a wrong setting, else 1."""
    try:
        yield
    except SagaError as error:
        status = configuration if isinstance(error, ConfigurationError) else FINDING
        raise Failure(error, status) from None


def _tell(error: dict[str, Any]) -> None:
    typer.echo(json.dumps({"error": error}, indent=2, ensure_ascii=True), err=True)

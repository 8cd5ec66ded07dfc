"""How the program ends: exit statuses, and one or two lines for an error of ours instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import typer

from saga.errors import ConfigurationError, SagaError

FINDING: Final = 1
USAGE: Final = 2


def render(error: SagaError) -> str:
    """Return class, code and place of an error, and on the next line what to do about it."""
    return f"{error}\n  {error.text}"


@contextmanager
def told(*, configuration: int = USAGE) -> Iterator[None]:
    """Turn an error of ours into its lines and an exit status: `configuration` for a wrong setting, else 1."""
    try:
        yield
    except SagaError as error:
        typer.echo(f"saga: {render(error)}", err=True)
        raise typer.Exit(configuration if isinstance(error, ConfigurationError) else FINDING) from None

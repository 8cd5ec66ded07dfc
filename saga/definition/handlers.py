"""How a handler is read: what its annotations ask for, and what can be said of it before its first call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from saga.errors import DefinitionError
from saga.outcomes import ActivityContext
from saga.payloads import Codec, Signature, signature


@dataclass(frozen=True)
class Handler:
    """An implementation: the function, what it takes besides its payload, and how many inputs at once."""

    function: Callable[..., Any]
    payload_argument: str | None
    spread: tuple[str, ...] | None
    session_argument: str | None
    context_argument: str | None
    output_argument: str | None = None
    """Compensation only: takes the forward output."""
    output_optional: bool = False
    undo_argument: str | None = None
    """Compensation only: takes the undo data."""
    undo_optional: bool = False
    batch: int | None = None
    threaded: bool = False
    """A plain `def`, which runs in a thread."""

    @property
    def name(self) -> str:
        """Name of the function, for logs and errors."""
        return getattr(self.function, "__qualname__", repr(self.function))


@dataclass(frozen=True)
class Read:
    """A handler's annotations, sorted."""

    input: Codec[Any]
    output: Codec[Any]
    undo: Codec[Any]
    payload: dict[str, Any]
    payload_argument: str | None
    spread: tuple[str, ...] | None
    session: str | None
    context: str | None
    threaded: bool


def read_handler(
    function: Callable[..., Any],
    *,
    what: str,
    batch: int | None,
    undoing: bool = False,
    context: type = ActivityContext,
) -> Read:
    """Sort a handler's arguments; `context` is the class that asks for what is known of its message.

    Raises DefinitionError.
    """
    if batch is not None and not 1 <= batch <= 1000:
        raise DefinitionError(f"{what}: batch is 1 to 1,000.")
    threaded = _threaded(function, what)
    read: Signature = signature(
        function,
        injectable=partial(_injectable, context),
        what=what,
        batch=batch is not None,
        undoing=undoing,
    )
    sessions = [name for name, type_ in read.injected.items() if _is_session(type_)]
    contexts = [name for name in read.injected if name not in sessions]
    for names, thing in ((sessions, "session"), (contexts, "context")):
        if len(names) > 1:
            raise DefinitionError(f"{what}: two arguments ask for the {thing}: {', '.join(names)}.")
    for name in sessions:
        _check_session(what, name, read.injected[name], threaded)
    return Read(
        read.input,
        read.output,
        read.undo,
        read.payload,
        read.payload_argument,
        read.spread,
        sessions[0] if sessions else None,
        contexts[0] if contexts else None,
        threaded,
    )


def _threaded(function: Callable[..., Any], what: str) -> bool:
    """Whether a handler is a plain `def`. Raises DefinitionError for what only looks like one."""
    if inspect.iscoroutinefunction(function):
        return False
    inner = inspect.unwrap(function)
    made_plain = inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner)
    if made_plain or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004 - not whether it is there, but of which kind
        raise DefinitionError(
            f"{what}: it awaits, but is no `async def` itself; a decorator around it must be an `async def` too."
        )
    if inspect.isgeneratorfunction(inner):
        raise DefinitionError(f"{what}: a handler returns its output; it cannot yield.")
    return True


def _check_session(what: str, name: str, type_: Any, threaded: bool) -> None:
    """A thread cannot await, and a Session would block the loop."""
    if threaded and type_.__name__ == "AsyncSession":
        raise DefinitionError(
            f"{what}: {name!r} is an AsyncSession, but a plain `def` runs in a thread, where nothing can be awaited: "
            "annotate it with sqlalchemy.orm.Session, or write `async def`."
        )
    if not threaded and type_.__name__ == "Session":
        raise DefinitionError(
            f"{what}: {name!r} is a Session, which would block the event loop that an `async def` runs on: "
            "annotate it with sqlalchemy.ext.asyncio.AsyncSession, or write a plain `def`, which runs in a thread."
        )


def _is_session(type_: Any) -> bool:
    # by name: a coordinator that only imports contracts must not need SQLAlchemy's asyncio layer
    module: str = getattr(type_, "__module__", "")
    return getattr(type_, "__name__", "") in ("AsyncSession", "Session") and module.startswith("sqlalchemy.")


def _injectable(context: type, type_: Any) -> bool:
    return type_ is context or _is_session(type_)

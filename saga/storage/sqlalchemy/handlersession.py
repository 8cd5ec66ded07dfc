"""P23: the session that a handler gets. Its transaction is ours: it cannot be committed, rolled back or closed there.

Savepoints are allowed (`begin_nested`). The refusal sits in the synchronous session, which a handler in a thread has as
such and all methods of an AsyncSession call, and in the connection that the session hands out. (An engine event for
COMMIT would refuse even more, but one such event makes SQLAlchemy dispatch for every statement, a tenth of a short
transaction.)
"""

from __future__ import annotations

from typing import Any, Final, NoReturn

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from saga.clock import Clock
from saga.errors import SessionIsManaged

CLOCK: Final = "saga_clock"
BEGAN: Final = "saga_began"


def _refuse(what: str) -> NoReturn:
    raise SessionIsManaged(
        f"{what} is not for a handler: the session's transaction also holds the barrier row, and is committed or "
        "rolled back by the library when the handler has ended. For a part that may fail use begin_nested()."
    )


class _ManagedSession(Session):
    """The synchronous half of a handler's session."""

    def commit(self) -> None:
        _refuse("commit()")

    def rollback(self) -> None:
        _refuse("rollback()")

    def close(self) -> None:
        _refuse("close()")

    def reset(self) -> None:
        _refuse("reset()")

    def invalidate(self) -> None:
        _refuse("invalidate()")

    def prepare(self) -> None:
        _refuse("prepare()")

    def begin(self, nested: bool = False) -> SessionTransaction:
        if not nested:
            _refuse("begin()")
        return super().begin(nested=True)


class _TimedSession(_ManagedSession):
    """The same, noting when its transaction began: on SQLite that is when it took the one writer."""


class ThreadSession(_TimedSession):
    """What a handler in a thread gets. Loaded objects stay usable after its end."""

    def __init__(self, engine: Engine, *, clock: Clock) -> None:
        super().__init__(engine, expire_on_commit=False, info={CLOCK: clock})

    def connection(self, *args: Any, **options: Any) -> Connection:
        plain = super().connection(*args, **options)
        guarded = _ThreadConnection.__new__(_ThreadConnection)
        guarded.__dict__ = plain.__dict__  # one connection, of which the handler sees a part
        return guarded


@event.listens_for(_TimedSession, "after_begin")
def _began(session: Session, _transaction: SessionTransaction, _connection: Connection) -> None:
    clock: Clock = session.info[CLOCK]
    session.info.setdefault(BEGAN, clock.monotonic())


def began(session: Session) -> float | None:
    """Return the monotonic time of the session's first statement, if it was noted."""
    at: float | None = session.info.get(BEGAN)
    return at


class _ThreadConnection(Connection):
    """The connection of a session in a thread, for Core statements; its transaction is ours."""

    def commit(self) -> None:
        _refuse("commit() on the session's connection")

    def rollback(self) -> None:
        _refuse("rollback() on the session's connection")

    def close(self) -> None:
        _refuse("close() on the session's connection")


class _HandlerConnection(AsyncConnection):
    """The session's connection, for Core statements; its transaction is ours too."""

    async def commit(self) -> None:
        _refuse("commit() on the session's connection")

    async def rollback(self) -> None:
        _refuse("rollback() on the session's connection")

    async def close(self) -> None:
        _refuse("close() on the session's connection")


class HandlerSession(AsyncSession):
    """An AsyncSession whose end belongs to the library. Loaded objects stay usable after it.

    The functions below take its synchronous half and run in the greenlet, or a ThreadSession in its thread.
    """

    sync_session_class: type[Session] = _ManagedSession

    def __init__(self, engine: AsyncEngine, *, clock: Clock | None = None) -> None:
        """With `clock`, `began` tells of the synchronous half when the first statement was made."""
        self._engine = engine
        if clock is None:
            super().__init__(engine, expire_on_commit=False)
        else:
            super().__init__(
                engine, expire_on_commit=False, sync_session_class=_TimedSession, info={CLOCK: clock}
            )

    async def connection(self, *args: Any, **options: Any) -> AsyncConnection:
        plain = await super().connection(*args, **options)
        return _HandlerConnection(self._engine, plain.sync_connection)


def flushed(session: Session) -> Connection:
    """Write what the handler left pending and return the connection, beginning if nothing began."""
    session.flush()
    return Session.connection(session)


def commit(session: Session) -> None:
    """COMMIT and give the connection back."""
    Session.commit(session)
    Session.close(session)


def discard(session: Session) -> None:
    """Roll back, if anything began, and give the connection back."""
    Session.close(session)


def cut(session: Session) -> None:
    """Drop the connection without asking the database."""
    Session.invalidate(session)

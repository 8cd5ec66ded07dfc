"""The client for code without an event loop: Flask, scripts, threads.

    sagas = SyncClient(app)

    with Session(engine) as session, session.begin():
        session.add(order)
        sagas.start(purchase, Purchase(...), id=order.id, session=session)

    receipt = sagas.result(sagas.find(purchase, order.id), timeout=timedelta(seconds=30))

Its methods are those of `Client` and `Outbox`, waited for: each is made of theirs by one function, so that names,
arguments and results agree. What joins a transaction of the caller's runs in the caller's thread, on his connection;
all else runs in the loop of the app, which is in a thread of its own unless the app runs already.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session

from saga.app import App
from saga.client import Client
from saga.errors import ConfigurationError
from saga.outbox.events import Outbox

P = ParamSpec("P")
T = TypeVar("T")

OPEN_SECONDS: Final = 30.0
"""Longer than a start may take as a whole."""
CLOSE_SECONDS: Final = 30.0


def _client(
    method: Callable[Concatenate[Client, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SyncClient, P], T]:
    """Return a method of the client, waited for."""

    @wraps(method)
    def waited(self: SyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._wait(method(self._app_open().client, *args, **kwargs), kwargs.get("session"))

    return waited


def _outbox(
    method: Callable[Concatenate[Outbox, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SyncClient, P], T]:
    """Return a method of the outbox, waited for."""

    @wraps(method)
    def waited(self: SyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._wait(method(self._app_open().outbox, *args, **kwargs), kwargs.get("session"))

    return waited


def _each(
    method: Callable[Concatenate[Client, P], AsyncIterator[T]],
) -> Callable[Concatenate[SyncClient, P], Iterator[T]]:
    """Return a method of the client that gives one result after the other."""

    @wraps(method)
    def iterated(self: SyncClient, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        results = method(self._app_open().client, *args, **kwargs)
        while (found := self._wait(_next(results), None)) is not None:
            yield found[0]

    return iterated


class SyncClient:
    """Starts sagas, waits for them, publishes events and does what operators do, without `await`.

    It opens at its first use, and again in a process that was forked after that. A program that ends closes it. Usable
    from any number of threads, but not inside a running event loop, which it would block.
    """

    def __init__(self, app: App, *, coordinator: bool = False, participants: bool = False) -> None:
        """Use `app` where it runs; else run it as a client, in a thread, with the roles that are asked for."""
        self._app = app
        self._roles = {"coordinator": coordinator, "participants": participants}
        self._lock = threading.Lock()
        self._thread: _Thread | None = None

    def open(self) -> Self:
        """Start the app, unless it runs. Raises what `App.start` raises."""
        self._app_open()
        return self

    def close(self) -> None:
        """Stop the app if this client has started it. Idempotent; the next call opens it again."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None and thread.pid == os.getpid():
                thread.stop(self._app)

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- what the client does, by the same names ------------------------------------------------

    start: Final = _client(Client.start)
    start_json: Final = _client(Client.start_json)
    execute: Final = _client(Client.execute)
    result: Final = _client(Client.result)
    find: Final = _client(Client.find)
    describe: Final = _client(Client.describe)
    describe_run: Final = _client(Client.describe_run)

    cancel: Final = _client(Client.cancel)
    retry: Final = _client(Client.retry)
    mark_done: Final = _client(Client.mark_done)
    skip: Final = _client(Client.skip)
    terminate: Final = _client(Client.terminate)
    abandon: Final = _client(Client.abandon)
    order: Final = _client(Client.order)
    preview: Final = _client(Client.preview)
    order_all: Final = _each(Client.order_all)

    list: Final = _client(Client.list)
    look_up: Final = _client(Client.look_up)
    count: Final = _client(Client.count)
    audit: Final = _client(Client.audit)
    payloads: Final = _client(Client.payloads)
    incidents: Final = _client(Client.incidents)
    outbox: Final = _client(Client.outbox)
    dead_letters: Final = _client(Client.dead_letters)
    dead_letter: Final = _client(Client.dead_letter)
    redrive: Final = _client(Client.redrive)
    redrive_all: Final = _each(Client.redrive_all)

    publish: Final = _outbox(Outbox.publish)
    revoke: Final = _outbox(Outbox.revoke)

    # --- how ------------------------------------------------------------------------------------

    def _app_open(self) -> App:
        with self._lock:
            thread = self._thread
            if thread is not None and thread.pid != os.getpid():
                # forked: the thread and its loop stayed with the parent, and so did the app that ran there
                self._app.forget()
                thread = None
            if thread is None and self._app.loop is None:
                self._thread = _Thread()
                try:
                    self._thread.start(self._app, self._roles)
                except BaseException:
                    self._thread = None
                    raise
        return self._app

    def _wait(self, call: Coroutine[Any, Any, T], session: Any) -> T:
        if _in_loop():
            call.close()
            raise ConfigurationError(
                "A SyncClient would block this event loop; use `await app.client...` here."
            )
        if session is None:
            loop = self._app.loop
            if loop is None:
                call.close()
                raise ConfigurationError("The app was stopped.")
            return _result(asyncio.run_coroutine_threadsafe(call, loop))
        if isinstance(session, AsyncSession | AsyncConnection | async_scoped_session):
            call.close()
            raise ConfigurationError("A SyncClient takes a Session or a Connection, not an asynchronous one.")
        return _drive(call)


class _Thread:
    """A thread with an event loop in which an app runs."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="saga-client", daemon=True)

    def start(self, app: App, roles: dict[str, bool]) -> None:
        self._thread.start()
        try:
            _result(asyncio.run_coroutine_threadsafe(app.start(**roles), self._loop), OPEN_SECONDS)
        except BaseException:
            self._end()
            raise
        # the loop must not be torn down with the interpreter while connections are open
        self._at_exit = lambda: self.stop(app)
        atexit.register(self._at_exit)

    def stop(self, app: App) -> None:
        atexit.unregister(self._at_exit)
        if self.pid != os.getpid():
            return
        try:
            _result(asyncio.run_coroutine_threadsafe(app.stop(), self._loop), CLOSE_SECONDS)
        finally:
            self._end()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_SECONDS)


def _in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _result(future: Future[T], seconds: float | None = None) -> T:
    """Wait in this thread; whoever gives up waiting (a KeyboardInterrupt) gives the call up too."""
    try:
        return future.result(seconds)
    except BaseException:
        future.cancel()
        raise


def _drive(call: Coroutine[Any, Any, T]) -> T:
    """Run a call that never waits: all that it does is on the caller's connection."""
    try:
        call.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    call.close()
    raise RuntimeError("a call in the caller's transaction has waited for the loop")


async def _next(results: AsyncIterator[T]) -> tuple[T] | None:
    try:
        return (await anext(results),)
    except StopAsyncIteration:
        return None

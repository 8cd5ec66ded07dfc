"""A TCP proxy for one link, told by the test what to do to the bytes: delay, jam, drop, reset, refuse, cut.

It runs in the test's own event loop and knows nothing of any protocol, except for `cut_at_commit`, which knows how
PostgreSQL announces a commit, and how clients of MySQL and MariaDB ask for one. Every fault counts how often it fired,
so that a test can refuse to pass trivially.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum, auto
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit, urlunsplit

_CHUNK_BYTES: Final = 65_536
_QUEUED_CHUNKS_MAX: Final = 256
_DEFAULT_PORTS: Final = {
    "postgresql": 5432,
    "mysql": 3306,
    "mariadb": 3306,
    "amqp": 5672,
    "amqps": 5671,
    "tcp": 0,
}
# PostgreSQL's CommandComplete message of a COMMIT: type, length, tag.
_COMMITTED: Final = b"C\x00\x00\x00\x0bCOMMIT\x00"
# MySQL's answer to a COMMIT is that to many a statement, but the question is a packet of its own.
_COMMIT: Final = b"\x07\x00\x00\x00\x03COMMIT"


class Direction(Enum):
    """Which way bytes flow."""

    TO_SERVER = auto()
    TO_CLIENT = auto()


BOTH: Final = (Direction.TO_SERVER, Direction.TO_CLIENT)


@dataclass
class _Cut:
    """An armed cut: what to look for, what becomes of the bytes that hold it, how many matches to let pass."""

    pattern: bytes
    direction: Direction
    deliver: bool
    skip: int


@dataclass
class _Lane:
    """What is done to the bytes of one direction, on every connection of the link."""

    delay: timedelta = timedelta(0)
    dropping: bool = False
    flowing: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.flowing.set()


class _Connection:
    """One client with its connection to the server."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.writers = {Direction.TO_SERVER: server, Direction.TO_CLIENT: client}
        self.tails = dict.fromkeys(BOTH, b"")
        self.carrier: asyncio.Task[None] | None = None
        self.has_hole = False  # bytes were dropped: after `heal` the stream could only be garbage
        self.awaits_answer_to_swallow = False

    def abort(self) -> None:
        """Break both sockets with a reset, not with an orderly end."""
        for writer in self.writers.values():
            _abort(writer)
        if self.carrier is not None:
            self.carrier.cancel()


class Proxy:
    """A listener on the loopback interface in front of one server.

    All verbs act at once on the open connections and on later ones, until `heal`. Directions default to both ways.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._upstream = (
            parts.hostname or "127.0.0.1",
            parts.port or _DEFAULT_PORTS[parts.scheme.partition("+")[0]],
        )
        self._original_url = url
        self.fired: Counter[str] = Counter()
        self._changed = asyncio.Condition()
        self._lanes = {direction: _Lane() for direction in BOTH}
        self._cut: _Cut | None = None
        self._refusing = False
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """The server's address with the proxy's host and port in it."""
        parts = urlsplit(self._original_url)
        user, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user}{at}{self.host}:{self.port}"))

    @property
    def host(self) -> str:
        return "127.0.0.1"

    @property
    def port(self) -> int:
        assert self._server is not None, "the proxy is not open: use `async with Proxy(url)`"
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def open_connections(self) -> int:
        """How many clients are connected now."""
        return len(self._connections)

    # -- verbs ---------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """Take every fault away. What was jammed flows on, in order; connections that lost bytes are reset."""
        self._cut = None
        self._refusing = False
        for lane in self._lanes.values():
            lane.delay = timedelta(0)
            lane.dropping = False
            lane.flowing.set()
        for connection in [each for each in self._connections if each.has_hole]:
            connection.abort()

    def delay(self, by: timedelta, *directions: Direction) -> None:
        """Let every chunk of bytes arrive later by this much, in order."""
        for lane in self._choose(directions):
            lane.delay = by

    def jam(self, *directions: Direction) -> None:
        """Hold the bytes back; `release` lets them go. This is what makes late messages and duplicates."""
        for lane in self._choose(directions):
            lane.flowing.clear()

    def release(self) -> None:
        """Let everything that was jammed flow on, in order."""
        for lane in self._lanes.values():
            lane.flowing.set()

    def drop(self, *directions: Direction) -> None:
        """Swallow the bytes and keep the sockets open: a black hole, or with one direction half of one."""
        for lane in self._choose(directions):
            lane.dropping = True

    def reset(self) -> int:
        """Break every open connection at once; return how many. New ones are served."""
        victims = list(self._connections)
        for connection in victims:
            connection.abort()
            self._count("reset")
        return len(victims)

    def refuse(self) -> None:
        """Break new connections before they reach the server. Those that are open go on."""
        self._refusing = True

    def cut_after(self, pattern: bytes, direction: Direction = Direction.TO_SERVER, *, skip: int = 0) -> None:
        """Deliver the bytes that hold the pattern, swallow the answer to them and break the connection.

        Fires once, at match number `skip + 1` counted from now. The bytes are those of one connection in one
        direction, however they are divided into packets. Towards the client there is no answer to swallow.
        """
        self._arm(_Cut(pattern, direction, deliver=True, skip=skip))

    def cut_before(
        self, pattern: bytes, direction: Direction = Direction.TO_CLIENT, *, skip: int = 0
    ) -> None:
        """Swallow the bytes that hold the pattern and break the connection. Fires once, see `cut_after`."""
        self._arm(_Cut(pattern, direction, deliver=False, skip=skip))

    def cut_at_commit(self, *, skip: int = 0) -> None:
        """Let the server commit, and break the connection in place of telling the client.

        On PostgreSQL it looks for the server's word that a COMMIT is done, so it works whether the driver sent it as a
        simple query or prepared it first. On MySQL a connection that is being made sends COMMIT, too.
        """
        if self._original_url.startswith(("mysql", "mariadb")):
            self.cut_after(_COMMIT, Direction.TO_SERVER, skip=skip)
        else:
            self.cut_before(_COMMITTED, Direction.TO_CLIENT, skip=skip)

    async def wait_fired(
        self, fault: str, times: int = 1, *, within: timedelta = timedelta(seconds=10)
    ) -> None:
        """Return when a fault (delay, jam, drop, reset, refuse, cut) has fired that often; TimeoutError otherwise."""
        async with asyncio.timeout(within.total_seconds()), self._changed:
            await self._changed.wait_for(lambda: self.fired[fault] >= times)

    # -- life ----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, self.host, 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self._connections):
            connection.abort()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # an aborted link is closed in the loop's next turn

    def _accept(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        # whenever it ends, also before its first step: a link left open would be found in another test
        self._spawn(self._serve(reader, client)).add_done_callback(lambda _: _abort(client))

    async def _serve(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        if self._refusing:
            self._count("refuse")
            _abort(client)
            return
        try:
            server_reader, server = await asyncio.open_connection(*self._upstream)
        except OSError:
            _abort(client)
            return
        connection = _Connection(client, server)
        connection.carrier = asyncio.current_task()
        self._connections.add(connection)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(connection, client_reader, Direction.TO_SERVER))
                group.create_task(self._pump(connection, server_reader, Direction.TO_CLIENT))
        except* OSError:
            pass  # one side broke the connection: the other side is told by the abort below
        finally:
            self._connections.discard(connection)
            connection.carrier = None
            connection.abort()

    async def _pump(
        self, connection: _Connection, reader: asyncio.StreamReader, direction: Direction
    ) -> None:
        """Carry one direction. Reading and writing are apart, so a delay shifts the stream and does not slow it."""
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUED_CHUNKS_MAX)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write(connection, chunks, direction))
            while True:
                chunk = await reader.read(_CHUNK_BYTES)
                delay = self._lanes[direction].delay
                if delay:
                    self._count("delay")
                translated = self._translate(connection, chunk, direction)
                await chunks.put((loop.time() + delay.total_seconds(), translated))
                if not chunk:
                    return

    def _translate(self, connection: _Connection, chunk: bytes, direction: Direction) -> bytes:
        """Return the bytes to carry; here those that came. Empty bytes are the end of the stream."""
        return chunk

    async def _write(
        self, connection: _Connection, chunks: asyncio.Queue[tuple[float, bytes]], direction: Direction
    ) -> None:
        writer, lane = connection.writers[direction], self._lanes[direction]
        while True:
            due, chunk = await chunks.get()
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            if not lane.flowing.is_set():
                self._count("jam")
                await lane.flowing.wait()
            if lane.dropping:
                self._count("drop")
                connection.has_hole = True
            elif not chunk:
                if writer.can_write_eof():
                    writer.write_eof()
                return
            elif not self._cuts(connection, chunk, direction):
                writer.write(chunk)
                await writer.drain()

    def _cuts(self, connection: _Connection, chunk: bytes, direction: Direction) -> bool:
        """Whether the armed cut takes this chunk; if so it is dealt with."""
        if connection.awaits_answer_to_swallow and direction is Direction.TO_CLIENT:
            self._fire_cut(connection)
            return True
        cut = self._cut
        if cut is None or cut.direction is not direction:
            return False
        seen = connection.tails[direction] + chunk
        matches = seen.count(cut.pattern)
        connection.tails[direction] = seen[-(len(cut.pattern) - 1) :] if len(cut.pattern) > 1 else b""
        if matches <= cut.skip:
            cut.skip -= matches
            return False
        self._cut = None
        if cut.deliver and direction is Direction.TO_SERVER:
            connection.awaits_answer_to_swallow = True
            return False
        if cut.deliver:
            connection.writers[direction].write(chunk)
            asyncio.get_running_loop().call_soon(connection.abort)
            self._count("cut")
        else:
            self._fire_cut(connection)
        return True

    def _arm(self, cut: _Cut) -> None:
        self._cut = cut
        for connection in self._connections:
            connection.tails[cut.direction] = b""

    def _fire_cut(self, connection: _Connection) -> None:
        connection.abort()
        self._count("cut")

    def _choose(self, directions: tuple[Direction, ...]) -> list[_Lane]:
        return [self._lanes[direction] for direction in directions or BOTH]

    def _count(self, fault: str) -> None:
        self.fired[fault] += 1
        self._spawn(self._announce())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()


ProxyFactory = Callable[[str], Awaitable[Proxy]]


def _abort(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.fileno() >= 0:
        # Linger of zero seconds: closing sends a reset at once.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()

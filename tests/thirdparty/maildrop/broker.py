"""The broker port of saga over a folder."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from maildrop.folder import Box, Session
from saga.brokers.base import Capabilities, Channel, ChannelStatus, Delivery, OutMessage, PublishOutcome
from saga.clock import Clock, Ids, Spawner
from saga.errors import BrokerUnavailable, ConfigurationError, TopologyMismatch

MAILDROP = Capabilities(
    name="maildrop",
    durable=True,
    ordered_per_key=True,
    delay=False,
    priority=False,
    single_ack=True,
    delivery_count=True,
    packs_commands=False,
    body_bytes_max=1_048_576,
    unacked_seconds_max=None,
)
BACKLOG_MAX = 10_000


class _Waiting(NamedTuple):
    message: OutMessage
    outcome: asyncio.Future[PublishOutcome]
    until: float


class Maildrop:
    """A process at the folder. Files are read and written on the loop: a folder is for small installations."""

    def __init__(
        self,
        address: str,
        *,
        clock: Clock,
        ids: Ids,
        spawner: Spawner,
        poll_seconds: float = 0.05,
        publish_seconds_max: float = 10.0,
        delivery_limit: int = 100,
        queue_length_max: int | None = None,
    ) -> None:
        self.root = Path(unquote(urlsplit(address).path))
        self.delivery_limit = delivery_limit
        self._clock = clock
        self._spawner = spawner
        self._poll_seconds = poll_seconds
        self._publish_seconds_max = publish_seconds_max
        self._queue_length_max = queue_length_max
        self._backlog: deque[_Waiting] = deque()
        self._readers: list[Reader] = []
        self._numbers = itertools.count()
        self._looking: asyncio.Task[None] | None = None
        self._closed = False
        self.session: Session | None = None

    @property
    def capabilities(self) -> Capabilities:
        return MAILDROP

    async def start(self) -> None:
        with self._reached():
            pass  # a session is open
        if self._looking is None:
            self._looking = self._spawner.spawn(self._look_again(), name="maildrop-look")

    async def declare(self, channels: Sequence[Channel]) -> None:
        wanted = {channel.name: channel.parking or "" for channel in channels}
        for parking in filter(None, list(wanted.values())):
            wanted.setdefault(parking, "")
        with self._reached():
            for name, parking in wanted.items():
                box = Box(self.root, name)
                if box.is_there() and box.parking != parking:
                    raise TopologyMismatch(
                        f"channel {name}: parking is {box.parking!r}, declared with {parking!r}"
                    )
            for name, parking in wanted.items():
                if not Box(self.root, name).is_there():
                    Box(self.root, name).make(parking)
        self.look()

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        loop = asyncio.get_running_loop()
        until = self._clock.monotonic() + self._publish_seconds_max
        made = [_Waiting(message, loop.create_future(), until) for message in messages]
        for waiting in made:
            if self._closed or len(self._backlog) >= BACKLOG_MAX:
                waiting.outcome.set_result(PublishOutcome.UNKNOWN)
            else:
                self._backlog.append(waiting)
        self.look()
        return [waiting.outcome for waiting in made]

    async def consume(self, channel: str, *, prefetch: int) -> Reader:
        if not 1 <= prefetch <= 10_000:
            raise ConfigurationError(f"prefetch is 1 to 10,000, not {prefetch}")
        with self._reached() as session:
            box = self._box(channel)
            reader = Reader(self, box, prefetch, str(next(self._numbers)))
            box.read_by(session.id, reader.id)
        self._readers.append(reader)
        self.look()
        return reader

    async def status(self, channel: str) -> ChannelStatus:
        with self._reached():
            box = self._box(channel)
            return ChannelStatus(box.waiting(), box.readers())

    async def close(self) -> None:
        if self._closed:
            return
        for reader in list(self._readers):
            await reader.close()
        self._closed = True
        for waiting in self._backlog:
            self._answer(waiting, PublishOutcome.UNKNOWN)
        self._backlog.clear()
        if self._looking is not None:
            self._looking.cancel()
        if self.session is not None:
            self.session.end()

    # --- inside

    def _box(self, channel: str) -> Box:
        box = Box(self.root, channel)
        if not box.is_there():
            raise TopologyMismatch(f"channel {channel} is not declared")
        return box

    @contextmanager
    def _reached(self) -> Iterator[Session]:
        if self._closed:
            raise BrokerUnavailable("this broker object is closed")
        try:
            yield self.live_session()
        except OSError as error:
            raise BrokerUnavailable(f"the folder is not there: {type(error).__name__}") from None

    def live_session(self) -> Session:
        """Return the session, a new one if it was ended: then all that was held is somebody's again. Raises OSError."""
        self.root.stat()
        if self.session is None or not self.session.is_there():
            for reader in self._readers:
                reader.lose()
            if self.session is not None:
                self.session.end()
            self.session = Session(self.root)
        return self.session

    async def _look_again(self) -> None:
        while True:
            await self._clock.sleep(self._poll_seconds)
            self.look()

    def look(self) -> None:
        """Send what waits to be sent and take what there is to take, as far as the folder is there."""
        if self._closed:
            return
        with suppress(OSError):
            session = self.live_session()
            self._send()
            for reader in self._readers:
                with suppress(FileNotFoundError):  # the channel was deleted, and may come back
                    reader.take(session)
        now = self._clock.monotonic()
        while self._backlog and self._backlog[0].until <= now:
            self._answer(self._backlog.popleft(), PublishOutcome.UNKNOWN)

    def _send(self) -> None:
        while self._backlog:
            message = self._backlog[0].message
            box = Box(self.root, message.channel)
            outcome = PublishOutcome.CONFIRMED
            if not box.is_there():
                outcome = PublishOutcome.UNROUTABLE
            elif len(message.body) > MAILDROP.body_bytes_max or self._is_full(box):
                outcome = PublishOutcome.REFUSED
            else:
                box.put(message.content_type, message.headers, message.body)
            self._answer(self._backlog.popleft(), outcome)

    def _is_full(self, box: Box) -> bool:
        return self._queue_length_max is not None and box.waiting() >= self._queue_length_max

    @staticmethod
    def _answer(waiting: _Waiting, outcome: PublishOutcome) -> None:
        if not waiting.outcome.done():
            waiting.outcome.set_result(outcome)

    def forget(self, reader: Reader) -> None:
        """A consumer is closed."""
        with suppress(ValueError):
            self._readers.remove(reader)


class Reader:
    """A subscription to one channel."""

    def __init__(self, broker: Maildrop, box: Box, prefetch: int, id: str) -> None:
        self.id = id
        self._broker = broker
        self._box = box
        self._prefetch = prefetch
        self._held: set[str] = set()
        self._buffer: list[Delivery] = []
        self._there = asyncio.Event()
        self._stopped = False
        self._closed = False

    def take(self, session: Session) -> None:
        """Take what there is room for."""
        self._box.read_by(session.id, self.id)
        self._box.give_back_of_the_dead(session.id)
        room = 0 if self._stopped else self._prefetch - len(self._held)
        for letter in self._box.take(session.id, room, self._broker.delivery_limit + 1):
            self._held.add(letter.name)
            self._buffer.append(
                Delivery(
                    channel=self._box.channel,
                    body=letter.body,
                    content_type=letter.content_type,
                    headers=letter.headers,
                    redelivered=letter.deliveries > 1,
                    delivery_count=letter.deliveries,
                    token=(self, session.id, letter.name),
                )
            )
        if self._buffer:
            self._there.set()

    def lose(self) -> None:
        """The session has ended: what is held comes again."""
        self._held.clear()
        self._buffer.clear()

    async def receive(self) -> Sequence[Delivery]:
        while not self._buffer:
            if self._stopped:
                return ()
            self._there.clear()
            await self._there.wait()
        batch, self._buffer = self._buffer, []
        return batch

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        self._settle(deliveries, self._box.done)

    def retry(self, deliveries: Sequence[Delivery]) -> None:
        self._settle(deliveries, self._box.give_back)

    def _settle(self, deliveries: Sequence[Delivery], settle: Callable[[str, str], None]) -> None:
        with suppress(OSError):
            session = self._broker.live_session()
            for delivery in deliveries:
                handle: Any = delivery.token
                owner, taken_by, name = handle
                if owner is self and taken_by == session.id and name in self._held:
                    self._held.discard(name)
                    settle(session.id, name)
        self._broker.look()

    async def stop(self) -> None:
        self._stopped = True
        self._there.set()

    async def close(self) -> None:
        await self.stop()
        if self._closed:
            return
        self._closed = True
        self._buffer.clear()
        self._broker.forget(self)
        with suppress(OSError):
            session = self._broker.live_session()
            for name in sorted(self._held):
                self._box.give_back(session.id, name)
            self._box.read_no_more(session.id, self.id)
        self._held.clear()

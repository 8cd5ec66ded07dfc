"""One live connection to RabbitMQ, and the supervisor that keeps one of them up.

A `Link` is lost once and for good. `Keeper` connects again with exponential backoff and full jitter (RMQ-15) and
lets its owner set the new link up before anybody sees it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

import aiormq
from aiormq.connection import TCPTransportFactory, TLSTransportFactory, TransportFactory
from aiormq.exceptions import AMQPError, AuthenticationError, InvalidFrameError, ProbableAuthenticationError
from pamqp import commands as spec
from yarl import URL

from saga.brokers.rabbitmq.address import Address
from saga.brokers.rabbitmq.channel import AmqpChannel, ChannelEvents, ChannelLost
from saga.brokers.rabbitmq.options import RabbitMQOptions
from saga.clock import Clock, Ids, Spawner
from saga.transport import disagreement

log: Final[logging.Logger] = logging.getLogger("saga.rabbitmq")

_CONNECT_SECONDS_MAX = 4.0
_CLOSE_SECONDS_MAX = 3.0
_READ_BUFFER_BYTES = 256 * 1024
_STABLE_SECONDS = 5.0
_ZOMBIE_ROUNDS = 3


class ConnectionLost(Exception):
    """The connection could not be made or has gone."""


class LinkRefused(ConnectionLost):
    """There will be none before somebody changes the address, the certificates or the server's users."""


class _TransportKeeper(TransportFactory):
    """Opens the transport as aiormq does and keeps the writer, so that we write and abort without its queue."""

    def __init__(self) -> None:
        self.writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        factory = TLSTransportFactory() if url.scheme == "amqps" else TCPTransportFactory()
        reader, writer = await factory.create(url, limit=_READ_BUFFER_BYTES, **kwargs)
        self.writer = writer
        return reader, writer


class Link:
    """An open connection. Everything written goes out in the order of the calls."""

    def __init__(
        self, connection: aiormq.Connection, writer: asyncio.StreamWriter, *, name: str, spawner: Spawner
    ) -> None:
        self.name = name
        self.lost: asyncio.Event = asyncio.Event()
        self.frame_bytes_max: int = connection.connection_tune.frame_max or 131072
        self._connection = connection
        self._writer = writer
        self._spawner = spawner
        self._numbers = 0
        self._channels: dict[int, AmqpChannel] = {}
        self._abandoned: dict[AmqpChannel, int] = {}
        connection.closing.add_done_callback(lambda _: self._end("closed by the peer or the network"))

    def write(self, data: bytes) -> None:
        """Give bytes to the transport. No back-pressure here: the publisher's window bounds what is in flight."""
        if not self.lost.is_set() and not self._writer.transport.is_closing():
            self._writer.write(data)

    @property
    def blocked(self) -> bool:
        """Tell whether the broker has stopped reading from us because of an alarm (RMQ-11)."""
        if self.lost.is_set():
            return False
        # `ready()` is the driver's only public word on it: it returns at once unless we are blocked.
        waiting = self._connection.ready()
        try:
            waiting.send(None)
        except StopIteration:
            return False
        finally:
            waiting.close()
        return True

    async def open_channel(self, events: ChannelEvents, *, confirms: bool = False) -> AmqpChannel:
        """Return a new channel. Errors: ChannelLost."""
        if self.lost.is_set():
            raise ChannelLost(0, "connection lost")
        self._numbers = number = self._free_number()
        channel = AmqpChannel(self, number, events)
        self._channels[number] = channel
        self._connection.channels[number] = channel  # type: ignore[assignment]
        await channel.call(spec.Channel.Open())
        if confirms:
            await channel.call(spec.Confirm.Select())
        return channel

    def _free_number(self) -> int:
        number = self._numbers % 2000 + 1  # the broker allows 2047
        while number in self._connection.channels:
            number = number % 2000 + 1
        return number

    def forget(self, channel: AmqpChannel) -> None:
        """Drop a lost channel. aiormq frees the number itself when it sees the close."""
        self._channels.pop(channel.number, None)

    def abandoned(self, channel: AmqpChannel) -> None:
        """Remember a channel that was given up without an answer, until the broker has closed it."""
        self._abandoned[channel] = 0

    def buried(self, channel: AmqpChannel) -> None:
        """The broker has closed a channel that was given up; what it held is in its queue again."""
        self._abandoned.pop(channel, None)

    def has_zombie(self) -> bool:
        """Tell whether a channel that was given up is still open at the broker for the fourth time asked.

        It holds deliveries that nobody will settle; only the end of the connection frees them then.
        """
        for channel in self._abandoned:
            self._abandoned[channel] += 1
        return any(rounds > _ZOMBIE_ROUNDS for rounds in self._abandoned.values())

    def drop(self, reason: str) -> None:
        """Cut the connection now, without a word to the peer, who may be frozen. Idempotent."""
        if not self.lost.is_set():
            self._writer.transport.abort()
            self._end(reason)
            self._spawner.spawn(self._bury(), name=f"saga-rabbitmq-bury-{self.name}")

    async def close(self) -> None:
        """Say goodbye, bounded, and be lost. What was written before still arrives. Idempotent."""
        if not self.lost.is_set():
            await self._bury()
            self._end("closed")

    def _end(self, reason: str) -> None:
        # Order: `lost` first, so that whatever the events below start sees a dead link and writes nothing to it.
        if self.lost.is_set():
            return
        self.lost.set()
        log.info("rabbitmq %s connection ended: %s", self.name, reason)
        for channel in list(self._channels.values()):
            channel.lose(ChannelLost(0, reason))

    async def _bury(self) -> None:
        closing = self._spawner.spawn(
            _close_quietly(self._connection), name=f"saga-rabbitmq-close-{self.name}"
        )
        done, _ = await asyncio.wait({closing}, timeout=_CLOSE_SECONDS_MAX)
        if not done:
            closing.cancel()
        self._writer.transport.abort()


async def _close_quietly(connection: aiormq.Connection) -> None:
    try:
        await connection.close()
    except (AMQPError, OSError) as error:
        log.debug("closing ended with %s", type(error).__name__)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # RMQ-9: nobody cancelled us; the driver says "connection lost" that way


async def connect(address: Address, *, name: str, options: RabbitMQOptions, spawner: Spawner) -> Link:
    """Return a new link within 4 s. Errors: LinkRefused, ConnectionLost; neither tells more than what went wrong."""
    told = {"heartbeat": str(options.heartbeat_seconds), "name": f"saga-{name}"}
    target = replace(address, url=address.url.update_query(told))
    transport = _TransportKeeper()
    task = spawner.spawn(_connect(target, transport), name=f"saga-rabbitmq-connect-{name}")
    try:
        done, _ = await asyncio.wait({task}, timeout=_CONNECT_SECONDS_MAX)
        if not done:
            raise ConnectionLost("no answer")
        outcome = task.result()
        if isinstance(outcome, ConnectionLost):
            raise outcome
        if transport.writer is None:
            raise ConnectionLost("no transport")
        return Link(outcome, transport.writer, name=name, spawner=spawner)
    except BaseException:
        # also when we are cancelled: nothing half open stays behind. AIO-2: do not wait for what we cancel
        task.cancel()
        if transport.writer is not None:
            transport.writer.transport.abort()
        raise


async def _connect(target: Address, transport: _TransportKeeper) -> aiormq.Connection | ConnectionLost:
    """Return the connection, or what went wrong: the class of the error, whose text may hold the URL (S20)."""
    try:
        return await aiormq.connect(target.url, context=target.context, transport_factory=transport)
    except (AMQPError, OSError, ValueError, RuntimeError) as error:
        if why := _refusal(error):
            return LinkRefused(why)
        if isinstance(error, InvalidFrameError) and "Connection.Close" in str(error):
            # the driver does not say why; a broker that is being started does it, too
            return ConnectionLost("it closed, as for a virtual host that is not there or not for this user")
        return ConnectionLost(type(error).__name__)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return ConnectionLost("ConnectionLost")  # RMQ-9


def _refusal(error: Exception) -> str:
    """Return what an operator must see to, for people; empty for what passes by itself."""
    if isinstance(error, AuthenticationError):
        return "it offers no such way to log in; is the plugin for it enabled there?"
    if isinstance(error, ProbableAuthenticationError):
        return "it refuses the log-in: user or password is wrong"
    return disagreement(error)


class Keeper:
    """Keeps one link up: connect, set up, wait for its end, pause, again. `up` tells whether there is one."""

    def __init__(
        self,
        address: Address,
        *,
        name: str,
        options: RabbitMQOptions,
        clock: Clock,
        ids: Ids,
        spawner: Spawner,
        set_up: Callable[[Link], Awaitable[None]],
    ) -> None:
        self.name = name
        self.up: asyncio.Event = asyncio.Event()
        self.refused: asyncio.Event = asyncio.Event()
        """Set while the last try was one that an operator must see to; `last_error` tells what."""
        self.connects: int = 0
        self.last_error: str = ""
        self._link: Link | None = None
        self._address = address
        self._options = options
        self._clock = clock
        self._ids = ids
        self._spawner = spawner
        self._set_up = set_up

    @property
    def link(self) -> Link | None:
        """The live link, if there is one."""
        return self._link if self._link is not None and not self._link.lost.is_set() else None

    async def run(self) -> None:
        """Run until cancelled."""
        failures = 0
        while True:
            since = self._clock.monotonic()
            await self._one_life()
            lived = self._clock.monotonic() - since
            failures = 0 if lived > _STABLE_SECONDS else failures + 1
            bound = min(
                self._options.backoff_seconds_max, self._options.backoff_seconds * 2.0 ** min(failures, 16)
            )
            await self._clock.sleep(self._ids.fraction() * bound)

    async def _one_life(self) -> None:
        link: Link | None = None
        try:
            link = await connect(self._address, name=self.name, options=self._options, spawner=self._spawner)
            await self._set_up(link)
            self._link = link
            self.connects += 1
            self.refused.clear()
            self.up.set()
            log.info("rabbitmq %s connection is up", self.name)
            probing = self._spawner.spawn(self._probe(link), name=f"saga-rabbitmq-probe-{self.name}")
            try:
                await link.lost.wait()
            finally:
                probing.cancel()
        except (ConnectionLost, ChannelLost) as error:
            self.last_error = str(error)
            if isinstance(error, LinkRefused):
                self.refused.set()
            log.info("rabbitmq %s connection failed: %s", self.name, self.last_error)
        except Exception as error:
            # this is the supervisor: it must outlive what it does not know
            self.last_error = type(error).__name__
            log.error("rabbitmq %s connection failed with %s", self.name, self.last_error)
        finally:
            self.up.clear()
            self._link = None
            if link is not None:
                link.drop("given up")

    async def _probe(self, link: Link) -> None:
        """Ask the broker for a sign of life all the time (RMQ-8); a late answer drops the link.

        While an alarm blocks the link, the broker reads nothing from it and cannot answer (RMQ-11): no probe then.
        """
        while not link.lost.is_set():
            try:
                channel = await link.open_channel(ChannelEvents())
                while True:
                    await self._clock.sleep(self._options.late_seconds)
                    if not link.blocked:
                        probe = spec.Basic.Qos(prefetch_count=1)
                        await channel.call(probe, seconds=self._options.late_seconds)
                        if link.has_zombie():
                            link.drop("a channel that was given up is still open")
            except ChannelLost as error:
                if not link.blocked:
                    link.drop(f"probe: {error}")
                await self._clock.sleep(self._options.late_seconds)

    async def wait_up(self, seconds: float, *, unless_refused: bool = False) -> Link | None:
        """Return the live link, waiting up to `seconds` for it; `unless_refused`: not where waiting is in vain."""
        deadline = self._clock.monotonic() + seconds
        while (link := self.link) is None:
            left = deadline - self._clock.monotonic()
            if left <= 0 or (unless_refused and self.refused.is_set()):
                return None
            told = (self.up, self.refused) if unless_refused else (self.up,)
            waiting = [
                self._spawner.spawn(each.wait(), name=f"saga-rabbitmq-wait-{self.name}") for each in told
            ]
            await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for each in waiting:
                each.cancel()
        return link

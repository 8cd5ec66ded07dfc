"""What goes wrong in the demo, all of it from outside the example: nothing here is known to `transfer.py`.

The runner gives a process its fault by environment variables and counts how often it fired; `stage.py` brings the
process up with it. A sabotage is another matter: it takes away what protects the money, to show that the demo notices.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal, get_args

from saga.brokers.base import (
    Broker,
    Capabilities,
    Channel,
    ChannelStatus,
    Consumer,
    OutMessage,
    PublishOutcome,
)
from saga.definition.activity import Activity
from saga.messages import decode_replies, replies_channel


@dataclass(frozen=True)
class LostReply:
    """The first reply of a step is confirmed and never delivered."""

    step: str


@dataclass(frozen=True)
class Crash:
    """SIGKILL at a point that a run without faults passes in that process, drawn by the seed; then started again."""


Fault = LostReply | Crash


class PassingOn:
    """A broker that does what the one behind it does; a base for those that do not quite."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    @property
    def capabilities(self) -> Capabilities:
        return self._broker.capabilities

    async def start(self) -> None:
        await self._broker.start()

    async def declare(self, channels: Sequence[Channel]) -> None:
        await self._broker.declare(channels)

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        return self._broker.publish(messages)

    async def consume(self, channel: str, *, prefetch: int) -> Consumer:
        return await self._broker.consume(channel, prefetch=prefetch)

    async def status(self, channel: str) -> ChannelStatus:
        return await self._broker.status(channel)

    async def close(self) -> None:
        await self._broker.close()


class LosingReplies(PassingOn):
    """Loses the first reply of one step, and writes that down."""

    def __init__(self, broker: Broker, *, namespace: str, step: str, log: Path) -> None:
        super().__init__(broker)
        self._channel = replies_channel(namespace)
        self._step = step
        self._log = log

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        return [self._lose() if self._hits(each) else self._broker.publish([each])[0] for each in messages]

    def _hits(self, message: OutMessage) -> bool:
        if message.channel != self._channel or self._log.exists():
            return False
        return any(reply.step == self._step for reply in decode_replies(message.body))

    def _lose(self) -> asyncio.Future[PublishOutcome]:
        self._log.write_text(f"{self._step}\n")
        return lost()


def lost() -> asyncio.Future[PublishOutcome]:
    """Return what the publisher of a message hears if it is confirmed and never delivered (RMQ-18)."""
    outcome: asyncio.Future[PublishOutcome] = asyncio.get_running_loop().create_future()
    outcome.set_result(PublishOutcome.CONFIRMED)
    return outcome


# --- sabotage ---------------------------------------------------------------------------------

Sabotage = Literal["barrier", "redrive", "compensation"]
SABOTAGES: Final[tuple[Sabotage, ...]] = get_args(Sabotage)
REDRIVE: Final = timedelta(seconds=2)
"""Instead of 30 s, so that nobody has to wait."""


def redrive(sabotage: str) -> timedelta:
    """Return after how long a command without an answer is sent again."""
    return timedelta(days=1) if sabotage == "redrive" else REDRIVE


def apply(sabotage: str, withdraw: Activity[Any, Any, Any]) -> None:
    """Take one protection away from this process."""
    if sabotage == "barrier":
        _without_barrier()
    elif sabotage == "compensation":
        _without_compensation(withdraw)


def _without_barrier() -> None:
    """No key is ever found taken, so a copy of a command runs its handler and commits."""
    from saga.storage.sqlalchemy.participant import SqlHandlerTransaction, SqlParticipantStore

    insert = SqlHandlerTransaction._insert

    async def find_nothing(self: Any, keys: Any) -> dict[Any, Any]:
        return {}

    def insert_and_ignore(self: Any, connection: Any, rows: Any) -> frozenset[Any]:
        insert(self, connection, rows)
        return frozenset()

    _replace(SqlParticipantStore, "look_up", find_nothing)
    _replace(SqlHandlerTransaction, "find", find_nothing)
    _replace(SqlHandlerTransaction, "_insert", insert_and_ignore)


def _replace(owner: type, name: str, function: Callable[..., Any]) -> None:
    """Replace a method that must be there: a sabotage that misses would show that nothing is missed."""
    if not hasattr(owner, name):
        raise AttributeError(f"{owner.__name__} has no {name}: the sabotage is out of date")
    setattr(owner, name, function)


def _without_compensation(activity: Activity[Any, Any, Any]) -> None:
    """The undo says that it is done, and has done nothing."""

    async def nothing(**_: Any) -> None: ...

    undo = activity.compensation_
    assert undo is not None
    assert undo.handler is not None
    activity.compensation_ = replace(undo, handler=replace(undo.handler, function=nothing))

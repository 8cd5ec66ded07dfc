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

from saga import Refused
from saga.brokers.base import Broker, OutMessage, PublishOutcome
from saga.clock import SystemClock
from saga.definition.activity import Activity
from saga.messages import Command, decode_replies, replies_channel
from saga.testing.wire import PassingOn, carried, lost


@dataclass(frozen=True)
class LostReply:
    """The first reply of a step is confirmed and never delivered."""

    step: str


@dataclass(frozen=True)
class Crash:
    """SIGKILL at a point that a run without faults passes in that process, drawn by the seed; then started again."""


@dataclass(frozen=True)
class BankDown:
    """The bank that does a step cannot reach its own database: its first attempts fail."""

    step: str
    attempts: int = 2


@dataclass(frozen=True)
class Copies:
    """Every message is delivered twice, and the first command of a step once more after its transfer has ended."""

    late: str


@dataclass(frozen=True)
class RefundImpossible:
    """The bank refuses to undo a step until a person has seen to it; then the operator orders a retry."""

    step: str


Fault = LostReply | Crash | BankDown | Copies | RefundImpossible
LATE: Final = "late"
"""What stands in the log of `Copying` when the late copy was sent."""
LATE_SECONDS: Final = 1.0
LATE_SECONDS_MAX: Final = 10.0
POLL_SECONDS: Final = 0.05


class LosingReplies(PassingOn):
    """Loses the first reply of one step, and writes that down."""

    def __init__(self, broker: Broker, *, namespace: str, step: str, log: Path) -> None:
        super().__init__(broker)
        self._channel = replies_channel(namespace)
        self._step = step
        self._log = log

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        return [self._lose() if self._hits(each) else self.broker.publish([each])[0] for each in messages]

    def _hits(self, message: OutMessage) -> bool:
        if message.channel != self._channel or self._log.exists():
            return False
        return any(reply.step == self._step for reply in decode_replies(message.body))

    def _lose(self) -> asyncio.Future[PublishOutcome]:
        self._log.write_text(f"{self._step}\n")
        return lost()


class Copying(PassingOn):
    """Sends every message twice, and one of them once more when the transfer has ended; writes both down.

    `wait_for_late` in the process that waits for the transfer says when that is.
    """

    def __init__(self, broker: Broker, *, late: str, log: Path) -> None:
        super().__init__(broker)
        self._late = late
        self._log = log
        self._kept: OutMessage | None = None

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        late = next((message for message in messages if self._is_late(message)), None)
        if late is not None and self._kept is None:
            self._kept = late
            self._send_late(late)
        outcomes = self.broker.publish(messages)
        self.broker.publish(messages)
        write(self._log, "twice\n" * len(messages))
        return outcomes

    def _is_late(self, message: OutMessage) -> bool:
        return any(
            isinstance(each, Command) and each.step == self._late and each.direction == "forward"
            for each in carried(message)
        )

    def _send_late(self, message: OutMessage) -> None:
        if not _ended(self._log).exists():
            asyncio.get_running_loop().call_later(POLL_SECONDS, self._send_late, message)
            return
        self.broker.publish([message])
        write(self._log, f"{LATE}\n")


def logged(log: Path) -> list[str]:
    """Return what faults have written down, a line each."""
    return log.read_text().splitlines() if log.exists() else []


def write(log: Path, lines: str) -> None:
    """Write down that faults have fired; several processes may write to one log."""
    with log.open("a") as file:
        file.write(lines)


def _ended(log: Path) -> Path:
    return log.with_suffix(".ended")


async def wait_for_late(log: Path) -> None:
    """The transfer has ended: wait until the late copy was sent, and a moment for what it may do."""
    _ended(log).touch()
    clock = SystemClock()
    until = clock.monotonic() + LATE_SECONDS_MAX
    while LATE not in logged(log) and clock.monotonic() < until:
        await clock.sleep(POLL_SECONDS)
    await clock.sleep(LATE_SECONDS)


def refuse_undo(activity: Activity[Any, Any, Any], log: Path) -> None:
    """Let this process refuse to undo an activity until `mend`, and write down each refusal."""
    undo = activity.compensation_
    assert undo is not None
    assert undo.handler is not None
    handler = undo.handler

    async def refused_until_mended(**arguments: Any) -> Any:
        if not _mended(log).exists():
            write(log, "refused\n")
            raise Refused("account_frozen")
        return await handler.function(**arguments)

    activity.compensation_ = replace(undo, handler=replace(handler, function=refused_until_mended))


def mend(log: Path) -> None:
    """A person has seen to it: the next attempt of the undo succeeds."""
    _mended(log).touch()


def _mended(log: Path) -> Path:
    return log.with_suffix(".mended")


def bring_down(activity: Activity[Any, Any, Any], attempts: int, log: Path) -> None:
    """Let the first attempts of an activity fail in this process, and write each down."""
    handler = activity.handler
    assert handler is not None

    async def down_at_first(**arguments: Any) -> Any:
        if len(logged(log)) < attempts:
            write(log, "down\n")
            raise ConnectionError("the bank's database is away")
        return await handler.function(**arguments)

    activity.handler = replace(handler, function=down_at_first)


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

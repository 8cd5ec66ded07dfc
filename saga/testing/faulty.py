"""A process's connection to the broker that strikes the messages a test has named."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from saga.brokers.base import Broker, OutMessage, PublishOutcome
from saga.messages import Command
from saga.testing.faults import FaultKind, Faults
from saga.testing.wire import PassingOn, carried, lost

_TO_COMMANDS: Final = frozenset(
    {
        FaultKind.LOSE_COMMAND,
        FaultKind.DUPLICATE_COMMAND,
        FaultKind.DELAY_COMMAND,
        FaultKind.CRASH_COORDINATOR,
    }
)
_TO_REPLIES: Final = frozenset(
    {FaultKind.LOSE_REPLY, FaultKind.DUPLICATE_REPLY, FaultKind.DELAY_REPLY, FaultKind.CRASH}
)


class Held(NamedTuple):
    """A message on a long way: it arrives when its saga has ended."""

    run_id: str
    message: OutMessage


class FaultyBroker(PassingOn):
    """What is published here is lost, repeated, held back, or kills, as the faults say."""

    def __init__(self, broker: Broker, faults: Faults, kill: Callable[[], None], held: list[Held]) -> None:
        super().__init__(broker)
        self._faults = faults
        self._kill = kill
        self._held = held

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        if not self._faults.ordered:
            return self.broker.publish(messages)
        return [self._publish(message) for message in messages]

    def _publish(self, message: OutMessage) -> asyncio.Future[PublishOutcome]:
        (item,) = carried(message)  # the in-process broker carries one by one
        kinds = _TO_COMMANDS if isinstance(item, Command) else _TO_REPLIES
        fault = self._faults.strike(kinds, item.step, undo=item.direction != "forward")
        match fault.kind if fault is not None else None:
            case FaultKind.LOSE_COMMAND | FaultKind.LOSE_REPLY:
                return lost()
            case FaultKind.DELAY_COMMAND | FaultKind.DELAY_REPLY:
                self._held.append(Held(item.runid, message))
                return lost()
            case FaultKind.CRASH | FaultKind.CRASH_COORDINATOR:
                self._kill()
                return asyncio.get_running_loop().create_future()  # nobody is there any more to hear of it
            case FaultKind.DUPLICATE_COMMAND | FaultKind.DUPLICATE_REPLY:
                self.broker.publish([message])
            case _:
                pass
        (outcome,) = self.broker.publish([message])
        return outcome

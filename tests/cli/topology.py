"""An app whose broker has found something, for the command `saga broker check`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from pydantic import BaseModel

from saga import App, Participant
from saga.brokers.base import Channel, Finding, Severity
from saga.brokers.memory import MemoryBroker
from saga.clock import SystemClock, SystemIds, TaskSpawner

FOUND: Final = (
    Finding("missing", Severity.NOTE, "saga.default.commands.stock", "it is not there", "start makes it"),
    Finding(
        "queue-type",
        Severity.REFUSE,
        "saga.default.commands.stock.parked",
        "queue \x1b[31m is classic",
        "delete it if it is empty",
    ),
)


class Looking(MemoryBroker):
    """Finds what it was given, of the channels that the app has."""

    def __init__(self, *found: Finding) -> None:
        super().__init__(clock=SystemClock(), ids=SystemIds(), spawner=TaskSpawner())
        self.found = found
        self.asked: list[str] = []

    @property
    def lets_pass(self) -> bool:
        return True

    async def check(self, channels: Sequence[Channel]) -> Sequence[Finding]:
        self.asked += [channel.name for channel in channels]
        return self.found


class Standing(Looking):
    """Serves one command after the other."""

    async def close(self) -> None:
        pass


class Order(BaseModel):
    item: str


def serving(broker: MemoryBroker, *, production: bool = False) -> App:
    stock = Participant("stock", start_to_close=timedelta(seconds=30))

    @stock.activity(no_compensation="it only looks")
    async def look(order: Order) -> None: ...

    return App(broker=broker, participants=[stock], production=production)


app = serving(Standing(*FOUND))
good = serving(Standing())
noted = serving(Standing(FOUND[0]))
silent = serving(MemoryBroker(clock=SystemClock(), ids=SystemIds(), spawner=TaskSpawner()))

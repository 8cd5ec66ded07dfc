"""Many transfers at once: `python -m examples.money_transfer load --transfers 1000 --accounts 8 --concurrency 32`.

While it runs, an auditor reads all the money there is in one snapshot every second. One transfer in ten goes to an
account that nobody has, and one in ten asks for more than there ever is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count, takewhile
from random import Random
from typing import TYPE_CHECKING, Any, Final, TextIO

from examples.money_transfer import apps, transfer
from examples.money_transfer.books import states
from examples.money_transfer.layouts import Layout, Opening
from examples.money_transfer.processes import DemoError
from saga import Client, ResultTimeout, SagaCompensated, StorageBusy, StorageUnavailable
from saga.clock import SystemClock

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

OPENING_CENTS: Final = 1_000_000
TOO_MUCH_CENTS: Final = 10**12
SNAPSHOT_SECONDS: Final = 1.0
RESULT: Final = timedelta(minutes=5)
REDRIVE_SECONDS: Final = 30
"""As in production; under load a reply may take longer than the demo's two seconds."""
DRAW_SECONDS: Final = 0.2


def opening(accounts: int) -> Opening:
    """Return so many accounts, half of them at each bank, all at the first one with money."""
    half = accounts // 2
    return {
        "savings": {f"saver-{number}": OPENING_CENTS for number in range(1, half + 1)},
        "giro": {f"payee-{number}": 0 for number in range(1, accounts - half + 1)},
    }


def order(random: Random, number: str, accounts: Opening) -> transfer.Transfer:
    """Return a transfer between two of these accounts, drawn by chance."""
    chance = random.random()
    return transfer.Transfer(
        id=number,
        source=random.choice(list(accounts["savings"])),
        target="nobody" if chance < 0.1 else random.choice(list(accounts["giro"])),
        amount=TOO_MUCH_CENTS if chance > 0.9 else random.randint(1, 100),
    )


@dataclass
class Run:
    """What a load came to."""

    seconds: list[float] = field(default_factory=list)
    """How long each transfer took from its start to its result."""
    snapshots: int = 0
    conserved: int = 0
    took: float = 0.0

    def told(self, states: Mapping[str, int], before: int, after: int) -> list[str]:
        """Return the summary, line by line."""
        done = len(self.seconds)
        ordered = sorted(self.seconds) or [0.0]
        middle, late = (ordered[int((len(ordered) - 1) * part)] * 1000 for part in (0.5, 0.99))
        return [
            f"{done} transfers in {self.took:.1f} s: {done / max(self.took, 1e-9):.0f}/s, "
            f"p50 {middle:.0f} ms, p99 {late:.0f} ms",
            ", ".join(f"{state} {count}" for state, count in sorted(states.items())) or "no transfer",
            f"load: total before {before}, after {after}; "
            f"conserved in {self.conserved} of {self.snapshots} snapshots",
        ]


class Load:
    """One load on one layout."""

    def __init__(self, layout: Layout, accounts: Opening, *, concurrency: int, seed: int) -> None:
        self._layout = layout
        self._accounts = accounts
        self._concurrency = concurrency
        self._random = Random(seed)
        self._seed = seed
        self._clock = SystemClock()
        self.run = Run()

    async def play_for(self, seconds: float, before: int) -> Run:
        """Start transfers for so long, wait for those that are under way, and return what it came to."""
        began = self._clock.monotonic()
        numbers = takewhile(lambda _: self._clock.monotonic() - began < seconds, count(len(self.run.seconds)))
        async with self._client() as client, asyncio.TaskGroup() as group:
            looking = group.create_task(self._look(before))
            async with asyncio.TaskGroup() as working:
                for _ in range(self._concurrency):
                    working.create_task(self._work(client, numbers))
            self.run.took = self._clock.monotonic() - began
            looking.cancel()
        return self.run

    def play(self, transfers: int, *, tell: Callable[[str], None], bar: TextIO) -> bool:
        """Run so many transfers; return whether each ended and no cent was missing at any time."""
        before = self._layout.auditor.total()
        asyncio.run(self._play(transfers, before, bar))
        after = self._layout.auditor.total()
        ended = states(self._layout.environment)
        for line in self.run.told(ended, before, after):
            tell(line)
        closed = ended.get("completed", 0) + ended.get("compensated", 0)
        conserved = self.run.conserved == self.run.snapshots and before == after
        return conserved and closed == sum(ended.values()) == transfers

    async def _play(self, transfers: int, before: int, bar: TextIO) -> None:
        began = self._clock.monotonic()
        numbers = iter(range(transfers))
        with _progress(bar) as progress:
            async with self._client() as client, asyncio.TaskGroup() as group:
                looking = group.create_task(self._look(before))
                drawing = group.create_task(self._draw(progress, transfers, began))
                async with asyncio.TaskGroup() as working:
                    for _ in range(self._concurrency):
                        working.create_task(self._work(client, numbers))
                self.run.took = self._clock.monotonic() - began
                looking.cancel()
                drawing.cancel()

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[Client]:
        """Run the starter's part here: the whole app, or beside services only the client."""
        environment = self._layout.environment
        options: dict[str, Any] = {
            "namespace": environment.get("DEMO_NAMESPACE", "default"),
            "redrive": timedelta(seconds=REDRIVE_SECONDS),
        }
        if not self._layout.services:
            async with apps.embedded(environment["DEMO_DATABASE"], **options) as app:
                yield app.client
            return
        settings = apps.Settings(
            broker=environment["MONEY_TRANSFER_BROKER"],
            coordinator_database=environment["MONEY_TRANSFER_COORDINATOR_DATABASE"],
        )
        async with apps.coordinating(settings, **options).as_client() as client:
            yield client

    async def _work(self, client: Client, numbers: Iterator[int]) -> None:
        for number in numbers:
            await self._transfer(client, order(self._random, f"load-{self._seed}-{number}", self._accounts))

    async def _transfer(self, client: Client, asked: transfer.Transfer) -> None:
        began = self._clock.monotonic()
        while True:
            try:
                handle = await client.start(transfer.money_transfer, asked, id=asked.id)
                await handle.result(timeout=RESULT)
            except SagaCompensated:
                pass  # refused, as one in five is
            except (StorageBusy, StorageUnavailable):
                await self._clock.sleep(0.1)  # the same id again: it is started once
                continue
            except ResultTimeout:
                pass  # it counts among the states
            self.run.seconds.append(self._clock.monotonic() - began)
            return

    async def _look(self, before: int) -> None:
        while True:
            total = await asyncio.to_thread(self._layout.auditor.total)
            self.run.snapshots += 1
            self.run.conserved += total == before
            await self._clock.sleep(SNAPSHOT_SECONDS)

    async def _draw(self, progress: Progress, transfers: int, began: float) -> None:
        bar = progress.add_task("", total=transfers, told="")
        try:
            while True:
                await self._clock.sleep(DRAW_SECONDS)
                self._move(progress, bar, began)
        finally:
            self._move(progress, bar, began)

    def _move(self, progress: Progress, bar: TaskID, began: float) -> None:
        done, torn = len(self.run.seconds), self.run.snapshots - self.run.conserved
        told = f"{done / max(self._clock.monotonic() - began, 1e-9):.0f}/s"
        progress.update(
            bar, completed=done, told=f"{told}  NOT CONSERVED in {torn} snapshots" if torn else told
        )


def _progress(file: TextIO) -> Progress:
    """Return a bar; where the file is no terminal, its last state is one line."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ModuleNotFoundError:
        raise DemoError(
            "the bar is drawn by rich, which comes with saga[cli]; `make setup` installs it"
        ) from None
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}")
    return Progress(*columns, console=Console(file=file))

"""The contract's harness for a third party's adapter: each broker object reaches the folder by a link of its own."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote

from maildrop import MAILDROP, Maildrop
from saga.brokers.base import Broker, Capabilities
from saga.clock import SystemClock, SystemIds
from saga.testing.contract import ContractBroken, Harness

T = TypeVar("T")


class MaildropHarness(Harness):
    """A folder that the harness owns. A link that is taken away is a network that is down."""

    publish_seconds_max = 1.0
    delivery_limit = 5
    poll_seconds = 0.01
    patience_seconds = 60.0

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._root = directory / "drop"
        self._root.mkdir()
        self._links = directory / "links"
        self._links.mkdir()
        self._brokers: list[Maildrop] = []

    @property
    def capabilities(self) -> Capabilities:
        return MAILDROP

    async def connect(self, *, queue_length_max: int | None = None) -> Broker:
        link = self._links / str(len(self._brokers))
        link.symlink_to(self._root)
        broker = Maildrop(
            f"maildrop://{link}",
            clock=SystemClock(),
            ids=SystemIds(),
            spawner=self.spawner,
            poll_seconds=self.poll_seconds,
            publish_seconds_max=self.publish_seconds_max,
            delivery_limit=self.delivery_limit,
            queue_length_max=queue_length_max,
        )
        self._brokers.append(broker)
        await broker.start()
        return broker

    async def cut(self, broker: Broker) -> None:
        session = cast(Maildrop, broker).session
        assert session is not None
        (self._root / ".sessions" / session.id).unlink()

    async def part(self, broker: Broker) -> None:
        cast(Maildrop, broker).root.unlink()
        await self.cut(broker)

    async def rejoin(self, broker: Broker) -> None:
        cast(Maildrop, broker).root.symlink_to(self._root)

    async def die(self, broker: Broker) -> None:
        await self.part(broker)

    async def restart(self) -> None:
        """There is no server that could crash: every process loses its session and comes back."""
        for broker in self._brokers:
            await self.cut(broker)

    async def delete(self, channel: str) -> None:
        shutil.rmtree(self._root / quote(channel, safe=""))

    async def soon(self, what: Coroutine[Any, Any, T]) -> T:
        task = self.spawner.spawn(what, name="behaviour")
        done, _ = await asyncio.wait({task}, timeout=self.patience_seconds)
        if not done:
            task.cancel()
            raise ContractBroken("took too long")
        return task.result()

    async def settle(self) -> None:
        for _ in range(4):  # each look may let another see something
            await asyncio.sleep(self.poll_seconds)

    def unique_prefix(self) -> str:
        return "contract"

    async def clean_up(self) -> None:
        for broker in self._brokers:
            await broker.close()
        await self.spawner.close()

"""The one batcher: take what is there, bounded, never wait for company. Receiving, committing and publishing use it.

    batcher = Batcher(work, spawner=spawner, name="saga-replies", batch_max=500, held_max=10_000)
    batcher.offer(item)      # True; False if `held_max` items wait already: the caller leaves the item to its sweep
    await batcher.join()     # until everything offered so far has been worked on
    batcher.idle             # nothing waits and nothing is worked on

`work(batch)` gets 1 to `batch_max` items in the order offered. At most `workers` batches are worked on at a time (1
unless said), and one begins beside another only when `beside_min` items wait: what arrives meanwhile makes the next
batch. Items offered in one pass of the event loop travel together.
`work` deals with its own errors: one that escapes is given to `failed(batch, error)`, or logged by class, and the
next batch goes on. There is no task while there is nothing to do, so there is nothing to close.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Generic, TypeVar

from saga.clock import Spawner

T = TypeVar("T")
log: Final[logging.Logger] = logging.getLogger("saga.tasks")

BESIDE_MIN: Final = 64
"""Items that make it worth while to prepare a batch while another one is being committed."""


class Lane:
    """What several batchers share: a batch of one of them begins beside one of another as beside one of its own."""

    def __init__(self) -> None:
        self.running: int = 0
        self._batchers: list[Batcher[Any]] = []

    def join(self, batcher: Batcher[Any]) -> None:
        """Have a batcher told when a batch of another one ends."""
        self._batchers.append(batcher)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let others pass while a batch does nothing but wait, for example for a database that is away."""
        self.running -= 1
        self._wake()
        try:
            yield
        finally:
            self.running += 1

    def left(self, batcher: Batcher[Any]) -> None:
        """A batch ended: what waited for that may begin, that of another batcher first, so that none waits for long."""
        self.running -= 1
        self._batchers.remove(batcher)
        self._batchers.append(batcher)
        self._wake()

    def _wake(self) -> None:
        for waiting in list(self._batchers):
            if len(waiting):
                waiting.start()


class Batcher(Generic[T]):
    """Hands batches of whatever is there to `work`."""

    def __init__(
        self,
        work: Callable[[Sequence[T]], Awaitable[None]],
        *,
        spawner: Spawner,
        name: str,
        batch_max: int,
        held_max: int | None = None,
        workers: int = 1,
        beside_min: int = 1,
        lane: Lane | None = None,
        failed: Callable[[Sequence[T], BaseException], None] | None = None,
    ) -> None:
        self._work = work
        self._spawner = spawner
        self._name = name
        self._batch_max = batch_max
        self._held_max = held_max
        self._workers = workers
        self._beside_min = beside_min
        self._failed = failed
        self._items: deque[T] = deque()
        self._running = 0
        self._lane = lane or Lane()
        self._lane.join(self)
        self._starting = False
        self._joining: list[asyncio.Future[None]] = []

    def __len__(self) -> int:
        """Return how many items wait, without those that are worked on."""
        return len(self._items)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is worked on."""
        return not self._items and not self._running

    def offer(self, item: T) -> bool:
        """Add an item for the next batch; False, and nothing is added, if the bound is reached."""
        if self._held_max is not None and len(self._items) >= self._held_max:
            return False
        self._items.append(item)
        self.start()
        return True

    def offer_all(self, items: Iterable[T]) -> int:
        """Add items in order; return how many were taken before the bound was reached."""
        waiting = list(items)
        if self._held_max is not None:
            del waiting[max(self._held_max - len(self._items), 0) :]
        if waiting:
            self._items.extend(waiting)
            self.start()
        return len(waiting)

    async def join(self) -> None:
        """Wait until there is nothing left to do. Cancelling is safe."""
        if not self.idle:
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._joining.append(waiting)
            await waiting

    def start(self) -> None:
        """Begin a batch of what waits, unless others are under way and too little waits to go beside them."""
        # One start at a time: the task takes everything there is, and starts a neighbour only for what is left.
        if self._starting or self._running >= self._workers:
            return
        if self._lane.running and len(self._items) < self._beside_min:
            return
        self._starting = True
        self._running += 1
        self._lane.running += 1
        self._spawner.spawn(self._batch(), name=self._name)

    async def _batch(self) -> None:
        self._starting = False
        try:
            count = min(len(self._items), self._batch_max)
            batch = [self._items.popleft() for _ in range(count)]
            if self._items:
                self.start()
            if batch:
                await self._guarded(batch)
        finally:
            self._running -= 1
            self._lane.left(self)
            self._release()

    async def _guarded(self, batch: Sequence[T]) -> None:
        try:
            await self._work(batch)
        except Exception as error:
            if self._failed is None:
                log.error("%s: a batch of %d ended with %s", self._name, len(batch), type(error).__name__)
            else:
                self._failed(batch, error)

    def _release(self) -> None:
        if self.idle:
            for waiting in self._joining:
                if not waiting.done():
                    waiting.set_result(None)
            self._joining.clear()

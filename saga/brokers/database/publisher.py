"""Publishing: one transaction at a time takes all that waits, in order, and exactly one outcome for each message.

One at a time, because ids are given before the commit: of two at once the later could be seen first, and a key's
messages would be delivered out of order.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from math import inf
from typing import Final, NamedTuple

from saga.brokers.base import OutMessage, PublishOutcome
from saga.brokers.database.options import DatabaseOptions
from saga.clock import Clock, Ids, Spawner
from saga.storage.queue import QueueStore

BATCH_MAX: Final = 1_000
BATCH_BYTES_MAX: Final = 4 * 1024 * 1024
CLOSE_SECONDS: Final = 2.0

log: Final[logging.Logger] = logging.getLogger("saga.database-broker")

Outcome = asyncio.Future[PublishOutcome]


class _Waiting(NamedTuple):
    """A publish that is not committed yet."""

    message: OutMessage
    future: Outcome
    ends: float


class Publisher:
    """Puts messages into the queue, and says which channels have new ones."""

    def __init__(
        self,
        store: QueueStore,
        *,
        clock: Clock,
        ids: Ids,
        spawner: Spawner,
        options: DatabaseOptions,
        published: Callable[[Collection[str]], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids
        self._spawner = spawner
        self._options = options
        self._published = published
        self._waiting: deque[_Waiting] = deque()
        self._sending: list[_Waiting] = []
        self._bytes = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[Outcome]:
        """Return a future per message; see the port."""
        create_future = asyncio.get_running_loop().create_future
        ends = self._clock.monotonic() + self._options.publish_seconds_max
        futures: list[Outcome] = []
        for message in messages:
            future: Outcome = create_future()
            futures.append(future)
            if self._closed:
                future.set_result(PublishOutcome.UNKNOWN)
            elif not self._has_room(message):
                future.set_result(PublishOutcome.REFUSED)
            else:
                self._bytes += len(message.body)
                self._waiting.append(_Waiting(message, future, ends))
        if self._waiting and not self._tasks:
            loops = {"saga-database-publish": self._send_all(), "saga-database-bound": self._expire()}
            self._tasks = [self._spawner.spawn(loop, name=name) for name, loop in loops.items()]
        return futures

    def _has_room(self, message: OutMessage) -> bool:
        return (
            len(message.body) <= self._options.message_bytes_max
            and len(self._waiting) < self._options.pending_messages_max
            and self._bytes + len(message.body) <= self._options.pending_bytes_max
        )

    async def _send_all(self) -> None:
        failures = 0
        while self._waiting:
            self._sending = self._take()
            try:
                outcomes = await self._store.publish(
                    [each.message for each in self._sending], length_max=self._options.queue_length_max
                )
            # lint: allow broad-except because whatever it was, the messages go again or their time runs out
            except Exception as error:
                # what was lost with the connection may have been committed: a copy is the lesser evil, and the
                # participant's barrier drops it
                self._put_back()
                failures += 1
                log.warning("%d messages wait: %s", len(self._waiting), type(error).__name__)
                await self._clock.sleep(self._options.pause(failures, self._ids.fraction()))
                continue
            failures = 0
            sent, self._sending = self._sending, []
            for each, outcome in zip(sent, outcomes, strict=True):
                self._settle(each, outcome)
            self._published({each.message.channel for each in sent})
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        self._tasks = []

    def _take(self) -> list[_Waiting]:
        taken: list[_Waiting] = []
        size = 0
        while self._waiting and len(taken) < BATCH_MAX:
            size += len(self._waiting[0].message.body)
            if taken and size > BATCH_BYTES_MAX:
                break
            taken.append(self._waiting.popleft())
        return taken

    def _put_back(self) -> None:
        again, self._sending = self._sending, []
        now = inf if self._closed else self._clock.monotonic()
        for each in again:
            if each.ends <= now:
                self._settle(each, PublishOutcome.UNKNOWN)
        self._waiting.extendleft(reversed([each for each in again if each.ends > now]))

    async def _expire(self) -> None:
        """Tell those whose time is over, also while a try of theirs hangs; they are not sent after that."""
        while True:
            now = self._clock.monotonic()
            while self._waiting and self._waiting[0].ends <= now:
                self._settle(self._waiting.popleft(), PublishOutcome.UNKNOWN)
            for each in self._sending:
                if each.ends <= now and not each.future.done():
                    each.future.set_result(PublishOutcome.UNKNOWN)
            open_ = [each.ends for each in (*self._sending[:1], *list(self._waiting)[:1]) if each.ends > now]
            await self._clock.sleep(min(open_, default=now + 0.5) - now)

    def _settle(self, each: _Waiting, outcome: PublishOutcome) -> None:
        self._bytes -= len(each.message.body)
        if not each.future.done():  # its caller may have cancelled it; the send went on all the same
            each.future.set_result(outcome)

    async def close(self) -> None:
        """Publish no more; what has no outcome when the transaction under way has ended is UNKNOWN."""
        self._closed = True
        while self._waiting:
            self._settle(self._waiting.popleft(), PublishOutcome.UNKNOWN)
        if self._tasks:
            await asyncio.wait({self._tasks[0]}, timeout=CLOSE_SECONDS)
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        for each in self._sending:
            if not each.future.done():
                each.future.set_result(PublishOutcome.UNKNOWN)
        self._sending = []

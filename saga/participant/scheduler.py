"""Decides which command runs next, and how many at a time: workers, batches, and commands that must run alone.

The bound counts commands, never messages. Workers are tasks that take the next group of commands and run it; another
one is woken only while there is more to take, so handlers that never wait are run by one task in a row, without a task
each. A batch handler's commands gather in a lane while others of it run, so batches grow with the load by themselves.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from math import inf
from typing import Final

from saga.clock import Clock, Spawner
from saga.participant.attempts import Attempt
from saga.participant.served import Served
from saga.participant.threads import THREADS_MAX

LANE_BATCHES_MAX: Final = 2
"""Batches of one handler at a time: one in the database while the next one is decoded; more would only be smaller."""
COMMANDS_BETWEEN_YIELDS: Final = 64

Group = list[Attempt]


class Lane:
    """Commands that wait for one batch handler."""

    __slots__ = ("queued", "running", "served", "size", "waiting")

    def __init__(self, served: Served, size: int) -> None:
        self.served: Served = served
        self.size: int = size
        self.waiting: deque[Attempt] = deque()
        self.running: int = 0
        self.queued: bool = False


class _Queue:
    """What is ready to run, and how many groups of it run; at most `groups_max` at a time."""

    __slots__ = ("groups_max", "ready", "running")

    def __init__(self, groups_max: float) -> None:
        self.groups_max = groups_max
        self.ready: deque[Attempt | Lane] = deque()
        self.running = 0


class Scheduler:
    """The queue of commands to run and the workers that run them."""

    def __init__(
        self,
        *,
        commands_max: int,
        waiting_max: int,
        transactions_max: float,
        clock: Clock,
        spawner: Spawner,
    ) -> None:
        self._run: Callable[[Group], Awaitable[None]] | None = None
        self._commands_max = commands_max
        self._waiting_max = waiting_max
        self._clock = clock
        self._spawner = spawner
        # SQL-7: a handler with a session starts only when a connection is free for it; others need not wait for that
        self._plain = _Queue(inf)
        self._in_transaction = _Queue(transactions_max)
        # the same for threads, so that plain functions that wait for one keep no slot from those that need none
        self._in_thread = _Queue(THREADS_MAX)
        self._in_both = _Queue(min(THREADS_MAX, transactions_max))
        self._turn: deque[_Queue] = deque((self._plain, self._in_transaction, self._in_thread, self._in_both))
        self._lanes: dict[Served, Lane] = {}
        self._lone: deque[Attempt] = deque()
        self._alone = False
        self._idle: deque[asyncio.Future[None]] = deque()
        self._workers = 0
        self._waking = False
        self._stopped = False
        self._changed: list[asyncio.Future[None]] = []
        self.waiting: int = 0
        """Commands that have not started."""
        self.running: int = 0
        """Commands that have."""

    def runs(self, run: Callable[[Group], Awaitable[None]]) -> None:
        """Name what runs a group; before the first `wake`."""
        self._run = run

    # --- in

    def add(self, attempt: Attempt) -> None:
        """Queue an attempt. Nothing starts before `wake`."""
        self.waiting += 1
        if attempt.lone:
            self._lone.append(attempt)
            return
        served = attempt.served
        if served.batch is None:
            self._queue_of(served).ready.append(attempt)
            return
        lane = self._lanes.get(served)
        if lane is None:
            lane = self._lanes[served] = Lane(served, served.batch)
        lane.waiting.append(attempt)
        self._queue(lane)

    def wake(self) -> None:
        """Let a worker look for work; it wakes the next one itself."""
        if self._waking or not self._has_work():
            return
        if self._idle:
            self._waking = True
            self._idle.popleft().set_result(None)
        elif self._workers < self._commands_max:
            self._waking = True
            self._workers += 1
            self._spawner.spawn(self._work(), name="saga-participant-worker")

    async def room(self) -> None:
        """Wait until fewer commands wait than the bound allows: only then is more received."""
        while self.waiting >= self._waiting_max and not self._stopped:
            await self._change()

    # --- out

    async def stop(self) -> None:
        """Start nothing more and wait until nothing runs. What was not started is handed back by the caller."""
        self._stopped = True
        for queue in self._turn:
            queue.ready.clear()
        self._lone.clear()
        self._tell()
        while self.running:
            await self._change()
        while self._idle:
            self._idle.popleft().set_result(None)

    # --- workers

    async def _work(self) -> None:
        since_yield = 0
        run = self._run
        assert run is not None
        try:
            while not self._stopped:
                self._waking = False
                group = self._next()
                if group is None:
                    since_yield = 0
                    await self._rest()
                    continue
                self.wake()
                try:
                    await run(group)
                finally:
                    self._finished(group)
                since_yield += len(group)
                if since_yield >= COMMANDS_BETWEEN_YIELDS:
                    since_yield = 0
                    await self._clock.sleep(
                        0
                    )  # handlers that never wait must let receiving and replies go on
        finally:
            self._workers -= 1

    async def _rest(self) -> None:
        resting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idle.append(resting)
        await resting

    def _finished(self, group: Group) -> None:
        self.running -= len(group)
        first = group[0]
        self._queue_of(first.served).running -= 1
        if first.lone:
            self._alone = False
        elif first.served.batch is not None:
            lane = self._lanes[first.served]
            lane.running -= 1
            self._queue(lane)
        if self._changed:
            self._tell()

    def _has_work(self) -> bool:
        if self._stopped or self._alone:
            return False
        if self._lone:
            return self.running == 0
        return self.running < self._commands_max and self._startable() is not None

    def _startable(self) -> _Queue | None:
        for queue in self._turn:
            if queue.ready and queue.running < queue.groups_max:
                return queue
        return None

    def _queue_of(self, served: Served) -> _Queue:
        if served.threaded:
            return self._in_both if served.needs_session else self._in_thread
        return self._in_transaction if served.needs_session else self._plain

    def _next(self) -> Group | None:
        """Take the next group. P14: while a lone command waits nothing else starts, and it starts when nothing runs."""
        if self._stopped or self._alone or self.running >= self._commands_max:
            return None
        if self._lone:
            return self._lone_group()
        queue = self._startable()
        if queue is None:
            return None
        self._turn.remove(queue)
        self._turn.append(queue)  # those that were passed over because they had nothing stay first
        queue.running += 1
        item = queue.ready.popleft()
        return self._taken([item] if isinstance(item, Attempt) else self._batch(item))

    def _lone_group(self) -> Group | None:
        if self.running:
            return None
        self._alone = True
        attempt = self._lone.popleft()
        self._queue_of(attempt.served).running += 1
        return self._taken([attempt])

    def _batch(self, lane: Lane) -> Group:
        count = min(lane.size, len(lane.waiting), self._commands_max - self.running)
        group = [lane.waiting.popleft() for _ in range(count)]
        lane.queued = False
        lane.running += 1
        self._queue(lane)
        return group

    def _queue(self, lane: Lane) -> None:
        if lane.waiting and not lane.queued and lane.running < LANE_BATCHES_MAX:
            lane.queued = True
            self._queue_of(lane.served).ready.append(lane)

    def _taken(self, group: Group) -> Group:
        self.waiting -= len(group)
        self.running += len(group)
        if self._changed and self.waiting < self._waiting_max:
            self._tell()
        return group

    # --- telling those who wait

    async def _change(self) -> None:
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changed.append(waiting)
        await waiting

    def _tell(self) -> None:
        for waiting in self._changed:
            if not waiting.done():
                waiting.set_result(None)
        self._changed.clear()

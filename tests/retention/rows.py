"""Rows as old as a test wants: runs with everything that can belong to them, decisions, parked messages."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar
from uuid import UUID

from sqlalchemy import Connection, Table, func, insert, select

from saga.clock import SystemIds
from saga.definition.activity import Participant
from saga.definition.builder import Saga
from saga.definition.registry import Registry
from saga.retention.archive import Archive
from saga.retention.purge import RunPurge
from saga.storage.base import part_of
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.purging import SqlRetentionStore
from saga.uuids import first_at
from tests.coordinator.harness import Order, Receipt

T = TypeVar("T")
NAMESPACE: Final = "default"
DAY: Final = timedelta(days=1)
RETENTION: Final = 30 * DAY
OF_A_RUN: Final = (
    t.instance,
    t.history,
    t.value,
    t.incident,
    t.audit,
    t.stale_reply,
    t.pending_reply,
)
ids = SystemIds()


def run_id(age: timedelta) -> UUID:
    """An id as it was made so long ago."""
    return UUID(int=first_at(datetime.now(UTC) - age).int | ids.uuid7().int & ((1 << 80) - 1))


def saga(
    name: str = "purchase", *, version: int = 1, retention: timedelta | None = None
) -> Saga[Order, None]:
    bank = Participant("bank", start_to_close=timedelta(seconds=30))
    step = bank.contract("withdraw", Order, Receipt, compensated=True)
    return Saga(name, Order, version=version, retention=retention).step(step)


def registry(*sagas: Saga[Any, Any]) -> Registry:
    known = Registry()
    for each in sagas or (saga(),):
        known.register(each)
    return known


class Rows:
    """The tables of one database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.store = SqlRetentionStore(database, NAMESPACE)

    def runs(
        self, *sagas: Saga[Any, Any], archive: Archive | None = None, age: timedelta = RETENTION
    ) -> RunPurge:
        return RunPurge(self.store, registry(*sagas), NAMESPACE, age=age, archive=archive)

    async def run(self, work: Callable[[Connection], T]) -> T:
        return await self.database.run(work)

    async def put(self, table: Table, *values: dict[str, Any]) -> None:
        await self.run(lambda connection: connection.execute(insert(table), list(values)))

    async def count(self, table: Table) -> int:
        query = select(func.count()).select_from(table)
        return int(await self.run(lambda connection: connection.execute(query).scalar_one()))

    async def left(self) -> set[UUID]:
        """The runs that are there."""
        query = select(t.instance.c.run_id)
        return set(await self.run(lambda connection: connection.execute(query).scalars().all()))

    async def add_run(
        self,
        *,
        closed: timedelta | None = RETENTION + DAY,
        status: str | None = None,
        saga: str = "purchase",
        version: int = 1,
        namespace: str = NAMESPACE,
    ) -> UUID:
        """One run with a row in every table that can have one; it began a minute before it closed."""
        now = datetime.now(UTC)
        began = timedelta(minutes=1) + (closed if closed is not None else 400 * DAY)
        id = run_id(began)
        own = {"namespace": namespace, "run_id": id}
        at = now - (closed or timedelta(0))
        state = '{"f":1,"s":"completed","d":1,"o":null}'
        stale = {
            "direction": "forward",
            "command_id": "c",
            "attempt": 1,
            "outcome": "done",
            "received_at": at,
        }
        verb = {
            "verb": "retry",
            "actor": "a",
            "reason": "r",
            "status_before": "x",
            "status_after": "y",
            "at": at,
        }
        told = {"error": "Oops", "fingerprint": "f", "count": 1, "first_seen_at": at, "last_seen_at": at}
        instance = {
            "saga": saga,
            "saga_version": version,
            "saga_id": str(id),
            "run_number": 1,
            "version": 3,
            "status": status or ("running" if closed is None else "completed"),
            "state": state,
            "input": b'{"account":"a","amount":1,"note":"n"}',
            "result": b"null",
            "created_at": now - began,
            "closed_at": None if closed is None else at,
            "wakeup_at": at if closed is None else None,
        }
        value = {
            "step": "withdraw",
            "iteration": 0,
            "round": 0,
            "kind": "output",
            "data": b'{"reference":"r"}',
        }
        history = {"version": 1, "event": "SagaStarted", "detail": '{"status":"running"}', "at": at}

        def write(connection: Connection) -> None:
            for table, values in (
                (t.instance, instance),
                (t.history, history),
                (t.value, value),
                (
                    t.incident,
                    {"kind": "unroutable", "step": "withdraw", "saga": saga, "resolved_at": at, **told},
                ),
                (t.audit, {"request_id": ids.uuid7(), **verb}),
                (t.stale_reply, {"step": "withdraw", **stale}),
                (t.pending_reply, {"saga": saga, "saga_version": 1, "body": b"{}", "received_at": at}),
            ):
                connection.execute(insert(table).values(**own, **values))

        await self.run(write)
        return id

    async def add_unsent(self, run: UUID, *, delayed: bool = False) -> None:
        """A message of a run that the broker has not confirmed yet."""
        key, now = str(run), datetime.now(UTC)
        row = {
            "namespace": NAMESPACE,
            "part": part_of(key),
            "message_id": ids.uuid7(),
            "channel": "work",
            "ordering_key": key,
            "body": b"{}",
        }
        if delayed:
            await self.put(t.outbox_delayed, {**row, "due_at": now})
        else:
            await self.put(t.outbox, {**row, "created_at": now})

    async def add_decisions(self, *runs: UUID, namespace: str = NAMESPACE) -> None:
        """An action and its undo for each run."""
        await self.put(
            t.barrier,
            *(
                {
                    "namespace": namespace,
                    "run_id": run,
                    "step": "withdraw",
                    "iteration": 0,
                    "round": 0,
                    "direction": direction,
                    "outcome": "done",
                    "reply": b"null",
                    "decided_at": datetime.now(UTC),
                }
                for run in runs
                for direction in ("forward", "compensate")
            ),
        )

    async def decided(self) -> set[UUID]:
        """The runs of which there are decisions."""
        query = select(t.barrier.c.run_id).distinct()
        return set(await self.run(lambda connection: connection.execute(query).scalars().all()))

    async def add_parked(self, age: timedelta, *, namespace: str = NAMESPACE) -> UUID:
        id = run_id(age)
        await self.put(
            t.parked,
            {
                "id": id,
                "namespace": namespace,
                "channel": "work",
                "reason": "message_invalid",
                "fingerprint": "f",
                "content_type": "x",
                "headers": "{}",
                "body": b"?",
                "parked_at": datetime.now(UTC) - age,
            },
        )
        return id


class Kept:
    """An archive in memory, which fails when it is told to."""

    def __init__(self) -> None:
        self.runs: list[Any] = []
        self.fails = False
        self.before: Callable[[], None] = lambda: None

    async def __call__(self, runs: Sequence[Any]) -> None:
        if self.fails:
            raise OSError(28, "no space left")
        self.runs += runs

    @property
    def ids(self) -> list[UUID]:
        return [run.instance.run_id for run in self.runs]


def another_uuid() -> UUID:
    """An id that tells no time, in front of all that do."""
    return UUID(int=uuid.uuid4().int & ((1 << 90) - 1) & ~(0xF << 76) | 4 << 76)

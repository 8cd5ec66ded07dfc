"""The naive form: a hand-written saga coordinator as teams write it, and its participants, to be measured beside ours.

Per event: load the saga's row, compare-and-swap and commit, publish with the confirm awaited, ack. Per command: one
transaction, publish the reply with the confirm awaited, ack. It is decent code: one robust connection per direction,
one publishing channel whose confirms are pipelined by the handlers that run side by side, statements that SQLAlchemy
compiles once, durable quorum queues, persistent messages. What it has not is what ours is for: no outbox (a crash
between commit and publish loses the step), no redrive, no barrier (a redelivery moves the money twice), no history.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

import aio_pika
from aio_pika.abc import AbstractIncomingMessage
from sqlalchemy import JSON, Column, Integer, MetaData, Table, Text, Uuid, bindparam, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from examples.money_transfer.transfer import accounts, ledger, notifications

Data = dict[str, Any]

SERVICES: Final = {"withdraw": "savings", "deposit": "giro", "notify": "notifier"}

metadata = MetaData()
saga = Table(
    "naive_saga",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("status", Text, nullable=False),
    Column("step", Integer, nullable=False),
    Column("data", JSON, nullable=False),
)

LOAD: Final = select(saga).where(saga.c.id == bindparam("key"))
SWAP: Final = (
    update(saga)
    .where(saga.c.id == bindparam("key"), saga.c.version == bindparam("expected"))
    .values({name: bindparam(name) for name in ("version", "status", "step", "data")})
)
MOVED: Final = accounts.c.balance + bindparam("amount")
MOVE: Final = update(accounts).where(accounts.c.id == bindparam("key"), MOVED >= 0).values(balance=MOVED)
MOVE_RETURNING: Final = MOVE.returning(accounts.c.balance)
MOVED_TO: Final = select(MOVED).where(accounts.c.id == bindparam("key"), MOVED >= 0).with_for_update()


class Refused(Exception):
    """The business says no."""


class Queues(Protocol):
    """What carries the messages."""

    async def start(self) -> None: ...

    async def publish(self, name: str, body: Data) -> None:
        """Return when the message is safe."""
        ...

    async def consume(self, name: str, prefetch: int, work: Callable[[Data], Awaitable[None]]) -> None:
        """Work on up to `prefetch` messages at once; each is gone when its work is done."""
        ...

    async def stop(self) -> None: ...


class QuorumQueues:
    """Two connections, a publishing channel with confirms, and quorum queues."""

    def __init__(self, url: str, prefix: str) -> None:
        self._url = url
        self._prefix = prefix
        self._connections: list[Any] = []

    async def start(self) -> None:
        self._connections = [await aio_pika.connect_robust(self._url) for _ in range(2)]
        publishing, self._receiving = self._connections
        self._exchange = (await publishing.channel(publisher_confirms=True)).default_exchange
        channel = await self._receiving.channel()
        for name in ("replies", *SERVICES.values()):
            queue = f"{self._prefix}.{name}"
            await channel.declare_queue(queue, durable=True, arguments={"x-queue-type": "quorum"})

    async def publish(self, name: str, body: Data) -> None:
        """Return when the broker has confirmed; raises if it could not route the message."""
        persistent = aio_pika.DeliveryMode.PERSISTENT
        message = aio_pika.Message(json.dumps(body).encode(), delivery_mode=persistent)
        await self._exchange.publish(message, routing_key=f"{self._prefix}.{name}")

    async def consume(self, name: str, prefetch: int, work: Callable[[Data], Awaitable[None]]) -> None:
        """Work on up to `prefetch` messages at once; each is acked when its work is done."""
        channel = await self._receiving.channel()
        await channel.set_qos(prefetch_count=prefetch)

        async def handle(message: AbstractIncomingMessage) -> None:
            try:
                await work(json.loads(message.body))
            except Exception:
                await message.nack(requeue=True)
                raise
            await message.ack()

        await (await channel.get_queue(f"{self._prefix}.{name}")).consume(handle)

    async def stop(self) -> None:
        for connection in reversed(self._connections):
            await connection.close()


class Moved(NamedTuple):
    """What a reply has led to: the next command, or the end."""

    saga: uuid.UUID
    status: str
    command: Data | None


class Sagas:
    """The sagas of a coordinator: what becomes of a row inside a transaction, and who waits for the end."""

    def __init__(self, steps: Sequence[str]) -> None:
        self._steps = steps
        self._waiting: dict[uuid.UUID, asyncio.Future[str]] = {}

    def expect(self) -> tuple[uuid.UUID, asyncio.Future[str]]:
        """Return a new saga's id, and what will be its status at the end."""
        key = uuid.uuid4()
        ended = self._waiting[key] = asyncio.get_running_loop().create_future()
        return key, ended

    async def begin(self, on: AsyncConnection, key: uuid.UUID, data: Data) -> Data:
        """Insert a saga's row; returns its first command."""
        row = {"id": key, "version": 1, "status": "running", "step": 0, "data": {"input": data}}
        await on.execute(insert(saga), row)
        return self._command(key, 0, "running", data)

    async def advance(self, on: AsyncConnection, reply: Data) -> Moved | None:
        """Load a saga's row and swap it; returns None for a copy of a reply that was applied before."""
        key = uuid.UUID(reply["saga"])
        row = (await on.execute(LOAD, {"key": key})).one_or_none()
        if row is None or (row.status, row.step) != (reply["status"], reply["step"]):
            return None
        status, step = self._next(row.status, row.step, reply["outcome"])
        data = {**row.data, f"{row.status}.{row.step}": reply["result"]}
        changes = {"version": row.version + 1, "status": status, "step": step, "data": data}
        swapped = await on.execute(SWAP, {"key": key, "expected": row.version, **changes})
        if swapped.rowcount != 1:
            raise RuntimeError("another process moved this saga on meanwhile")
        if status in ("running", "compensating"):
            return Moved(key, status, self._command(key, step, status, row.data["input"]))
        return Moved(key, status, None)

    def end(self, moved: Moved) -> None:
        """Wake whoever waits for a saga that has ended."""
        if (waiter := self._waiting.pop(moved.saga, None)) is not None:
            waiter.set_result(moved.status)

    def _next(self, status: str, step: int, outcome: str) -> tuple[str, int]:
        if status == "running" and outcome == "done":
            return ("running", step + 1) if step + 1 < len(self._steps) else ("completed", step)
        return ("compensating", step - 1) if step > 0 else ("compensated", step)

    def _command(self, key: uuid.UUID, step: int, status: str, data: Data) -> Data:
        activity = self._steps[step]
        return {"saga": str(key), "step": step, "status": status, "activity": activity, "data": data}


async def carry_out(command: Data, on: AsyncConnection | None) -> Data:
    """Do what a command says in the transaction of `on`, or, without a database, nothing; returns the reply."""
    activity, transfer, undo = command["activity"], command["data"], command["status"] == "compensating"
    side, sign = ("source", -1) if activity == "withdraw" else ("target", 1)
    outcome, result = "done", {"account": transfer[side], "balance": 0}
    if on is not None:
        try:
            if activity == "notify":
                message = f"{transfer['amount']} cents have arrived on {transfer['target']}"
                await on.execute(insert(notifications), {"transfer": transfer["id"], "message": message})
            else:
                delta = transfer["amount"] * (-sign if undo else sign)
                result["balance"] = await _move(on, transfer, activity, side, delta)
        except Refused as error:  # before anything was written
            outcome, result = "refused", {"reason": str(error)}
    known = {name: command[name] for name in ("saga", "step", "status")}
    return {**known, "outcome": outcome, "result": result}


async def _move(on: AsyncConnection, transfer: Data, kind: str, side: str, delta: int) -> int:
    which = {"key": transfer[side], "amount": delta}
    if on.dialect.update_returning:
        balance = await on.scalar(MOVE_RETURNING, which)
    else:  # MySQL and MariaDB return nothing of an UPDATE
        balance = await on.scalar(MOVED_TO, which)
        await on.execute(MOVE, which)
    if balance is None:
        raise Refused("insufficient_funds" if side == "source" else "unknown_account")
    row = {"transfer": transfer["id"], "account": transfer[side], "kind": kind, "delta": delta}
    await on.execute(insert(ledger), row)
    return int(balance)


class Service:
    """What both processes have: queues, and a pool of connections unless they need none."""

    def __init__(self, database: str | None, queues: Queues, *, pool_size: int, prefetch: int) -> None:
        self._queues = queues
        self._prefetch = prefetch
        options = {"pool_size": pool_size, "max_overflow": 0, "pool_use_lifo": True}
        self._slots = asyncio.Semaphore(pool_size)  # the pool itself lets newcomers overtake those who wait
        self._engine: Any = create_async_engine(database, **options) if database is not None else None

    async def stop(self) -> None:
        await self._queues.stop()
        if self._engine is not None:
            await self._engine.dispose()


class Coordinator(Service):
    """Starts sagas, moves them on by their replies, and wakes whoever waits for the end."""

    def __init__(self, database: str, queues: Queues, *, steps: Sequence[str], **options: int) -> None:
        super().__init__(database, queues, **options)
        self._sagas = Sagas(steps)

    async def start(self) -> None:
        await self._queues.start()
        await self._queues.consume("replies", self._prefetch, self._on_reply)

    async def execute(self, data: Data) -> str:
        """Start a saga and wait for its end; returns its status."""
        key, ended = self._sagas.expect()
        async with self._slots, self._engine.begin() as connection:
            command = await self._sagas.begin(connection, key, data)
        await self._queues.publish(SERVICES[command["activity"]], command)
        return await ended

    async def _on_reply(self, reply: Data) -> None:
        async with self._slots, self._engine.begin() as connection:
            moved = await self._sagas.advance(connection, reply)
        if moved is None:
            return
        if moved.command is None:
            self._sagas.end(moved)
        else:
            await self._queues.publish(SERVICES[moved.command["activity"]], moved.command)


class Participant(Service):
    """Serves the three services in one process: one transaction per command, or, without a database, just an answer."""

    async def start(self) -> None:
        await self._queues.start()
        for service in SERVICES.values():
            await self._queues.consume(service, self._prefetch, self._on_command)

    async def _on_command(self, command: Data) -> None:
        if self._engine is None:
            reply = await carry_out(command, None)
        else:
            async with self._slots, self._engine.begin() as connection:
                reply = await carry_out(command, connection)
        await self._queues.publish("replies", reply)

"""A participant under test: services on one in-process broker and one database, commands in, replies out."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Column, Integer, MetaData, String, Table, Text, bindparam, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession

from saga.brokers.base import Channel, Consumer, OutMessage
from saga.brokers.memory import MEMORY, MemoryBroker, MemoryQueues
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.definition.activity import Participant
from saga.messages import Command, Reply, command_id, commands_channel, decode_replies, encode_command, pack
from saga.participant.service import ParticipantService
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.parking import SqlParkingStore
from saga.storage.sqlalchemy.participant import SqlParticipantStore
from saga.storage.sqlalchemy.tables import barrier, lone_run, parked
from tests.plugins.watch import CANARY

NAMESPACE = "default"
REPLIES = "saga.default.replies"
SECONDS_MAX = 20.0

own = MetaData()
account = Table(
    "account", own, Column("id", String(40), primary_key=True), Column("balance", Integer, nullable=False)
)
ledger = Table(
    "ledger",
    own,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("account", Text, nullable=False),
    Column("amount", Integer, nullable=False),
)


class Transfer(BaseModel):
    """Input of every activity here."""

    model_config = ConfigDict(extra="forbid")

    account: str = "alice"
    amount: int = 10
    note: str = CANARY


class Receipt(BaseModel):
    """Output of every activity here."""

    reference: str


_add = (
    update(account)
    .where(account.c.id == bindparam("b_id"))
    .values(balance=account.c.balance + bindparam("b_amount"))
)


async def move(session: AsyncSession, name: str, amount: int) -> None:
    """Change a balance by delta, with a ledger row."""
    await session.execute(_add, {"b_id": name, "b_amount": amount})
    await session.execute(insert(ledger).values(account=name, amount=amount))


def limited(seconds: float | None = 30.0) -> Participant:
    """A participant whose handlers have this `start_to_close`."""
    return Participant("accounts", start_to_close=None if seconds is None else timedelta(seconds=seconds))


def make_command(
    activity: str = "withdraw",
    *,
    direction: str = "forward",
    run_id: str | None = None,
    step: str | None = None,
    round: int = 0,
    attempt: int = 1,
    data: bytes = b'{"account":"alice","amount":10}',
    **more: Any,
) -> tuple[Command, bytes]:
    """A command and its payload; undo commands wrap the same input."""
    run = run_id or str(uuid.uuid4())
    name = step or activity
    if direction == "compensate" and not data.startswith(b'{"input"'):
        data = b'{"input":' + data + b',"output":null,"undo":null}'
    fields: dict[str, Any] = {"namespace": NAMESPACE, "replyto": REPLIES, "final": True, **more}
    command = Command(
        id=str(uuid.uuid4()),
        saga="money",
        sagaversion=1,
        sagaid="t-1",
        runid=run,
        step=name,
        activity=activity,
        round=round,
        direction=direction,  # type: ignore[arg-type]
        commandid=command_id(NAMESPACE, "money", run, name, 0, round, direction),
        attempt=attempt,
        **fields,
    )
    return command, data


def like(given: tuple[Command, bytes], **changes: Any) -> tuple[Command, bytes]:
    """Another sending of the same command: same id, other message id."""
    return replace(given[0], id=str(uuid.uuid4()), **changes), given[1]


def undo_of(given: tuple[Command, bytes], *, round: int = 0, **more: Any) -> tuple[Command, bytes]:
    """The command that undoes `given`."""
    forward = given[0]
    return make_command(
        forward.activity,
        direction="compensate",
        run_id=forward.runid,
        step=forward.step,
        round=round,
        forwarditeration=forward.iteration,
        forwardround=forward.round,
        data=given[1],
        **more,
    )


@dataclass
class Rig:
    """One broker, one database (or none), any number of services as if in processes of their own."""

    database: Database | None
    spawner: TaskSpawner
    packs: bool = True
    queues: MemoryQueues = field(default_factory=MemoryQueues)
    services: list[ParticipantService] = field(default_factory=list)
    brokers: list[MemoryBroker] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    _consumer: Consumer | None = None

    def broker(self, **options: Any) -> MemoryBroker:
        made = MemoryBroker(
            self.queues,
            clock=SystemClock(),
            ids=SystemIds(),
            spawner=self.spawner,
            capabilities=replace(MEMORY, packs_commands=self.packs),
            **options,
        )
        self.brokers.append(made)
        return made

    async def start(
        self,
        *participants: Participant,
        broker: MemoryBroker | None = None,
        database: Database | None = None,
        **options: Any,
    ) -> ParticipantService:
        """Start one more service on the shared queues; each has its own broker connection."""
        broker = broker or self.broker()
        await broker.start()
        await broker.declare([Channel(REPLIES)])
        if self._consumer is None:
            self._consumer = await self.broker().consume(REPLIES, prefetch=10_000)
        database = database or self.database
        store = SqlParticipantStore(database, NAMESPACE) if database is not None else None
        service = ParticipantService(
            participants,
            broker,
            store,
            SqlParkingStore(database, NAMESPACE) if database is not None else None,
            namespace=NAMESPACE,
            clock=options.pop("clock", SystemClock()),
            ids=SystemIds(),
            spawner=self.spawner,
            **options,
        )
        await service.start()
        self.services.append(service)
        return service

    def send(self, *commands: tuple[Command, bytes], together: bool = False, queue: str = "accounts") -> None:
        """Publish commands, each in a message of its own or all in one."""
        envelopes = [encode_command(command, data) for command, data in commands]
        bodies = [pack(envelopes)] if together else [pack([envelope]) for envelope in envelopes]
        self.send_bodies(*(body for body, _ in bodies), queue=queue)

    def send_bodies(self, *bodies: bytes, queue: str = "accounts") -> None:
        channel = commands_channel(NAMESPACE, queue)
        self.broker().publish(
            [OutMessage(channel, body, "application/json", headers={"h": "1"}) for body in bodies]
        )

    async def receive(self, count: int = 1) -> list[Reply]:
        """Return the next replies, exactly `count` of them, in the order they came."""
        assert self._consumer is not None
        async with asyncio.timeout(SECONDS_MAX):
            while len(self.replies) < count:
                for delivery in await self._consumer.receive():
                    self.replies += decode_replies(delivery.body)
                    self._consumer.ack([delivery])
        taken, self.replies = self.replies[:count], self.replies[count:]
        return taken

    async def ask(self, *commands: tuple[Command, bytes], together: bool = False) -> list[Reply]:
        """Send and return as many replies."""
        self.send(*commands, together=together)
        return await self.receive(len(commands))

    async def no_reply(self) -> bool:
        """Whether, once nothing is left to do in the queue, no reply waits."""
        await self.settled()
        assert self._consumer is not None
        return not self.replies and (await self.brokers[0].status(REPLIES)).messages == 0

    async def settled(self, queue: str = "accounts") -> None:
        """Wait until every command was acked."""
        commands = self.queues.named(commands_channel(NAMESPACE, queue))
        await until(lambda: not commands.ready and commands.held == 0)

    def unacked(self, queue: str = "accounts") -> int:
        commands = self.queues.named(commands_channel(NAMESPACE, queue))
        return len(commands.ready) + commands.held

    # --- the database

    async def rows(self, statement: Any) -> Sequence[Any]:
        assert self.database is not None
        return await self.database.run(lambda connection: connection.execute(statement).all())

    async def balance(self, name: str = "alice") -> int:
        found = await self.rows(select(account.c.balance).where(account.c.id == name))
        return int(found[0][0])

    async def moves(self) -> list[int]:
        return [row[0] for row in await self.rows(select(ledger.c.amount).order_by(ledger.c.id))]

    async def decisions(self) -> list[tuple[str, str]]:
        """Direction and outcome of every barrier row, sorted."""
        found = await self.rows(select(barrier.c.direction, barrier.c.outcome))
        return sorted((row[0], row[1]) for row in found)

    async def lone_runs(self) -> list[int]:
        return [row[0] for row in await self.rows(select(lone_run.c.runs))]

    async def parked(self) -> Sequence[Any]:
        return await self.rows(select(parked.c.reason, parked.c.body, parked.c.headers, parked.c.channel))

    async def close(self) -> None:
        for service in self.services:
            await service.stop(timedelta(seconds=5))
        for broker in self.brokers:
            await broker.close()
        await self.spawner.close()


def make_tables(connection: Any) -> None:
    """The business's tables, with two accounts of 100."""
    own.create_all(connection)
    connection.execute(insert(account), [{"id": "alice", "balance": 100}, {"id": "bob", "balance": 100}])


async def until(condition: Callable[[], bool]) -> None:
    """Wait, bounded, until something has become true."""
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():  # noqa: ASYNC110 - what is waited for is in another service's memory, or the broker's
            await asyncio.sleep(0.005)


class Gate:
    """Holds handlers until a test opens it, and tells how many arrived."""

    def __init__(self) -> None:
        self.arrived = 0
        self._open = asyncio.Event()

    async def __call__(self) -> None:
        self.arrived += 1
        await self._open.wait()

    async def reached(self, count: int = 1) -> None:
        await until(lambda: self.arrived >= count)

    def open(self) -> None:
        self._open.set()


class Statements:
    """Counts the statements that a database's engine sends, by their first word."""

    def __init__(self, database: Database) -> None:
        from sqlalchemy import event

        self.texts: list[str] = []
        engine = database.engine.sync_engine

        @event.listens_for(engine, "before_cursor_execute")
        def count(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
            self.texts.append(statement.split()[0].upper())

        @event.listens_for(engine, "commit")
        def commit(_c: Any) -> None:
            self.texts.append("COMMIT")

        @event.listens_for(engine, "rollback")
        def rollback(_c: Any) -> None:
            self.texts.append("ROLLBACK")

    def taken(self) -> list[str]:
        texts, self.texts = self.texts, []
        return texts


__all__ = ["Gate", "Receipt", "Rig", "Statements", "Transfer", "limited", "move", "text", "until"]

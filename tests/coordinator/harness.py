"""One namespace under test: real coordinators, relays, publishers and stores, on a database and a broker of a stack.

`Stack` owns database, broker and time, `Node` is what one coordinator process holds, `Scripted` plays a participant:
it decodes commands, keeps a barrier as a real one does, and answers as its script says. Time is jumped over, never
slept through: local clocks by an offset, the database's by moving every stored instant into the past.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeVar, cast
from uuid import UUID

from pydantic import BaseModel
from pydantic_core import to_json
from sqlalchemy import Connection, Select, bindparam, event, text

from devservices import Postgres
from devservices.postgres import database_name
from saga import adapters
from saga.brokers.base import (
    Broker,
    Capabilities,
    Channel,
    ChannelStatus,
    Consumer,
    OutMessage,
    PublishOutcome,
)
from saga.brokers.database import DatabaseBroker, DatabaseOptions
from saga.brokers.memory import MemoryBroker, MemoryQueues
from saga.brokers.rabbitmq import RabbitMQBroker
from saga.client import Client, Handle
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.coordinator.service import Coordinator
from saga.coordinator.verbs import Verbs
from saga.definition.builder import Saga
from saga.definition.registry import Registry
from saga.engine.model import Redrive
from saga.engine.state import CLOSED
from saga.errors import StorageUnavailable
from saga.messages import (
    Command,
    Reply,
    commands_channel,
    decode_commands,
    encode_reply,
    pack,
    parking_channel,
    replies_channel,
)
from saga.outbox.parking import Parking
from saga.outbox.publisher import CommandPublisher, DirectPublisher
from saga.outbox.queued import QueuedRows
from saga.outbox.relay import Relay
from saga.patience import Patience
from saga.storage.base import Advanced, Changes, Loaded, ParkedRow, ValueKey, Work
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.coordinator import SqlClientStore, SqlCoordinatorStore
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.operators import SqlOperatorStore
from saga.storage.sqlalchemy.outbox import SqlOutboxStore
from saga.storage.sqlalchemy.parking import SqlParkingStore
from saga.storage.sqlalchemy.recent import Known, RecentInstances
from saga.testing.clock import VirtualClock
from saga.testing.processes import DURABLE, MortalSpawner
from tests.plugins.watch import CANARY
from tests.stacks import in_file, in_queue

T = TypeVar("T")
POLL_SECONDS = 0.01
PATIENCE_SECONDS = 60.0
PATIENCE = timedelta(seconds=PATIENCE_SECONDS)
CALM_SECONDS = 0.1
"""Between a reply and the command that follows from it, on a real broker: more than it takes."""
LOOKS_MAX = 5
QUEUE = DatabaseOptions(visibility_seconds=2.0, poll_seconds=0.1)
"""Where the database is the broker: what a process held that was killed comes again after a second."""


class Order(BaseModel):
    account: str = "a"
    amount: int = 1
    note: str = CANARY


class Receipt(BaseModel):
    reference: str = "r"
    note: str = CANARY


# --- time ---------------------------------------------------------------------------------------------------------


class DatabaseClock(SystemClock):
    """What SQLite takes for its own time: the jumped wall clock. Bounds of transactions stay real."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock

    def now(self) -> datetime:
        return self._clock.now()


# --- the wire -----------------------------------------------------------------------------------------------------


@dataclass
class Weather:
    """What becomes of messages after the broker confirmed them."""

    lose: float = 0.0
    twice: bool = False
    shuffle: bool = False
    seed: int = 7
    fired: Counter[str] = field(default_factory=Counter)


class Wire:
    """A broker connection that keeps what was published, and treats it as the weather says."""

    def __init__(self, broker: Broker, weather: Weather | None = None) -> None:
        self.broker = broker
        self.sent: list[OutMessage] = []
        self.held: list[tuple[OutMessage, asyncio.Future[PublishOutcome]]] | None = None
        """A list while publishes are held back: nothing leaves, nothing is answered."""
        self.refuse: Callable[[OutMessage], PublishOutcome | None] = lambda _message: None
        self._weather = weather or Weather()
        self._chance = random.Random(self._weather.seed)
        self._later: list[OutMessage] = []

    @property
    def capabilities(self) -> Capabilities:
        return self.broker.capabilities

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        self.sent += messages
        futures = [self._publish(message) for message in messages]
        if self._weather.shuffle and self._later:
            self._chance.shuffle(self._later)
            out, self._later = self._later[:-1], self._later[-1:]  # one waits, so that copies cross batches
            self.broker.publish(out)
        return futures

    def _publish(self, message: OutMessage) -> asyncio.Future[PublishOutcome]:
        future: asyncio.Future[PublishOutcome] = asyncio.get_running_loop().create_future()
        if self.held is not None:
            self.held.append((message, future))
            return future
        outcome = self.refuse(message)
        if outcome is not None:
            future.set_result(outcome)
            return future
        if self._weather.lose and self._chance.random() < self._weather.lose:
            self._weather.fired["lose"] += 1
            future.set_result(PublishOutcome.CONFIRMED)
            return future
        if self._weather.twice:
            self._weather.fired["twice"] += 1
            self._later.append(message)
        if self._weather.shuffle:
            self._weather.fired["shuffle"] += 1
            self._later.append(message)
            future.set_result(PublishOutcome.CONFIRMED)
            return future
        [future] = self.broker.publish([message])
        return future

    def let_go(self) -> None:
        """Send what was held back, and hold no more."""
        held, self.held = self.held or [], None
        for (_, future), real in zip(held, self.broker.publish([each for each, _ in held]), strict=True):
            real.add_done_callback(partial(_pass_on, future))

    def commands(self) -> list[Command]:
        """Return every command published so far, in order."""
        return [
            command
            for message in self.sent
            if ".commands." in message.channel
            for command in decode_commands(message.body)
        ]

    async def start(self) -> None:
        await self.broker.start()

    async def declare(self, channels: Sequence[Channel]) -> None:
        await self.broker.declare(channels)

    async def consume(self, channel: str, *, prefetch: int) -> Consumer:
        return await self.broker.consume(channel, prefetch=prefetch)

    async def status(self, channel: str) -> ChannelStatus:
        return await self.broker.status(channel)

    async def close(self) -> None:
        await self.broker.close()


def _pass_on(to: asyncio.Future[PublishOutcome], done: asyncio.Future[PublishOutcome]) -> None:
    if not to.done():
        to.set_result(done.result())


# --- a participant that follows a script --------------------------------------------------------------------------


@dataclass(frozen=True)
class Act:
    """What is done about one command."""

    outcome: str = "done"
    data: Any = None
    replies: int = 1
    """0: it works, but its reply is lost. 2: the reply comes twice."""
    held: bool = False
    """The reply waits for `release`."""
    reached: bool = True
    """False: the command itself is lost."""


DONE = Act()
TWICE = Act(replies=2)
HELD = Act(held=True)
REPLY_LOST = Act(replies=0)
COMMAND_LOST = Act(reached=False)


def refuse(code: str = "no", **how: Any) -> Act:
    return Act("refused", {"code": code, "details": {"note": CANARY}}, **how)


def fail(error: str = "Oops", *, retryable: bool = True, **how: Any) -> Act:
    return Act("failed", {"error": error, "retryable": retryable, "retry_after_ms": None}, **how)


Script = Mapping[str, Sequence[Act]]
"""By `step`, `undo step`, `fence step` or `close step`, `*` for any step, `saga id: ` before it for one saga only: what
is done about the first, second, ... command; the last one repeats."""


class Scripted:
    """A participant on one queue. `ledger` is what it has really done, in order; the barrier is what it decided."""

    def __init__(
        self, broker: Broker, namespace: str, queue: str, script: Script, other: Scripted | None
    ) -> None:
        self.broker = broker
        self.namespace = namespace
        self.channel = commands_channel(namespace, queue)
        self.script = script
        self.commands: list[Command] = []
        self.ledger: list[tuple[str, str, str]] = other.ledger if other else []
        """(saga id, step, forward or compensate)."""
        self.held: list[tuple[str, bytes]] = []
        self.replies = 0
        self._barrier: dict[tuple[str, str, str], tuple[str, Any]] = other._barrier if other else {}
        self._acts: Counter[tuple[str, str]] = other._acts if other else Counter()
        self._ids = SystemIds()
        self._came = asyncio.Event()
        self._consumer: Consumer | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.broker.declare([Channel(self.channel, parking_channel(self.channel))])
        self._consumer = await self.broker.consume(self.channel, prefetch=1000)
        self._task = asyncio.create_task(self._serve(self._consumer))

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None
        if self._consumer is not None:
            await self._consumer.close()

    async def wait_commands(self, count: int) -> Sequence[Command]:
        """Return the commands once that many have come in all."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(self.commands) < count:
                self._came.clear()
                await self._came.wait()
        return self.commands

    async def wait_held(self, count: int) -> None:
        """Return once that many replies are held."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(self.held) < count:
                self._came.clear()
                await self._came.wait()

    def release(
        self, order: Callable[[list[bytes]], Sequence[bytes]] = list, *, packed: bool = False
    ) -> None:
        """Send the replies held so far, in this order; packed: as one message."""
        channels, bodies = zip(*self.held, strict=True)
        self.held.clear()
        ordered = list(order(list(bodies)))
        together = [pack(ordered)] if packed else [pack([body]) for body in ordered]
        self.replies += len(ordered)
        self.broker.publish([OutMessage(channels[0], body, kind) for body, kind in together])

    def effects(self, saga_id: str) -> list[str]:
        """Return what was done for one saga, in order: `step` or `undo step`."""
        return [
            step if direction == "forward" else f"undo {step}"
            for known, step, direction in self.ledger
            if known == saga_id
        ]

    def doubled(self) -> dict[tuple[str, str, str], int]:
        """Return every effect that happened more than once."""
        return {effect: count for effect, count in Counter(self.ledger).items() if count > 1}

    async def _serve(self, consumer: Consumer) -> None:
        while deliveries := await consumer.receive():
            out: list[OutMessage] = []
            for delivery in deliveries:
                for command in decode_commands(delivery.body):
                    out += self._take(command)
            if out:
                self.replies += len(out)
                self.broker.publish(out)
            consumer.ack(deliveries)
            self._came.set()

    def _take(self, command: Command) -> list[OutMessage]:
        self.commands.append(command)
        act = self._act(command)
        if not act.reached:
            return []
        outcome, data = self._work(command, act)
        body = self.reply(command, outcome, data)
        if act.held:
            self.held.append((command.replyto, body))
            return []
        return [OutMessage(command.replyto, *pack([body]), key=command.runid) for _ in range(act.replies)]

    def _act(self, command: Command) -> Act:
        prefix = {"forward": "", "compensate": "undo ", "fence": "fence ", "close": "close "}[
            command.direction
        ]
        name = prefix + command.step
        keys = (f"{command.sagaid}: {name}", name, prefix + "*")
        acts = next((self.script[key] for key in keys if key in self.script), (DONE,))
        place = self._acts[command.runid, name]
        self._acts[command.runid, name] += 1
        return acts[min(place, len(acts) - 1)]

    def _work(self, command: Command, act: Act) -> tuple[str, Any]:
        forward = (command.runid, command.step, "forward")
        if command.direction == "forward":
            return self._forward(command, act, forward)
        if command.direction == "close":
            undo = self._barrier.setdefault((command.runid, command.step, "compensate"), ("cancelled", None))
            return ("had_run", None) if undo[0] == "done" else ("nothing_to_undo", None)
        ran = self._barrier.setdefault(forward, ("cancelled", None))
        if command.direction == "fence":
            return ("had_run", ran[1]) if ran[0] == "done" else ("nothing_to_undo", None)
        mine = (command.runid, command.step, "compensate")
        if mine in self._barrier:
            return self._barrier[mine]
        if ran[0] != "done":
            return self._barrier.setdefault(mine, ("nothing_to_undo", None))
        if act.outcome != "done":
            return act.outcome, act.data
        self.ledger.append((command.sagaid, command.step, "compensate"))
        return self._barrier.setdefault(mine, ("done", None))

    def _forward(self, command: Command, act: Act, key: tuple[str, str, str]) -> tuple[str, Any]:
        known = self._barrier.get(key)
        if known is not None:
            return ("refused", {"code": "cancelled", "details": None}) if known[0] == "cancelled" else known
        if act.outcome == "failed":
            return "failed", act.data
        if act.outcome == "refused":
            if command.final:
                self._barrier[key] = ("refused", act.data)
            return "refused", act.data
        self.ledger.append((command.sagaid, command.step, "forward"))
        data = act.data or {"output": {"reference": f"{command.step}-1", "note": CANARY}, "undo": None}
        return self._barrier.setdefault(key, ("done", data))

    def reply(self, command: Command, outcome: str, data: Any, *, attempt: int | None = None) -> bytes:
        """Return the envelope that answers a command."""
        return encode_reply(
            Reply(
                id=str(self._ids.uuid7()),
                namespace=command.namespace,
                saga=command.saga,
                sagaid=command.sagaid,
                runid=command.runid,
                step=command.step,
                direction=command.direction,
                commandid=command.commandid,
                attempt=command.attempt if attempt is None else attempt,
                outcome=cast(Any, outcome),
            ),
            to_json(data),
        )


# --- one coordinator process --------------------------------------------------------------------------------------


@dataclass
class Batch:
    """What one call of `advance` cost and wrote."""

    size: int
    statements: list[str] = field(default_factory=list)
    commits: int = 0
    """Writing transactions; a writing statement by itself is one."""
    changes: Changes = field(default_factory=Changes)

    @property
    def rows(self) -> dict[str, int]:
        """How many rows of each kind were written."""
        kinds = {name: len(getattr(self.changes, name)) for name in Changes.__slots__}
        return {kind: count for kind, count in kinds.items() if count}


_counting: ContextVar[Batch | None] = ContextVar("counting", default=None)


def alone(connection: Connection) -> bool:
    """Whether each statement of this connection is a transaction by itself."""
    return connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"


def writes(statement: str) -> bool:
    return any(word in statement for word in ("INSERT ", "UPDATE saga", "UPDATE JSON_TABLE", "DELETE "))


class Calls:
    """What PostgreSQL has run in one database since this was made, by its own count."""

    def __init__(self, server: Postgres, url: str) -> None:
        self._server = server
        self._of = (
            "FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid "
            f"WHERE d.datname = '{database_name(url)}'"
        )
        server.execute(f"SELECT pg_stat_statements_reset(0, s.dbid, 0) {self._of} LIMIT 1")

    def like(self, pattern: str) -> int:
        """Return how often it ran statements like this."""
        counted = f"SELECT coalesce(sum(s.calls), 0)::int {self._of}"
        rows = self._server.execute(f"{counted} AND trim(s.query, E' \\n') LIKE '{pattern}'")
        return int(rows[0][0][0])


def count_statements(database: Database) -> None:
    """Note every statement and transaction of an engine in the batch that runs it."""
    sync = database.engine.sync_engine

    @event.listens_for(sync, "before_cursor_execute")
    def noted(connection: Connection, _c: Any, statement: str, _p: Any, _x: Any, _many: bool) -> None:
        batch = _counting.get()
        if batch is not None and not statement.startswith("BEGIN"):
            batch.statements.append(statement)
            if writes(statement):
                batch.commits += alone(connection)
                connection.info["wrote"] = not alone(connection)

    @event.listens_for(sync, "commit")
    def committed(connection: Connection) -> None:
        batch = _counting.get()
        if batch is not None:
            batch.commits += connection.info.pop("wrote", False)


class Kept:
    """A batch's work that keeps what it said to write."""

    def __init__(self, work: Work, batch: Batch, before: Callable[[Changes], None]) -> None:
        self._work = work
        self._batch = batch
        self._before = before

    def decide(self, loaded: Mapping[UUID, Loaded]) -> Collection[ValueKey]:
        return self._work.decide(loaded)

    def changes(self, values: Mapping[ValueKey, bytes]) -> Changes:
        self._batch.changes = self._work.changes(values)
        self._before(self._batch.changes)
        return self._batch.changes


class Recent(RecentInstances):
    """What a process guesses; nothing from before a jump, since the database's clock and ours jump one by one."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(clock)
        self._jumping = clock

    def keep(self, known: Known) -> None:
        if known.at >= self._jumping.jumped_at:
            super().keep(known)


class Store(SqlCoordinatorStore):
    """The real store; it keeps what each batch cost, and tells the test before and after each one."""

    def __init__(self, database: Database, namespace: str, recent: RecentInstances, *, queued: bool) -> None:
        super().__init__(database, namespace, recent, queued=queued)
        self.recent = recent
        self.batches: list[Batch] = []
        self.before: Callable[[Changes], None] = lambda _changes: None
        """Called with what is about to be written; a process that dies here raises CancelledError."""
        self.after: Callable[[Changes], None] = lambda _changes: None
        """Called with what was committed, before anything is acked or published."""

    async def advance(
        self, run_ids: Collection[UUID], work: Work, confirmed: Collection[int], session: Any = None
    ) -> Advanced:
        batch = Batch(len(run_ids))
        self.batches.append(batch)
        token = _counting.set(batch)
        try:
            advanced = await super().advance(run_ids, Kept(work, batch, self.before), confirmed, session)
        finally:
            _counting.reset(token)
        self.after(batch.changes)
        await asyncio.sleep(0)  # where a process that was killed there stands
        return advanced


class Node:
    """What one process with a coordinator holds. `kill` is SIGKILL: nothing is cleaned up, nothing is given back."""

    def __init__(
        self,
        stack: Stack,
        sagas: Sequence[Saga[Any, Any]],
        *,
        redrive: timedelta,
        url: str,
        weather: Weather | None,
    ) -> None:
        self.stack = stack
        self.spawner = MortalSpawner()
        first_ms = int(redrive / timedelta(milliseconds=1))
        self.registry = Registry(Redrive(first_ms, first_ms * 10))
        for saga in sagas:
            self.registry.register(saga)
        ids = SystemIds()
        ports: dict[str, Any] = {"clock": stack.clock, "spawner": self.spawner}
        # its own spawner: what a process has sent to the database goes on without it
        self.database = stack.database(url)
        broker = stack.broker(self.spawner)
        self.broker = Wire(broker, weather)
        self.outbox = SqlOutboxStore(self.database, stack.namespace)
        recent = Recent(stack.clock)
        self.store = Store(self.database, stack.namespace, recent, queued=stack.queued)
        self.publisher = DirectPublisher(self.broker, self.outbox, **ports)
        self.sender: CommandPublisher = self.publisher
        """Told of committed commands: `publisher`, or who only wakes consumers where the commit has queued them."""
        if isinstance(broker, DatabaseBroker):
            self.sender = QueuedRows(broker.wake)
        self.relay = Relay(self.broker, self.outbox, self.publisher, ids=ids, **ports)
        self.verbs = Verbs(
            self.registry,
            self.store,
            namespace=stack.namespace,
            clock=stack.clock,
            ids=ids,
            publish=self.sender.publish,
            on_closed=lambda runs: self.client.closed(runs),
        )
        self.client = Client(
            self.registry,
            SqlClientStore(self.database, stack.namespace, recent, queued=stack.queued),
            namespace=stack.namespace,
            ids=ids,
            publish=self.sender.publish,
            after_commit=lambda _session: self.relay.wake(),
            verbs=self.verbs,
            operators=SqlOperatorStore(self.database, stack.namespace),
            parking=SqlParkingStore(self.database, stack.namespace),
            resend=self.resend,
            inside_handler=lambda: False,
            **ports,
        )
        parked = SqlParkingStore(self.database, stack.namespace)
        self.parking = Parking(parked, self.broker, Patience(stack.clock, ids))
        self.coordinator = Coordinator(
            self.registry,
            self.broker,
            self.store,
            self.parking,
            self.sender,
            namespace=stack.namespace,
            ids=ids,
            on_closed=lambda runs: self.client.closed(runs),
            **ports,
        )
        self.alive = False

    async def start(self, *, coordinator: bool = True) -> Node:
        await self.broker.start()
        self.alive = True
        if coordinator:
            await self.coordinator.start()
            if not self.stack.queued:
                self.relay.start()
        else:
            await self.broker.declare(self.coordinator.channels())
        return self

    async def resend(self, row: ParkedRow) -> str:
        (sent,) = self.broker.publish(
            [OutMessage(row.channel, row.body, row.content_type, headers=row.headers)]
        )
        return str(await sent)

    def dead(self) -> bool:
        return not self.alive

    def kill(self) -> None:
        """End every task where it stands, and drop the connection to the broker."""
        self.alive = False
        self.spawner.kill()
        self.stack.drop(self.broker.broker)

    async def stop(self) -> None:
        if self.alive:
            self.alive = False
            await self.coordinator.stop(timedelta(seconds=5))
            await self.relay.stop()
            await self.publisher.close()
        await self.broker.close()
        await self.spawner.close()


class Stack:
    """A database, a broker and the time, shared by the processes of a test."""

    def __init__(self, name: str, url: str, namespace: str) -> None:
        self.name = name
        self.url = url
        self.namespace = namespace
        self.queued = in_queue(name)
        """Whether the broker is the database: what is committed there is on its way."""
        self.rabbitmq_url: str | None = None
        self.capabilities = DURABLE
        self.clock = VirtualClock(ticking=True)
        self.queues = MemoryQueues()
        self.nodes: list[Node] = []
        self.participants: list[Scripted] = []
        self.used_queues: set[str] = {"work"}
        self._spawner = TaskSpawner()
        """Runs transactions and nothing else: a process that dies has sent them off already."""
        self._wires = TaskSpawner()
        self._databases: list[Database] = []
        self._dropped: list[asyncio.Task[None]] = []
        self._own: Database | None = None

    @property
    def remote(self) -> bool:
        """Whether messages go through a server or a database, which takes real time."""
        return self.queued or self.rabbitmq_url is not None

    # --- making

    def database(self, url: str | None = None) -> Database:
        clock = DatabaseClock(self.clock) if in_file(self.name) else SystemClock()
        made = Database(url or self.url, clock=clock, ids=SystemIds(), spawner=self._spawner)
        count_statements(made)
        self._databases.append(made)
        return made

    def broker(self, spawner: TaskSpawner) -> Broker:
        if self.rabbitmq_url is not None:
            return RabbitMQBroker(self.rabbitmq_url, spawner=spawner)
        if self.queued:
            return self._database_broker(spawner)
        return MemoryBroker(self.queues, spawner=spawner, capabilities=self.capabilities)

    def _database_broker(self, spawner: TaskSpawner) -> Broker:
        """Return one with connections of its own, and with the real time, in which claims run out."""
        ports: dict[str, Any] = {"clock": SystemClock(), "ids": SystemIds()}
        database = Database(self.url, pool_size=adapters.QUEUE_POOL, spawner=self._spawner, **ports)
        self._databases.append(database)
        return DatabaseBroker(*adapters.queues_of(database), options=QUEUE, spawner=spawner, **ports)

    async def node(
        self,
        *sagas: Saga[Any, Any],
        redrive: timedelta = timedelta(seconds=30),
        url: str | None = None,
        weather: Weather | None = None,
        coordinator: bool = True,
    ) -> Node:
        """Start a process that serves these sagas; without `coordinator` only its client works."""
        made = Node(self, sagas, redrive=redrive, url=url or self.url, weather=weather)
        self.nodes.append(made)
        return await made.start(coordinator=coordinator)

    async def participant(
        self,
        script: Script | None = None,
        *,
        queue: str = "work",
        weather: Weather | None = None,
        beside: Scripted | None = None,
    ) -> Scripted:
        """Start a participant; `beside` another one it shares the database, that is ledger and barrier."""
        wire = Wire(self.broker(self._wires), weather)
        await wire.start()
        made = Scripted(wire, self.namespace, queue, script or {}, beside)
        self.used_queues.add(queue)
        self.participants.append(made)
        await made.start()
        return made

    # --- time

    async def pass_time(self, seconds: float) -> None:
        """Let time pass for everybody: local clocks, due times and ages in the database."""
        if not in_file(self.name):
            await self.run(partial(_age, seconds=seconds, held=self._held()))
        self.clock.jump(seconds)
        self.forget()

    def _held(self) -> list[int]:
        """Return the outbox rows that a living process publishes itself."""
        return [row_id for node in self.nodes if node.alive for row_id in node.publisher.in_flight]

    async def quiet(self) -> None:
        """Wait until no process is busy with the database, three looks in a row."""
        calm = 0

        def still() -> bool:
            nonlocal calm
            calm = 0 if self._spawner._tasks else calm + 1
            return calm >= 3

        await self.until(still)

    async def pass_database_time(self, seconds: float) -> None:
        """Let time pass for the database alone: what is due is not looked for yet."""
        if in_file(self.name):
            self.clock.offset += seconds
        else:
            await self.run(partial(_age, seconds=seconds, held=self._held()))
            self.forget()

    def forget(self) -> None:
        """Let every process load what it would otherwise guess: somebody wrote to the database by hand."""
        for node in self.nodes:
            node.store.recent.forget()

    async def until(
        self,
        holds: Callable[[], Any | Awaitable[Any]],
        *,
        step: float = 0.0,
        within: float = PATIENCE_SECONDS,
    ) -> None:
        """Poll until `holds()`, bounded; with `step`, that many seconds pass between two looks."""

        async def look() -> bool:
            seen = holds()
            return bool(await seen if isinstance(seen, Awaitable) else seen)

        async with asyncio.timeout(within):
            while not await look():
                await asyncio.sleep(POLL_SECONDS)
                if step:
                    await self._calm()
                    await self.pass_time(step)

    async def _calm(self) -> None:
        """Let what is on its way over a real broker arrive before time is jumped over: nobody means it to be late."""
        seen = -1
        while self.remote and seen != (seen := self._seen()):
            await asyncio.sleep(CALM_SECONDS)
            await self.quiet()

    def _seen(self) -> int:
        return sum(len(each.commands) + each.replies for each in self.participants)

    async def ended(
        self, handles: Sequence[Handle[Any]], *, step: float = 0.0, within: float = PATIENCE_SECONDS
    ) -> dict[str, str]:
        """Wait until every saga has ended and return how, by id."""
        states: dict[str, str] = {}

        async def over() -> bool:
            states.update(await self.statuses(handles))
            return len(states) == len(handles) and set(states.values()) <= CLOSED

        try:
            await self.until(over, step=step, within=within)
        except TimeoutError:
            raise AssertionError(f"not ended: {states}") from None
        return states

    async def empty(self, *tables: Any, step: float = 0.0) -> None:
        """Wait until these tables have no row."""

        async def none() -> bool:
            return not any([await self.count(table) for table in tables])

        await self.until(none, step=step)

    # --- looking

    async def statuses(self, handles: Sequence[Handle[Any]]) -> dict[str, str]:
        i = t.instance.c
        rows = await self.rows(
            t.instance.select()
            .with_only_columns(i.saga_id, i.status)
            .where(i.run_id.in_([each.run_id for each in handles]))
        )
        return {str(row[0]): str(row[1]) for row in rows}

    async def rows(self, query: Select[Any]) -> list[Any]:
        return await self.run(lambda connection: list(connection.execute(query).all()))

    async def count(self, table: Any) -> int:
        rows: int = await self.run(lambda connection: len(connection.execute(table.select()).all()))
        return rows

    async def run(self, function: Callable[[Connection], T]) -> T:
        if self._own is None:
            self._own = Database(
                self.url, clock=DatabaseClock(self.clock), ids=SystemIds(), spawner=self._spawner, pool_size=2
            )
            self._databases.append(self._own)
        for _ in range(LOOKS_MAX):
            with suppress(StorageUnavailable):  # a test may have made the bounds of its processes very short
                return await self._own.run(function)
        return await self._own.run(function)

    # --- ending

    def drop(self, broker: Broker) -> None:
        """Lose a process's connection to the broker: what it had not settled is delivered again."""
        if isinstance(broker, MemoryBroker):
            broker.sever()
        else:
            self._dropped.append(asyncio.create_task(broker.close()))

    async def close(self) -> None:
        for participant in self.participants:
            await participant.stop()
            await participant.broker.close()
        for node in self.nodes:
            await node.stop()
        if self._dropped:
            await asyncio.wait(self._dropped)
        for database in self._databases:
            await database.dispose()
        await self._spawner.close()
        await self._wires.close()

    def channels(self) -> list[str]:
        works = [
            replies_channel(self.namespace),
            *(commands_channel(self.namespace, queue) for queue in self.used_queues),
        ]
        return [*works, *map(parking_channel, works)]


def _age(connection: Connection, seconds: float, held: Sequence[int]) -> None:
    """Move every stored instant that anything waits for into the past. Rows in id order, as everybody locks them.

    Not those of outbox rows that are being published: a deletion leaves out what it finds locked (P34).
    """
    mysql = connection.dialect.name == "mysql"
    ago = "INTERVAL :by MICROSECOND" if mysql else "CAST(:by AS interval)"
    by = {"by": round(seconds * 1_000_000) if mysql else timedelta(seconds=seconds)}
    connection.execute(text("SELECT 1 FROM saga_instance WHERE closed_at IS NULL ORDER BY run_id FOR UPDATE"))
    for statement in (
        f"UPDATE saga_instance SET created_at = created_at - {ago}, wakeup_at = wakeup_at - {ago} "
        "WHERE closed_at IS NULL",
        f"UPDATE saga_lease SET expires_at = expires_at - {ago}",
        f"UPDATE saga_outbox_blocked SET next_try_at = next_try_at - {ago}",
        f"UPDATE saga_outbox_delayed SET due_at = due_at - {ago}",
    ):
        connection.execute(text(statement), by)
    free = connection.execute(text("SELECT id FROM saga_outbox ORDER BY id FOR UPDATE SKIP LOCKED")).scalars()
    if waiting := sorted(set(free) - set(held)):
        connection.execute(
            text(f"UPDATE saga_outbox SET created_at = created_at - {ago} WHERE id IN :ids").bindparams(
                bindparam("ids", expanding=True)
            ),
            by | {"ids": waiting},
        )

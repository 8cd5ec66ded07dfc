"""A whole deployment in one process, on a clock that jumps: coordinator, participants and client of a user's sagas.

    async with Environment(money_transfer, tables=metadata) as env:
        env.faults.lose_reply("withdraw")
        ended = await env.run(money_transfer, Transfer(...))
        assert ended.done == ("withdraw", "deposit")

Everything above the ports is the code of production: engine, SQL on a SQLite file of its own, the in-process broker,
the user's handlers with their sessions. Coordinator and participants are processes of their own, which faults can kill.
Time stands still, save while somebody waits for a saga; then it jumps from one instant at which something is due to the
next, so that minutes of retries take milliseconds.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar
from uuid import UUID

from sqlalchemy import URL, Connection, MetaData, bindparam, create_engine, event, func, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.util import greenlet_spawn

from saga.brokers.memory import MemoryBroker, MemoryQueues
from saga.client import Client, Handle
from saga.clock import SystemClock, SystemIds
from saga.definition.activity import Participant
from saga.definition.builder import Saga, SagaDefinition
from saga.definition.registry import Registry
from saga.engine.model import Redrive
from saga.engine.state import CLOSED, State, Status, decode_state
from saga.errors import ConfigurationError
from saga.messages import Direction, commands_channel, replies_channel
from saga.storage.sqlalchemy import schema
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.database import async_url
from saga.testing.clock import VirtualClock
from saga.testing.compiled import compile_once
from saga.testing.driver import Driver, Due, StoodStill
from saga.testing.faults import Faults
from saga.testing.faulty import Held
from saga.testing.handlers import Ledger, Stage, StandIns, participants
from saga.testing.inline import CONNECT, inline
from saga.testing.processes import NAMESPACE, MortalSpawner, Process, StayingDatabase, connections_out
from saga.testing.started import Started, started

if TYPE_CHECKING:
    from saga.settings import Settings

I = TypeVar("I")  # noqa: E741 - I for input, R for result
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")

POOL: Final = 20
DELIVERED_TURNS_MAX: Final = 60
"""Jumps in which what is still on its way must have arrived."""

COORDINATOR: Final = "coordinator"
PARTICIPANTS: Final = "participants"
CLIENT: Final = "client"


# lint: allow namespace because the database is the test's own
_DUE: Final = select(
    select(func.min(t.instance.c.wakeup_at)).scalar_subquery(),
    select(func.min(t.outbox_delayed.c.due_at)).scalar_subquery(),
    select(func.count()).select_from(t.outbox).scalar_subquery(),
)
# lint: allow namespace because the database is the test's own
_STATUS: Final = select(t.instance.c.status).where(t.instance.c.run_id == bindparam("run_id"))
_i, _n = t.instance.c, t.incident.c
_INSTANCE: Final = select(_i.status, _i.state, _i.result, _i.created_at, _i.closed_at, _i.saga_id).where(
    _i.namespace == NAMESPACE, _i.run_id == bindparam("run_id")
)
_INCIDENTS: Final = (
    select(_n.kind)
    .where(_n.namespace == NAMESPACE, _n.run_id == bindparam("run_id"), _n.resolved_at.is_(None))
    .order_by(_n.first_seen_at)
)
_OPEN: Final = (
    select(_i.run_id, _i.saga, _i.saga_version, _i.saga_id, _i.status, _i.state)
    .where(_i.namespace == NAMESPACE, _i.closed_at.is_(None))
    .order_by(_i.created_at)
)


class LeftBehind(AssertionError):
    """A test has left something behind, or its faults never struck."""


@dataclass(frozen=True, slots=True)
class Ended(Generic[R_co]):
    """How a saga stands when it has ended, or when it waits for a person."""

    saga: str
    id: str
    run_id: UUID
    status: str
    """`completed`, `compensated` or `needs_attention`."""
    result: R_co | None
    """The result, if it is completed."""
    reason: str
    """Why it turned back: what was refused, the class of what failed, or `schedule_to_close`; else empty."""
    done: tuple[str, ...]
    """What the participants did, in the order of their commits: `("withdraw", "undo withdraw")`."""
    incidents: tuple[str, ...]
    """Kinds of the open incidents."""
    took: timedelta
    """Time on the environment's clock from its start to now."""


@functools.cache
def prepared() -> bytes:
    """Return a SQLite file with our tables, made once by the migrations."""

    def fill(connection: Connection) -> None:
        schema.upgrade(connection)
        Ledger.create(connection)

    return _file(b"", fill)


@functools.lru_cache(maxsize=16)
def _with_tables(tables: tuple[tuple[MetaData, frozenset[str]], ...]) -> bytes:
    """Return the same file with a user's tables too. Their names are in the key: one may be declared later."""

    def fill(connection: Connection) -> None:
        for metadata, _ in tables:
            metadata.create_all(connection, checkfirst=len(tables) > 1)

    return _file(prepared(), fill)


def _file(content: bytes, fill: Callable[[Connection], None]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="saga-testing-") as directory:
        path = Path(directory) / "saga.db"
        path.write_bytes(content)
        engine = create_engine(f"sqlite:///{path}")
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            with engine.begin() as connection:
                fill(connection)
        finally:
            engine.dispose()
        return path.read_bytes()


class Environment:
    """A deployment of some sagas, alive inside `async with`."""

    def __init__(
        self,
        *sagas: Saga[Any, Any],
        tables: MetaData | Sequence[MetaData] = (),
        database: str | AsyncEngine | None = None,
        participants: Sequence[Participant] = (),
        stand_ins: StandIns | None = None,
        redrive: timedelta = timedelta(seconds=30),
        clock: VirtualClock | None = None,
        faults: Faults | None = None,
        strict: bool = True,
    ) -> None:
        """Serve these sagas, with the handlers of their activities.

        `tables` are made in the environment's database, a new file; `database` names another SQLite file, or is an
        engine on one. An activity that is only a contract is served by the implementation in `participants`, else by a
        stand-in, which gives the emptiest output that its type allows; `stand_ins` says what it gives instead, and
        stands in for an implementation too. A command without an answer is sent again after `redrive`.
        With `strict`, leaving raises LeftBehind if a fault never struck, or a saga or a connection was left open.
        Raises ConfigurationError, DefinitionError.
        """
        if not sagas:
            raise ConfigurationError("An environment serves at least one saga: Environment(money_transfer).")
        self.clock: VirtualClock = clock or VirtualClock()
        self.faults: Faults = faults or Faults()
        self._sagas = sagas
        self._tables = [tables] if isinstance(tables, MetaData) else list(tables)
        self._given = database
        self._redrive = redrive
        self._strict = strict
        registry = Registry(Redrive())
        self._served: list[SagaDefinition] = [registry.register(saga) for saga in sagas]
        self._stage = Stage(self.faults, lambda: self._processes[PARTICIPANTS].kill())
        self._participants = self._make_participants(participants, stand_ins or {})
        self.faults.know(
            {
                step.name: each.engine.steps[index].has_compensation
                for each in self._served
                for index, step in enumerate(each.steps)
            }
        )
        self._queues = MemoryQueues()
        self._held: list[Held] = []
        self._processes: dict[str, Process] = {}
        self._settings: list[Settings] = []
        self._reviving = 0
        self._broken: Exception | None = None
        self._sessions: list[tuple[AsyncSession, str]] = []
        self._attended: set[UUID] = set()
        self._stack = AsyncExitStack()

    def _make_participants(self, given: Sequence[Participant], stand_ins: StandIns) -> list[Participant]:
        activities = [step.activity for each in self._served for step in each.steps]
        return participants(activities, given, stand_ins, self._stage)

    # --- life -------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._stage.loop = asyncio.get_running_loop()
            url = self._place(stack)
            self._tasks = MortalSpawner()
            """Of the environment itself: who drives for the client, and processes that come back."""
            self._transactions = MortalSpawner()
            for spawner in (self._tasks, self._transactions):
                stack.push_async_callback(spawner.close)
            ports: dict[str, Any] = {
                "clock": self.clock,
                "ids": SystemIds(self.clock),
                "spawner": self._transactions,
            }
            self._database = StayingDatabase(url, **ports, pool_size=POOL)
            stack.push_async_callback(self._database.shut)
            _forget_on_power_loss(self._database.engine)
            if self._given is not None:
                await self._database.run(self._create)
            self.engine: AsyncEngine = _plain_engine(self._database.url)
            """For the test's own reading and writing, beside the handlers' sessions."""
            stack.push_async_callback(self.engine.dispose)
            self._own = MemoryBroker(self._queues, **ports)
            self._driver = Driver(self.clock, self)
            self._serving: asyncio.Task[None] | None = None
            stack.push_async_callback(self._stop)
            for role in (PARTICIPANTS, COORDINATOR, CLIENT):
                await self._raise(role)
            self._serving = self._tasks.spawn(self._drive_for_client(), name="saga-testing-client")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        problems: list[str] = []
        async with self._stack:
            if error is None and self._strict:
                problems = await self.left_behind()
        if problems:
            raise LeftBehind("\n".join(problems))

    def _place(self, stack: AsyncExitStack) -> str:
        """Return the address of the database; a new file unless one is given."""
        if self._given is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saga-testing-")))
            known = tuple((metadata, frozenset(metadata.tables)) for metadata in self._tables)
            (directory / "saga.db").write_bytes(_with_tables(known))
            return f"sqlite:///{directory / 'saga.db'}"
        url = async_url(self._given if isinstance(self._given, str) else self._given.url)
        if url.get_backend_name() != "sqlite":
            raise ConfigurationError(
                f"An environment owns its time, and {url.get_backend_name()} has a clock of its own: give it a "
                "SQLite file, or none. Tests on a server start an App."
            )
        return url.render_as_string(hide_password=False)

    def _create(self, connection: Connection) -> None:
        """Make the tables in a database that is given."""
        schema.upgrade(connection)
        Ledger.create(connection)
        for metadata in self._tables:
            metadata.create_all(connection)

    async def _raise(self, role: str) -> None:
        """Start a process, anew if it died."""
        app: dict[str, Any] = (
            {"participants": self._participants} if role == PARTICIPANTS else {"sagas": self._sagas}
        )
        # whoever starts a saga sends its first command himself; where he dies, it is the coordinator that finds it
        victim = COORDINATOR if role == CLIENT else role
        made = Process(
            self._database,
            self._queues,
            self.faults,
            self._held,
            self.clock,
            redrive=self._redrive,
            strike=lambda: self._processes[victim].kill(),
            died=self._died,
            settings=self._settings,
            **app,
        )
        self._processes[role] = made
        await made.start(coordinator=role == COORDINATOR, participants=role == PARTICIPANTS)

    def _died(self, process: Process) -> None:
        role = next(role for role, each in self._processes.items() if each is process)
        self._reviving += 1
        self._tasks.spawn(self._revive(role, process), name=f"saga-testing-revive-{role}")

    async def _revive(self, role: str, dead: Process) -> None:
        try:
            await dead.bury()
            await self._raise(role)
        except Exception as error:
            self._broken = error
        finally:
            self._reviving -= 1

    async def _stop(self) -> None:
        """End the processes where they stand: everything is over, and nobody will ask what they have left."""
        if self._serving is not None:
            self._serving.cancel()
        for process in self._processes.values():
            process.end()
        for process in self._processes.values():
            await process.bury()
        await self._own.close()

    # --- use --------------------------------------------------------------------------------------

    @property
    def client(self) -> Client:
        """The client, as the code under test gets it. While it waits for a result, time passes."""
        return self._processes[CLIENT].client

    async def run(self, saga: Saga[I, R], input: I, *, id: str | None = None) -> Ended[R]:
        """Start a saga and return how it ended: `start` followed by `ended`. Raises what these raise."""
        return await self.ended(await self.client.start(saga, input, id=id))

    async def ended(self, handle: Handle[R], *, through_attention: bool = False) -> Ended[R]:
        """Let time pass until a saga has ended or needs attention, and return how it stands.

        What was on its way at its end, late messages included, has arrived. With `through_attention` only the end
        counts: retries go on while an incident is open. Raises StoodStill if it does not end.
        """
        status = ""
        enough = CLOSED if through_attention else CLOSED | {Status.NEEDS_ATTENTION}

        async def look() -> bool | None:
            nonlocal status
            status = await self._look(lambda connection: _status(connection, handle.run_id))
            return True if status in enough else None

        await self._driver.until(
            look, told=lambda: f"saga {handle.saga} {handle.id} is {status}{self._doing()}"
        )
        if status in CLOSED:
            self._deliver(str(handle.run_id))
            await self.delivered()
        else:  # as it stands now: any time that passes may bring its next attempt
            self._attended.add(handle.run_id)
        return await self._read(handle)

    async def advance(self, by: timedelta) -> None:
        """Let so much time pass; all that is due on the way happens."""
        await self._driver.advance(by.total_seconds())

    async def delivered(self) -> None:
        """Return when no message is on its way, neither in the outbox nor in a queue; late ones stay held back."""
        turns = 0

        async def look() -> bool | None:
            nonlocal turns
            turns += 1
            if turns > DELIVERED_TURNS_MAX:
                return True  # a message that somebody holds on to, for a test of just that
            return True if self._queues_empty() and not (await self.due()).unsent else None

        await self._driver.until(look, told=lambda: f"messages are on their way{self._doing()}")

    def session(self) -> AsyncSession:
        """Return a session on the environment's database, to prepare and to check: `async with env.session() as s`."""
        session = AsyncSession(self.engine, expire_on_commit=False)
        here = inspect.currentframe()
        if here is not None and (caller := here.f_back) is not None:
            self._sessions.append((session, f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}"))
        return session

    async def started(self, session: AsyncSession) -> list[Started]:
        """Return what the session's open transaction has started: `saga.testing.started`."""
        return await started(session)

    async def still_open(self) -> list[str]:
        """Return the sagas that have not ended, as one says it to people."""
        return [told for _, told in await self._open()]

    async def parked(self) -> list[str]:
        """Return why messages were set aside, one reason for each."""
        # lint: allow namespace because the database is the test's own
        query = select(t.parked.c.reason, t.parked.c.channel).order_by(t.parked.c.parked_at)
        rows = await self._look(lambda connection: connection.execute(query).all())
        return [f"{reason} on {channel}" for reason, channel in rows]

    @property
    def tasks(self) -> set[asyncio.Task[Any]]:
        """The environment's own tasks, which end with it."""
        mine = [task for process in self._processes.values() for task in process.tasks]
        return {*mine, *self._tasks.tasks, *self._transactions.tasks}

    # --- what the driver asks ---------------------------------------------------------------------

    @property
    def under_way(self) -> bool:
        if self._broken is not None:
            raise self._broken
        return bool(
            self._reviving
            or self._transactions.tasks
            or connections_out(self._database.engine)
            or self._processes[PARTICIPANTS].threads_taken
        )

    @property
    def handling(self) -> list[str]:
        # a thread that hangs goes on while the next attempt runs, which is not to be taken for it
        return [name for name, count in self._stage.running.items() for _ in range(count)]

    async def due(self) -> Due:
        woken, delayed, unsent = await self._look(lambda connection: connection.execute(_DUE).one())
        return Due(min((at for at in (woken, delayed) if at is not None), default=None), bool(unsent))

    async def _drive_for_client(self) -> None:
        """Let time pass while the code under test waits for a result."""
        real = SystemClock()

        async def look() -> bool | None:
            return None if self.client.waiting else True

        while True:
            await real.sleep(0.005)
            if self.client.waiting:
                try:
                    await self._driver.until(look, told=lambda: f"a result is waited for{self._doing()}")
                except StoodStill as error:
                    self.client.give_up(error)

    # --- inside -----------------------------------------------------------------------------------

    def _deliver(self, run_id: str) -> None:
        """The saga has ended: what was held back of it arrives now."""
        late = [held.message for held in self._held if held.run_id == run_id]
        self._held[:] = [held for held in self._held if held.run_id != run_id]
        self._own.publish(late)

    def _queues_empty(self) -> bool:
        names = [
            replies_channel(NAMESPACE),
            *{commands_channel(NAMESPACE, step.queue) for each in self._served for step in each.steps},
        ]
        found = [queue for name in names if (queue := self._queues.find(name)) is not None]
        return not any(queue.ready or queue.held for queue in found)

    async def _look(self, read: Callable[[Connection], T]) -> T:
        # not on the coordinator's database: reading there takes the writer's turn, which a handler may hold for long
        def looked() -> T:
            with self.engine.sync_engine.connect() as connection:
                return read(connection)

        return await greenlet_spawn(looked)

    async def _read(self, handle: Handle[R]) -> Ended[R]:
        run_id = handle.run_id

        def read(connection: Connection) -> tuple[Any, Sequence[Any], tuple[str, ...]]:
            row = connection.execute(_INSTANCE, {"run_id": run_id}).one()
            incidents = connection.scalars(_INCIDENTS, {"run_id": run_id}).all()
            return row, incidents, self._stage.ledger.read(connection, str(run_id))

        row, incidents, done = await self._look(read)
        state: State = decode_state(NAMESPACE, str(run_id), row.state)
        completed = row.status == Status.COMPLETED
        return Ended(
            saga=handle.saga,
            id=row.saga_id,
            run_id=run_id,
            status=str(row.status),
            result=handle.definition.output.decode(row.result or b"null") if completed else None,
            reason="" if state.cause is None else state.cause.code,
            done=done,
            incidents=tuple(incidents),
            took=(row.closed_at or self.clock.now()) - row.created_at,
        )

    async def _open(self) -> list[tuple[UUID, str]]:
        rows = await self._look(lambda connection: connection.execute(_OPEN).all())
        return [(row.run_id, self._told(row)) for row in rows]

    def _told(self, row: Any) -> str:
        waiting = decode_state(NAMESPACE, str(row.run_id), row.state).outstanding
        steps: Mapping[Any, SagaDefinition] = {(each.name, each.version): each for each in self._served}
        definition = steps.get((row.saga, row.saga_version))
        told = f"saga {row.saga} {row.saga_id!r} is {row.status}"
        if waiting is None or definition is None:
            return told
        step = definition.steps[waiting.step].name
        undo = "" if waiting.direction == Direction.FORWARD else "the undo of "
        return f"{told}: it waits for {undo}{step}, attempt {waiting.attempt}"

    def _doing(self) -> str:
        return f"; handlers run: {', '.join(self.handling)}" if self.handling else ""

    async def left_behind(self) -> list[str]:
        """Return what stands open, and which faults never fired, as one says it to people.

        With a connection open, no more than that: its locks may hold us up.
        """
        out = connections_out(self.engine)
        if out:
            sites = [site for session, site in self._sessions if session.in_transaction()]
            where = f" (a session of {', '.join(sites)})" if sites else ""
            return [
                f"{out} connection of env.engine was left open{where}: close it, or leave `async with env.session()`."
            ]
        await self._driver.quiet()
        problems = [f"The fault {fault} never fired." for fault in self.faults.unfired()]
        for run_id, told in await self._open():
            if run_id not in self._attended:
                problems.append(f"A {told}. Wait for its end: `await env.ended(handle)`.")
        return problems


def _status(connection: Connection, run_id: UUID) -> str:
    return str(connection.scalar(_STATUS, {"run_id": run_id}))


def _plain_engine(url: URL) -> AsyncEngine:
    """Return an engine whose transactions begin at their first statement, savepoints included (LITE-1)."""
    engine = create_async_engine(inline(url), connect_args=CONNECT)
    compile_once(engine)
    _forget_on_power_loss(engine)
    return engine


def _forget_on_power_loss(engine: AsyncEngine) -> None:
    """Nobody will look at this file after a power failure: do not wait for the disk."""

    @event.listens_for(engine.sync_engine, "connect")
    def configure(raw: Any, _record: Any) -> None:
        cursor = raw.cursor()
        cursor.execute("PRAGMA synchronous=OFF")
        cursor.close()

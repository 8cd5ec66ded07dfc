"""The client: start a saga, wait for its result, look at it.

    handle = await app.client.start(money_transfer, Transfer(...), id="t-1")
    receipt = await handle.result(timeout=timedelta(seconds=30))

`start(..., session=s)` writes three rows in the caller's own transaction: the saga and the business change commit
together or not at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, NamedTuple, TypeVar
from uuid import UUID

from pydantic_core import from_json

from saga import statelog, views
from saga.batcher import BESIDE_MIN, Batcher, Lane
from saga.clock import Clock, Ids, Spawner
from saga.compensation.plan import UndoState
from saga.definition.builder import Saga, SagaDefinition
from saga.definition.registry import Registry
from saga.engine.decide import decide, initial, next_due_ms
from saga.engine.effects import Dispatch
from saga.engine.events import SagaStarted
from saga.engine.history import entry
from saga.engine.state import CLOSED, Cause, CauseKind, State, Status, decode_state
from saga.errors import (
    AlreadyClosed,
    AlreadyOpen,
    PayloadInvalid,
    ResultTimeout,
    SagaAbandoned,
    SagaCompensated,
    SagaError,
    SagaNotFound,
    SagaTerminated,
    StartConflict,
    WouldDeadlock,
)
from saga.operations import Operations, Orders, Resend, Run
from saga.outbox import commands
from saga.storage.base import (
    Changes,
    ClientStore,
    Closed,
    DeadLetterStore,
    Existing,
    HistoryRow,
    NewInstance,
    OperatorStore,
    OutboxRow,
    StoredRow,
    ValueKey,
    ValueRow,
)
from saga.views import Description

if TYPE_CHECKING:
    from saga.storage.base import CallersSession

I = TypeVar("I")  # noqa: E741 - I for input, R for result
R = TypeVar("R")

log: Final[logging.Logger] = logging.getLogger("saga.client")

ID_LENGTH_MAX: Final = 200
START_BATCH: Final = 256
POLL_SECONDS: Final = 1.0
POLL_RUNS: Final = 1_000
JUST_STARTED: Final = 0.002
"""Seconds after a start in which its end is not asked for; an end that came sooner is found by the poll's next turn."""

IfOpen = Literal["use_existing", "fail", "cancel_then_start"]
IfClosed = Literal["use_existing", "start_again", "start_again_if_not_completed", "fail"]


@dataclass(frozen=True, slots=True)
class Handle(Generic[R]):
    """One run of a saga."""

    saga: str
    id: str
    run_id: UUID
    definition: SagaDefinition
    client: Client
    started_at: float | None = None
    """Local monotonic time at which this handle's `start` made the run; None if the run may be older."""

    async def result(self, *, timeout: timedelta | None = None) -> R:
        """Wait for the end and return the result.

        Wakes at once where the coordinator runs in this process, elsewhere by a poll every second that all waiters
        of the process share. Raises SagaCompensated if the saga was rolled back, SagaTerminated or SagaAbandoned if a
        person closed it, ResultTimeout after `timeout` (None waits without end; the saga goes on either way).
        Cancelling is safe.
        """
        return await self.client.result(self, timeout=timeout)

    async def describe(self) -> Description:
        """Return status, history, plan and incidents as of the last commit. Raises SagaNotFound."""
        return await self.client.describe(self)


def _check_id(id: str, saga: str) -> None:
    if not 1 <= len(id) <= ID_LENGTH_MAX:
        raise PayloadInvalid(f"An id has 1 to {ID_LENGTH_MAX} characters.", saga=saga)
    if "\0" in id or not (id.isascii() or _encodes(id)):
        raise PayloadInvalid("An id is Unicode text without NUL and without lone surrogates.", saga=saga)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reason(cause: Cause | None) -> str:
    """Return the code of a refusal, or the class of what failed without the place that is kept with it."""
    if cause is None:
        return ""
    return cause.code.partition(" ")[0] if cause.kind is CauseKind.FAILED else cause.code


class _Rows(NamedTuple):
    """What one start writes."""

    new: NewInstance
    history: HistoryRow
    values: tuple[ValueRow, ...]
    outbox: tuple[OutboxRow, ...]


@dataclass(slots=True)
class _Start:
    """One start without a session, waiting for the commit it shares."""

    rows: _Rows
    done: asyncio.Future[bool]


def _started(rows: _Rows) -> statelog.StateChange:
    new = rows.new
    return statelog.StateChange(
        new.run_id, new.saga, new.saga_id, rows.history.event, None, None, None, None, Status(new.status), ""
    )


def _together(starts: Sequence[_Rows]) -> Changes:
    changes = Changes()
    for new, history, values, outbox in starts:
        changes.new.append(new)
        changes.history.append(history)
        changes.values.extend(values)
        changes.outbox.extend(outbox)
    return changes


class Client(Operations):
    """Starts sagas, waits for them, and does what operators do. Made by the app; one per app."""

    def __init__(
        self,
        registry: Registry,
        store: ClientStore,
        *,
        namespace: str,
        clock: Clock,
        ids: Ids,
        spawner: Spawner,
        publish: Callable[[Sequence[StoredRow]], None],
        after_commit: Callable[[Any], None],
        verbs: Orders,
        operators: OperatorStore,
        parking: DeadLetterStore,
        resend: Resend,
        inside_handler: Callable[[], bool],
        closed_here: bool = False,
        lane: Lane | None = None,
    ) -> None:
        """`lane` is shared with the coordinator of this process.

        `closed_here` says that it tells `closed` of most runs that are started here.
        """
        super().__init__(registry, operators, parking, verbs, namespace=namespace, resend=resend)
        self._store = store
        self._clock = clock
        self._ids = ids
        self._spawner = spawner
        self._publish = publish
        self._after_commit = after_commit
        self._inside_handler = inside_handler
        self._closed_here = closed_here
        self._starts: Batcher[_Start] = Batcher(
            self._commit,
            batch_max=START_BATCH,
            spawner=spawner,
            name="saga-start",
            beside_min=BESIDE_MIN,
            lane=lane,
        )
        self._waiting: dict[UUID, list[asyncio.Future[Closed]]] = {}
        self._asked: set[UUID] = set()
        self._poll: asyncio.Task[None] | None = None

    # --- start --------------------------------------------------------------------------------

    async def start(
        self,
        saga: Saga[I, R],
        input: I,
        *,
        id: str | None = None,
        session: CallersSession | None = None,
        if_open: IfOpen = "use_existing",
        if_closed: IfClosed = "use_existing",
    ) -> Handle[R]:
        """Start a saga, once per id, and return its handle.

        Durable when it returns, or with the caller's commit if `session` is given (an AsyncSession, a Session, or a
        connection of either): instance, first history row and first command are then three inserts in that
        transaction, nothing is sent before its commit and nothing is left after its rollback. A duplicate id never
        aborts the caller's transaction. Starts without a session that come at the same time share one commit.

        `id` is the business key: 1 to 200 characters, compared as bytes; the run id unless given. For an id that was
        started before, `if_open` and `if_closed` decide. Raises StartConflict (same id, other input), AlreadyOpen,
        AlreadyClosed, PastPivot (`cancel_then_start`), PayloadInvalid, PayloadTooLarge, UnknownSaga, WrongDatabase,
        WouldDeadlock, StorageUnavailable (unknown: repeat it with the same id).
        """
        definition = self._registry.require(saga.name, saga.version)
        raw = definition.input.encode(input, what=f"input of saga {saga.name!r}")
        return await self._start_once(definition, raw, id, session, if_open, if_closed)

    async def start_json(self, saga: str, raw: bytes, *, id: str | None = None) -> Handle[Any]:
        """Start the latest version of a saga by name, with its input as JSON; else as `start`."""
        definition = self._registry.latest(saga)
        input = definition.input.decode(raw, what=f"input of saga {saga!r}")
        raw = definition.input.encode(input, what=f"input of saga {saga!r}")
        return await self._start_once(definition, raw, id, None, "use_existing", "use_existing")

    async def _start_once(
        self,
        definition: SagaDefinition,
        raw: bytes,
        id: str | None,
        session: CallersSession | None,
        if_open: IfOpen,
        if_closed: IfClosed,
    ) -> Handle[Any]:
        name = definition.name
        if session is None and self._inside_handler():
            raise WouldDeadlock(
                "Pass session=, so that the start joins the handler's transaction.", saga=name
            )
        run_id = self._ids.uuid7()
        saga_id = str(run_id) if id is None else id
        _check_id(saga_id, name)
        run_number = 1
        while True:
            rows = self._new(definition, run_id, saga_id, run_number, raw)
            if await self._insert(session, rows):
                return Handle(name, saga_id, run_id, definition, self, self._clock.monotonic())
            existing = await self._store.find(session, name, saga_id)
            if existing is None:
                continue
            if await self._use(session, existing, name, saga_id, raw, if_open, if_closed):
                return Handle(name, saga_id, existing.run_id, definition, self)
            run_number = existing.run_number + 1

    async def execute(
        self, saga: Saga[I, R], input: I, *, id: str | None = None, timeout: timedelta | None = None
    ) -> R:
        """Start and wait: `start` followed by `result`."""
        handle = await self.start(saga, input, id=id)
        return await handle.result(timeout=timeout)

    def handle(self, saga: Saga[Any, R], run_id: UUID, *, id: str = "") -> Handle[R]:
        """Return a handle of a run that is known by its run id."""
        return Handle(saga.name, id, run_id, self._registry.require(saga.name, saga.version), self)

    async def find(self, saga: Saga[Any, R], id: str) -> Handle[R]:
        """Return a handle of the latest run of an id. Raises SagaNotFound."""
        existing = await self._store.find(None, saga.name, id)
        if existing is None:
            raise SagaNotFound(saga=saga.name, saga_id=id)
        return self.handle(saga, existing.run_id, id=id)

    async def _use(
        self,
        session: Any,
        existing: Existing,
        saga: str,
        saga_id: str,
        raw: bytes,
        if_open: IfOpen,
        if_closed: IfClosed,
    ) -> bool:
        """Return whether the existing run is the answer; otherwise a new run follows it."""
        is_open = existing.status not in CLOSED
        policy: str = if_open if is_open else if_closed
        if policy == "start_again_if_not_completed":
            policy = "use_existing" if existing.status == Status.COMPLETED else "start_again"
        if policy == "use_existing":
            if existing.input != raw:
                raise StartConflict(saga=saga, saga_id=saga_id)
            return True
        if policy == "fail":
            raise (AlreadyOpen if is_open else AlreadyClosed)(saga=saga, saga_id=saga_id)
        if policy == "cancel_then_start":
            await self.cancel(
                existing.run_id, actor="client.start", reason="cancel_then_start", session=session
            )
            now = await self._store.find(session, saga, saga_id)
            if now is not None and now.run_id == existing.run_id and now.status == Status.COMPLETED:
                # it had ended between the look and the cancel: there was nothing left to cancel
                return await self._use(session, now, saga, saga_id, raw, if_open, if_closed)
        return False

    def _new(
        self, definition: SagaDefinition, run_id: UUID, saga_id: str, run_number: int, raw: bytes
    ) -> _Rows:
        """Return the rows of a new instance: the engine decides the first step like any other."""
        before = initial(self._namespace, str(run_id))
        event = SagaStarted(at_ms=0)
        state, effects = decide(definition.engine, before, event)
        values: tuple[ValueRow, ...] = ()
        outbox: tuple[OutboxRow, ...] = ()
        for effect in effects:
            if isinstance(effect, Dispatch):
                data, made = commands.payload(definition, run_id, effect, raw, {})
                values += (made,) if made is not None else ()
                outbox += (
                    commands.outbox_row(
                        self._namespace, definition, state.run_id, saga_id, effect, data, self._ids.uuid7()
                    ),
                )
        new = NewInstance(
            run_id,
            definition.name,
            definition.version,
            saga_id,
            run_number,
            state.status,
            state.encode(),
            raw,
            next_due_ms(definition.engine, state, 0),
            None,
        )
        line = entry(event, definition.engine, before, state, effects)
        return _Rows(new, HistoryRow(run_id, 1, *line), values, outbox)

    async def _insert(self, session: Any, rows: _Rows) -> bool:
        if session is not None:
            inserted = rows.new.run_id in await self._store.start_in(session, _together([rows]))
            if inserted:
                # P19: the event only wakes the relay, which reads the rows on a connection of its own
                self._after_commit(session)
            return inserted
        start = _Start(rows, asyncio.get_running_loop().create_future())
        self._starts.offer(start)
        return await start.done

    async def _commit(self, starts: Sequence[_Start]) -> None:
        """One commit for the starts that are there; then publish from memory."""
        try:
            inserted, rows = await self._store.start(_together([start.rows for start in starts]))
        except Exception as error:
            if len(starts) > 1 and not isinstance(error, SagaError):
                for start in starts:  # one of them cannot be written: each on its own tells which
                    await self._commit([start])
                return
            for start in starts:
                if not start.done.done():
                    start.done.set_exception(error)
            return
        for start in starts:
            if not start.done.done():
                start.done.set_result(start.rows.new.run_id in inserted)
        if statelog.all_wanted():
            statelog.tell(self._namespace, (_started(start.rows) for start in starts if start.done.result()))
        self._publish(rows)

    # --- waiting ------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """How many runs somebody waits for."""
        return len(self._waiting)

    def closed(self, runs: Sequence[Closed]) -> None:
        """Runs were closed by this process: wake their waiters at once."""
        for run in runs:
            for waiter in self._waiting.pop(run.run_id, ()):
                if not waiter.done():
                    waiter.set_result(run)

    async def result(self, handle: Handle[R], *, timeout: timedelta | None = None) -> R:
        """Wait for the end of a run and return its result: `handle.result()`, and raises what that raises."""
        waiter: asyncio.Future[Closed] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(handle.run_id, []).append(waiter)
        if self._tells_end(handle):
            self._asked.add(handle.run_id)  # the poll's next turn is early enough
        else:
            self._asked.discard(handle.run_id)  # it may have ended since it was last asked for
        if self._poll is None:
            self._poll = self._spawner.spawn(self._poll_closed(), name="saga-results")
        try:
            if timeout is None:
                run = await waiter
            else:
                async with asyncio.timeout(timeout.total_seconds()):
                    run = await waiter
        except TimeoutError:
            raise ResultTimeout(saga=handle.saga, saga_id=handle.id) from None
        finally:
            if not waiter.done() or waiter.cancelled():
                self._forget(handle.run_id, waiter)
        result: R = await self._outcome(handle, run)
        return result

    def _tells_end(self, handle: Handle[Any]) -> bool:
        """Whether the end is still to come and will be told: it was started this moment and is closed here."""
        started_at = handle.started_at
        return (
            self._closed_here
            and started_at is not None
            and self._clock.monotonic() - started_at < JUST_STARTED
        )

    def _forget(self, run_id: UUID, waiter: asyncio.Future[Closed]) -> None:
        waiters = self._waiting.get(run_id, [])
        if waiter in waiters:
            waiters.remove(waiter)
        if not waiters:
            self._waiting.pop(run_id, None)

    async def _poll_closed(self) -> None:
        """Ask for all waiters at once, a second apart; the first time at once, for what had ended before."""
        turn_at = self._clock.monotonic() + POLL_SECONDS
        try:
            while self._waiting:
                if self._clock.monotonic() >= turn_at:
                    self._asked, turn_at = set(), self._clock.monotonic() + POLL_SECONDS
                fresh = sorted(self._waiting.keys() - self._asked)[:POLL_RUNS]
                self._asked.update(fresh)
                try:
                    self.closed(await self._store.read_closed(fresh) if fresh else ())
                except SagaError as error:
                    log.warning("results wait: %s", error.code)
                await self._clock.sleep(POLL_SECONDS / 10)
        except Exception as error:
            self.give_up(error)
            raise
        except asyncio.CancelledError:
            self.give_up(ResultTimeout("The app was stopped while this was waited for; the saga goes on."))
            raise
        finally:
            self._poll, self._asked = None, set()

    def give_up(self, error: Exception) -> None:
        """Nobody asks any more: tell those who wait, instead of leaving them there for ever."""
        waiting, self._waiting = self._waiting, {}
        for waiter in (each for waiters in waiting.values() for each in waiters):
            if not waiter.done():
                waiter.set_exception(error)

    async def _outcome(self, handle: Handle[Any], run: Closed) -> Any:
        if run.status == Status.COMPLETED:
            return handle.definition.output.decode(run.result or b"null", what="result")
        state = decode_state(self._namespace, str(run.run_id), run.state)
        if run.status == Status.COMPENSATED:
            raise await self._compensated(handle, state)
        ended = SagaTerminated if run.status == Status.TERMINATED else SagaAbandoned
        raise ended(saga=handle.saga, saga_id=handle.id)

    async def _compensated(self, handle: Handle[Any], state: State) -> SagaCompensated:
        steps = handle.definition.steps
        cause = state.cause
        step = steps[cause.step].name if cause is not None and cause.step is not None else None
        details: Any = None
        if step is not None and cause is not None and cause.kind in (CauseKind.REFUSED, CauseKind.FAILED):
            key = ValueKey(handle.run_id, step, 0, 0, commands.said_kind("forward", cause.attempt))
            said = (await self._store.read_values([key])).get(key)
            details = None if said is None else from_json(said)
            if cause.kind is CauseKind.REFUSED and isinstance(details, dict):
                details = details.get("details")
        undone = tuple(steps[undo.step].name for undo in state.plan if undo.state is UndoState.COMPENSATED)
        return SagaCompensated(
            saga=handle.saga,
            step=step,
            saga_id=handle.id,
            reason=_reason(cause),
            details=details,
            undone=undone,
        )

    # --- looking ------------------------------------------------------------------------------

    async def describe_run(self, run: Run) -> Description:
        """Return a run as of the last commit. Raises SagaNotFound, UnknownSaga."""
        run_id = run if isinstance(run, UUID) else run.run_id
        row = await self._store.describe(run_id)
        if row is None:
            raise SagaNotFound()
        return views.describe(row, self._registry.require(row.saga, row.saga_version), self._namespace)

    async def describe(self, handle: Handle[Any]) -> Description:
        """Return an instance as of the last commit. Raises SagaNotFound.

        One whose state this release cannot read is described without its step and plan.
        """
        row = await self._store.describe(handle.run_id)
        if row is None:
            raise SagaNotFound(saga=handle.saga, saga_id=handle.id)
        return views.describe(row, handle.definition, self._namespace)

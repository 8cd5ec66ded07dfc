"""One batch in memory: decide for every instance, then say what to write. No I/O; run again if its commit is.

A saga that cannot be advanced (its code or data raise) is set apart: it gets an incident, what came for it is kept
beside it, and its neighbours go on (P9).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from uuid import UUID

from pydantic_core import to_json

from saga.clock import Ids
from saga.coordinator.arrivals import Arrival, ReplyArrival, TimerArrival, VerbArrival
from saga.coordinator.redrive import RedriveBudget
from saga.definition.builder import SagaDefinition
from saga.definition.refs import SAGA_INPUT
from saga.definition.registry import Registry
from saga.engine.decide import decide, next_due_ms
from saga.engine.effects import (
    Dispatch,
    Effect,
    Finish,
    IncidentKind,
    RaiseIncident,
    RecordStale,
    ResolveIncidents,
)
from saga.engine.events import Event
from saga.engine.history import HistoryEntry, entry
from saga.engine.state import State, Status, decode_state
from saga.engine.verbs import Moved, Verb, standing
from saga.errors import PastPivot, VerbNotAllowed
from saga.messages import NULL, Reply, encode_reply
from saga.outbox import commands
from saga.statelog import ONWARD, StateChange, all_wanted
from saga.storage.base import (
    AuditRow,
    Changes,
    Closed,
    HistoryRow,
    IncidentRow,
    Loaded,
    MovedRow,
    PendingRow,
    StaleRow,
    ValueKey,
    ValueRow,
)

log: Final[logging.Logger] = logging.getLogger("saga.coordinator")

DEFER_MS: Final = 30_000
"""How far the wake-up of an instance moves whose resend had to wait for the redrive budget."""


T = TypeVar("T")


class Unwritable(Exception):
    """The instance's transition was refused by the database."""


@dataclass(slots=True)
class _Run:
    """One instance within the batch."""

    loaded: Loaded
    definition: SagaDefinition
    before: State
    state: State
    version: int
    rows: list[tuple[list[Any], Any]] = field(default_factory=list)
    """Rows to write, each with the list of the batch that it goes to if the instance's part succeeds as a whole."""
    dispatches: tuple[Dispatch, ...] = ()
    finished: bool = False
    own: tuple[ValueRow, ...] = ()
    """Payloads that arrived in this batch."""
    deferred: bool = False
    broker_forgot: bool = False
    answered: bool = False
    woken: bool = False

    @property
    def set_apart(self) -> bool:
        """Whether the instance was set apart: its row says that it needs attention, its state does not."""
        return (
            self.loaded.status == Status.NEEDS_ATTENTION and self.before.status is not Status.NEEDS_ATTENTION
        )

    def add(self, into: list[T], row: T) -> None:
        """Have a row written."""
        self.rows.append((into, row))


class BatchWork:
    """`Work` of one batch of arrivals."""

    def __init__(
        self,
        namespace: str,
        registry: Registry,
        arrivals: Sequence[Arrival],
        *,
        ids: Ids,
        budget: RedriveBudget,
        monotonic: float,
        poison: str | None = None,
    ) -> None:
        self.namespace = namespace
        self.arrivals = arrivals
        self.closed: list[Closed] = []
        """Runs that this batch closed."""
        self.unknown: list[ReplyArrival] = []
        """Replies for runs that this namespace does not know; the caller parks them."""
        self.contrary: list[ReplyArrival] = []
        """Replies that bear the id of an outstanding command and say that they are for another; parked as well."""
        self.rejected: dict[UUID, PastPivot | VerbNotAllowed] = {}
        """Verbs that were refused, by request id."""
        self.state_changes: list[StateChange] = []
        """What to tell after the commit."""
        self.missing: set[UUID] = set()
        """Runs that are not there."""
        self.unserved: dict[UUID, Loaded] = {}
        """Instances of versions that this process lacks."""
        self.due_in_ms: int | None = None
        """Shortest time until an instance of this batch is due."""
        self.windows: set[str] = set()
        """Crash points that its commit opens: written, with nothing published and nothing acked yet."""
        self._tells_all = all_wanted()
        self._registry = registry
        self._ids = ids
        self._budget = budget
        self._monotonic = monotonic
        self._poison_reason = poison
        """Set when an earlier try to commit these arrivals failed for this reason: set them apart unseen."""
        self._runs: dict[UUID, _Run] = {}
        self._changes = Changes()

    @property
    def run_ids(self) -> set[UUID]:
        """The instances that this batch touches."""
        return {arrival.run_id for arrival in self.arrivals}

    # --- first half: decide -------------------------------------------------------------------

    def decide(self, loaded: Mapping[UUID, Loaded]) -> Collection[ValueKey]:
        """Move every instance in memory; return the payloads that writing needs."""
        self.closed, self.unknown, self.rejected, self._runs = [], [], {}, {}
        self._changes, self.due_in_ms, self.missing, self.windows = Changes(), None, set(), set()
        self.unserved = {}
        self.state_changes, self.contrary = [], []
        poisoned: set[UUID] = set()
        for arrival in self.arrivals:
            row = loaded.get(arrival.run_id)
            if row is None:
                self.missing.add(arrival.run_id)
                if isinstance(arrival, ReplyArrival):
                    self.unknown.append(arrival)
                continue
            definition = self._registry.get(row.saga, row.saga_version)
            if definition is None:
                self.unserved[row.run_id] = row
                self._keep(row, arrival)
                continue
            if arrival.run_id in poisoned:
                continue
            try:
                if self._poison_reason is not None:
                    raise Unwritable(self._poison_reason)
                self._apply(self._run(row, definition), arrival)
            except Exception as error:
                poisoned.add(arrival.run_id)
                self._runs.pop(arrival.run_id, None)
                self._set_apart(row, definition, error)
        keys: set[ValueKey] = set()
        for run in self._runs.values():
            if needs := self._needs(run):
                keys |= needs.difference([row.key for row in run.own])
        return keys

    def _run(self, row: Loaded, definition: SagaDefinition) -> _Run:
        known = self._runs.get(row.run_id)
        if known is None:
            state = decode_state(self.namespace, str(row.run_id), row.state)
            known = self._runs[row.run_id] = _Run(row, definition, state, state, row.version)
        return known

    def _apply(self, run: _Run, arrival: Arrival) -> None:
        if isinstance(arrival, ReplyArrival) and not _agrees(run, arrival.reply):
            self.contrary.append(arrival)
            return
        event = self._event(run, arrival)
        try:
            state, effects = decide(run.definition.engine, run.state, event)
        except (PastPivot, VerbNotAllowed) as refusal:
            if isinstance(arrival, VerbArrival):
                self.rejected[arrival.request_id] = refusal
            return
        stale = len(effects) == 1 and isinstance(effects[0], RecordStale)
        if isinstance(arrival, ReplyArrival):
            run.answered = True
            self._note_reply(run, arrival, stale)
        elif isinstance(arrival, TimerArrival):
            run.woken = True
            run.deferred = state is run.state
            run.broker_forgot = arrival.broker_forgot
        elif isinstance(arrival, VerbArrival):
            run.add(self._changes.audit, _audit(arrival, run, state))
        if state is run.state:
            return
        line = entry(event, run.definition.engine, run.state, state, effects)
        run.version += 1
        run.add(self._changes.history, HistoryRow(run.loaded.run_id, run.version, *line))
        if self._tells_all or state.status not in ONWARD:
            run.add(self.state_changes, _change(run, event, line, state))
        run.state = state
        for effect in effects:
            self._carry_out(run, effect)

    def _event(self, run: _Run, arrival: Arrival) -> Event:
        now_ms = run.loaded.now_ms
        if isinstance(arrival, ReplyArrival):
            return arrival.event(now_ms)
        if isinstance(arrival, TimerArrival):
            return arrival.event(now_ms, self._may_resend(run))
        return arrival.event(now_ms, run.set_apart)

    def _may_resend(self, run: _Run) -> bool:
        if run.state.outstanding is None:
            return True
        queue = run.definition.steps[run.state.outstanding.step].queue
        return self._budget.may_resend(queue, run.loaded.run_id, self._monotonic)

    def _note_reply(self, run: _Run, arrival: ReplyArrival, stale: bool) -> None:
        reply, run_id = arrival.reply, arrival.run_id
        if arrival.pending_id is not None:
            run.add(self._changes.taken, (run_id, arrival.pending_id))
        if stale:
            run.add(
                self._changes.stale,
                StaleRow(run_id, reply.step, reply.direction, reply.commandid, reply.attempt, reply.outcome),
            )
            return
        for kind, data in _kept(reply):
            key = ValueKey(run_id, reply.step, reply.iteration, reply.round, kind)
            row = ValueRow(key, data)
            run.own += (row,)
            run.add(self._changes.values, row)

    def _carry_out(self, run: _Run, effect: Effect) -> None:
        run_id, definition = run.loaded.run_id, run.definition
        match effect:
            case Dispatch():
                run.dispatches += (effect,)
                if effect.resend and not run.broker_forgot:
                    # what a forgetful broker lost was never sent as far as the destination knows (P4)
                    self._budget.resent(definition.steps[effect.step].queue, self._monotonic)
            case Finish():
                run.finished = True
            case RaiseIncident(kind=kind, step=step, error=error):
                run.add(
                    self._changes.incidents,
                    incident(run_id, definition.name, kind, definition.steps[step].name, error),
                )
            case ResolveIncidents(step=step):
                run.add(self._changes.resolved, (run_id, definition.steps[step].name))
            case RecordStale():
                pass

    def _needs(self, run: _Run) -> set[ValueKey]:
        keys: set[ValueKey] = set()
        for dispatch in run.dispatches:
            keys |= commands.needed(run.definition, run.loaded.run_id, dispatch)
        if run.finished and run.state.status is Status.COMPLETED:
            keys |= commands.output_keys(run.loaded.run_id, run.definition.result_needs)
        return keys

    def moved(self, run_id: UUID) -> Moved | None:
        """Return what was decided for an instance; None if it was set apart."""
        run = self._runs.get(run_id)
        if run is None:
            return None
        sent = run.dispatches[-1] if run.dispatches else None
        sends = f"{run.definition.steps[sent.step].name} {sent.direction}" if sent is not None else None
        before = run.loaded.status if run.set_apart else run.before.status
        return Moved(str(before), str(run.state.status), sends)

    # --- second half: write -------------------------------------------------------------------

    def changes(self, values: Mapping[ValueKey, bytes]) -> Changes:
        """Return what to write, every instance's part whole or, if writing it raises, not at all."""
        for run in self._runs.values():
            try:
                self._write(run, {**values, **dict(run.own)} if values else dict(run.own))
            except Exception as error:
                self._set_apart(run.loaded, run.definition, error)
                continue
            for into, row in run.rows:
                into.append(row)
        return self._changes

    def _write(self, run: _Run, values: Mapping[ValueKey, bytes]) -> None:
        if run.state is run.before:
            if run.deferred:
                run.add(self._changes.woken, (run.loaded.run_id, self._deferred_ms(run)))
            return
        # Of several commands in one batch at most one is outstanding; the others were answered or given up. If it was
        # sent twice within the batch, the first sending counts: it is the one that makes the step's input (P32).
        waiting = run.state.outstanding
        for dispatch in run.dispatches:
            if waiting is not None and (dispatch.command_id, dispatch.attempt) == (
                waiting.command_id,
                waiting.attempt,
            ):
                self._dispatch(run, dispatch, values)
                break
        if run.woken or run.state.plan is not run.before.plan:
            self.windows |= _windows(run)
        result: bytes | None = None
        state = run.state.encode()
        if run.finished:
            if run.state.status is Status.COMPLETED:
                result = self._result(run, values)
            self.closed.append(Closed(run.loaded.run_id, run.state.status, result, state))
        run.add(
            self._changes.moved,
            MovedRow(
                run.loaded.run_id,
                run.loaded.version,
                run.loaded.status,
                run.version,
                run.state.status,
                state,
                self._wakeup_ms(run),
                result,
            ),
        )
        if run.loaded.status == Status.NEEDS_ATTENTION:
            # if it was set apart, what held it is mended, and its row has the status of its state again
            run.add(self._changes.mended, run.loaded.run_id)

    def _dispatch(self, run: _Run, dispatch: Dispatch, values: Mapping[ValueKey, bytes]) -> None:
        run_id, definition = run.loaded.run_id, run.definition
        data, made = commands.payload(definition, run_id, dispatch, run.loaded.input, values)
        if made is not None:
            run.add(self._changes.values, made)
        run.add(
            self._changes.outbox,
            commands.outbox_row(
                self.namespace,
                definition,
                run.state.run_id,
                run.loaded.saga_id,
                dispatch,
                data,
                self._ids.uuid7(),
            ),
        )

    def _result(self, run: _Run, values: Mapping[ValueKey, bytes]) -> bytes:
        outputs = {
            name: values.get(ValueKey(run.loaded.run_id, name, 0, 0, commands.OUTPUT), NULL)
            for name in run.definition.result_needs
        }
        return run.definition.result({SAGA_INPUT: run.loaded.input, **outputs})

    def _wakeup_ms(self, run: _Run) -> int | None:
        """Keep a stored wake-up that comes no later than needed: moving it would write an index entry each time."""
        due = next_due_ms(run.definition.engine, run.state, run.loaded.now_ms)
        if due is None:
            return None
        if self.due_in_ms is None or due - run.loaded.now_ms < self.due_in_ms:
            self.due_in_ms = max(due - run.loaded.now_ms, 0)
        stored = run.loaded.wakeup_ms
        return stored if stored is not None and run.loaded.now_ms < stored <= due else due

    def _deferred_ms(self, run: _Run) -> int:
        """A wake-up that found nothing to do moves to the true due time, or past the redrive budget's window."""
        due = next_due_ms(run.definition.engine, run.state, run.loaded.now_ms)
        now = run.loaded.now_ms
        return due if due is not None and due > now else now + DEFER_MS

    # --- setting apart ------------------------------------------------------------------------

    def _set_apart(self, row: Loaded, definition: SagaDefinition, error: Exception) -> None:
        """P9, I3: an incident of its own, the row's status, a later wake-up, and all that came for it kept beside it.

        The state stays as it is, whatever is wrong with it; so does the version, and there is no line of history.
        """
        reason = str(error) if isinstance(error, Unwritable) else type(error).__name__
        known = {
            "namespace": self.namespace,
            "saga": row.saga,
            "saga_id": row.saga_id,
            "run_id": str(row.run_id),
        }
        log.error("saga %s run %s is set apart after %s", row.saga, row.run_id, reason, extra=known)
        mine = [arrival for arrival in self.arrivals if arrival.run_id == row.run_id]
        about = {arrival.reply.step for arrival in mine if isinstance(arrival, ReplyArrival)}
        step = next((each.name for each in definition.steps if each.name in about), "")
        self._changes.incidents.append(incident(row.run_id, row.saga, IncidentKind.POISON, step, reason))
        self._changes.flagged.append((row.run_id, row.version))
        self._changes.woken.append((row.run_id, row.now_ms + 10 * DEFER_MS))
        for arrival in mine:
            self._keep(row, arrival)

    def _keep(self, row: Loaded, arrival: Arrival) -> None:
        """P29: what this process cannot apply is stored beside the instance in this commit, not parked nor dropped."""
        if isinstance(arrival, ReplyArrival) and arrival.pending_id is None:
            reply = arrival.reply
            body = encode_reply(reply, to_json(reply.data))
            self._changes.pending.append(PendingRow(row.run_id, row.saga, row.saga_version, body))


def incident(run_id: UUID, saga: str, kind: IncidentKind, step: str, error: str) -> IncidentRow:
    """Return an incident with its fingerprint: the same for every instance that stands still for the same reason."""
    fingerprint = hashlib.sha256(f"{saga}\0{kind}\0{step}\0{error}".encode()).hexdigest()[:16]
    return IncidentRow(run_id, kind, step, saga, error, fingerprint)


def _agrees(run: _Run, reply: Reply) -> bool:
    """L-10: the command id decides what a reply answers; whatever else it says of itself must not say otherwise."""
    waiting = run.state.outstanding
    if waiting is None or waiting.command_id != reply.commandid:
        return True  # it is stale, whatever it says
    return reply.step == run.definition.steps[waiting.step].name and reply.saga == run.loaded.saga


def _change(run: _Run, event: Event, line: HistoryEntry, after: State) -> StateChange:
    row, waiting = run.loaded, run.state.outstanding
    return StateChange(
        *(row.run_id, row.saga, row.saga_id, line.event, line.step, line.direction, line.attempt),
        command_id=None if waiting is None else waiting.command_id,
        status=after.status,
        error=getattr(event, "error", ""),
    )


def _windows(run: _Run) -> set[str]:
    """Return the crash points of this transition's commit: timers (T) and compensation (K)."""
    open_: set[str] = set()
    if run.woken:
        open_.add("T3" if run.answered else "T2")
    if run.state.plan != run.before.plan:
        open_.add("K1" if not run.before.plan else "K3" if run.finished else "K2")
    return open_


def _kept(reply: Reply) -> list[tuple[str, bytes]]:
    """Return the payloads of a reply to keep, by kind. Nothing is kept for null."""
    if reply.outcome in ("refused", "failed"):
        return (
            []
            if reply.data is None
            else [(commands.said_kind(reply.direction, reply.attempt), to_json(reply.data))]
        )
    if reply.direction == "compensate" or not isinstance(reply.data, dict):
        return []
    pairs = ((commands.OUTPUT, reply.data.get("output")), (commands.UNDO, reply.data.get("undo")))
    return [(kind, to_json(value)) for kind, value in pairs if value is not None]


def _audit(arrival: VerbArrival, run: _Run, after: State) -> AuditRow:
    return AuditRow(
        arrival.run_id,
        arrival.request_id,
        str(arrival.verb),
        arrival.actor,
        arrival.reason,
        run.loaded.status if run.set_apart else run.state.status,
        after.status,
        _detail(arrival.verb, run.definition, run.state),
    )


def _detail(verb: Verb, definition: SagaDefinition, before: State) -> str | None:
    """C-11: who stops without undo is told, and it is kept, which effects stand."""
    if verb not in (Verb.TERMINATE, Verb.ABANDON):
        return None
    stands = standing(definition.engine, before)
    return to_json(
        {"standing": [[definition.steps[each.step].name, each.in_doubt] for each in stands]}
    ).decode()

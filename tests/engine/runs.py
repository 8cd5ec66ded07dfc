"""A saga under test: feeds events to `decide` and checks after each what must hold whatever happened."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

from saga.compensation.kinds import InDoubt, StepKind
from saga.compensation.plan import SETTLED
from saga.engine.decide import decide, initial, next_due_ms
from saga.engine.effects import (
    Dispatch,
    Effect,
    Finish,
    IncidentKind,
    RaiseIncident,
    RecordStale,
    ResolveIncidents,
)
from saga.engine.events import (
    ActivityCompleted,
    ActivityFailed,
    ActivityRefused,
    Answer,
    CancelRequested,
    CompensationCompleted,
    CompensationFailed,
    CompensationRefused,
    Event,
    FenceFoundEffect,
    LateEffect,
    SagaStarted,
    TimerFired,
)
from saga.engine.model import Definition, Redrive, Step
from saga.engine.state import CLOSED, Outstanding, State, Status, decode_state
from saga.errors import PastPivot
from saga.messages import FENCES, Direction, command_id
from saga.retry import COMPENSATION, FORWARD, RetryPolicy

RUN: Final = "01890a5d-ac96-774b-bcce-b302099a8057"

# One letter per step, so that a saga is a word: C can be undone, N says why it need not be, O only reads.
LETTERS: Final = {
    "C": (StepKind.COMPENSATABLE, True, None),
    "N": (StepKind.COMPENSATABLE, False, "nothing to undo"),
    "O": (StepKind.READ_ONLY, False, None),
    "P": (StepKind.PIVOT, False, None),
    "R": (StepKind.RETRIABLE, False, None),
}


def sequence(
    word: str,
    *,
    retry: RetryPolicy = FORWARD,
    undo_retry: RetryPolicy = COMPENSATION,
    start_to_close_ms: int | None = 30_000,
    redrive: Redrive = Redrive(),
    in_doubt: InDoubt = InDoubt.UNDO,
) -> Definition:
    """Return the saga that `word` spells; past the pivot retries have no end, as registration sees to.

    `in_doubt` is the policy of the steps that can be undone.
    """
    past, steps = False, []
    for index, letter in enumerate(word):
        kind, has_compensation, reason = LETTERS[letter]
        steps.append(
            Step(
                name=f"s{index}",
                kind=kind,
                has_compensation=has_compensation,
                no_compensation=reason,
                retry=undo_retry if past else retry,
                undo_retry=undo_retry,
                start_to_close_ms=start_to_close_ms,
                undo_start_to_close_ms=start_to_close_ms,
                in_doubt=in_doubt if has_compensation else InDoubt.UNDO,
            )
        )
        past = past or letter == "P"
    return Definition("transfer", 1, tuple(steps), redrive)


def words(length: int) -> Iterable[str]:
    """Return every valid saga of this length."""
    if length == 0:
        yield ""
        return
    for word in words(length - 1):
        yield from (word + letter for letter in ("OR" if "P" in word else "CNOP"))


def seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


@dataclass
class SagaRun:
    """One instance, its clock, and what it did so far."""

    definition: Definition
    run_id: str = RUN
    now_ms: int = 0
    checked: bool = True
    state: State = field(init=False)
    effects: list[Effect] = field(default_factory=list)
    """Everything since the start."""
    _ids: dict[tuple[int, Direction, int], str] = field(default_factory=dict)
    _incidents: set[int] = field(default_factory=set)
    _late: set[int] = field(default_factory=set)
    _turned: bool = False

    def __post_init__(self) -> None:
        self.state = initial("default", self.run_id)
        self.feed(SagaStarted(at_ms=self.now_ms))

    # --- events -------------------------------------------------------------------------------

    def feed(self, event: Event) -> tuple[Effect, ...]:
        """Decide, check, and return the effects."""
        before = self.state
        try:
            self.state, effects = decide(self.definition, before, event)
        except PastPivot:
            assert isinstance(event, CancelRequested)
            assert self.past_pivot
            return ()
        self.effects += effects
        if self.checked:
            self._check(before, event, effects)
        return effects

    def done(self) -> tuple[Effect, ...]:
        """The outstanding command succeeds, whatever it asks for; a fence finds that nothing ran."""
        if self.waiting.direction is Direction.FORWARD:
            return self.feed(ActivityCompleted(**self.address))
        return self.feed(CompensationCompleted(**self.address))

    def refused(self, code: str = "no") -> tuple[Effect, ...]:
        """The outstanding command is refused."""
        if self.waiting.direction is Direction.FORWARD:
            return self.feed(ActivityRefused(**self.address, code=code))
        return self.feed(CompensationRefused(**self.address, code=code))

    def failed(self, *, retryable: bool = True, after_ms: int | None = None) -> tuple[Effect, ...]:
        """The outstanding attempt fails."""
        if self.waiting.direction is Direction.FORWARD:
            return self.feed(
                ActivityFailed(**self.address, error="Boom", retryable=retryable, retry_after_ms=after_ms)
            )
        return self.feed(CompensationFailed(**self.address, error="Boom", retry_after_ms=after_ms))

    def had_run(self) -> tuple[Effect, ...]:
        """The fence finds that the pivot had run."""
        return self.feed(FenceFoundEffect(**self.address))

    def late(self, step: int = 0, direction: Direction = Direction.FORWARD) -> tuple[Effect, ...]:
        """The action of a step, or its first undo, tells that its effect landed late."""
        name = self.definition.steps[step].name
        identity = command_id("default", self.definition.name, self.run_id, name, 0, 0, direction)
        return self.feed(LateEffect(at_ms=self.now_ms, command_id=identity, step=name))

    def wake(self, *, may_resend: bool = True, broker_forgot: bool = False) -> tuple[Effect, ...]:
        """The clock moves to the next wake-up, which fires."""
        due = self.due_ms
        assert due is not None
        self.now_ms = max(self.now_ms, due)
        return self.feed(TimerFired(at_ms=self.now_ms, may_resend=may_resend, broker_forgot=broker_forgot))

    def cancel(self) -> tuple[Effect, ...]:
        """Somebody cancels."""
        return self.feed(CancelRequested(at_ms=self.now_ms))

    def order(self, verb: type[Event], **known: Any) -> tuple[Effect, ...]:
        """A person orders something. Raises VerbNotAllowed."""
        return self.feed(verb(at_ms=self.now_ms, **known))

    def run_out(self) -> None:
        """Wake until the outstanding command is given up or flagged: nobody answers."""
        command = self.waiting.command_id
        for _ in range(100):
            waiting = self.state.outstanding
            if waiting is None or waiting.command_id != command or self.stands(Status.NEEDS_ATTENTION):
                return
            self.wake()
        raise AssertionError("asked for on and on, and nobody is told")

    def finish(self, *, pivot_had_run: bool = False) -> None:
        """From now on everything succeeds; the saga must close within a few answers."""
        for _ in range(4 * len(self.definition.steps) + 4):
            if self.state.status in CLOSED:
                return
            if self.waiting.retry_ms is not None:
                self.wake()
            elif self.waiting.direction is Direction.FENCE and pivot_had_run:
                self.had_run()
            else:
                self.done()
        raise AssertionError(f"still {self.state.status} after as many successes as there are commands")

    # --- looking ------------------------------------------------------------------------------

    @property
    def waiting(self) -> Outstanding:
        assert self.state.outstanding is not None
        return self.state.outstanding

    def stands(self, status: Status) -> bool:
        return self.state.status is status

    def asks_to(self, direction: Direction) -> bool:
        return self.waiting.direction is direction

    @property
    def address(self) -> dict[str, Any]:
        """What an answer to the outstanding command bears."""
        return {"at_ms": self.now_ms, "command_id": self.waiting.command_id, "attempt": self.waiting.attempt}

    @property
    def due_ms(self) -> int | None:
        return next_due_ms(self.definition, self.state, self.now_ms)

    @property
    def past_pivot(self) -> bool:
        pivot = self.definition.pivot
        return pivot is not None and self.state.done > pivot

    @property
    def dispatches(self) -> list[Dispatch]:
        return [effect for effect in self.effects if isinstance(effect, Dispatch)]

    @property
    def incidents(self) -> list[RaiseIncident]:
        return [effect for effect in self.effects if isinstance(effect, RaiseIncident)]

    @property
    def undone(self) -> list[int]:
        """The steps whose undo was ordered, in order of the first order."""
        steps: dict[int, None] = {}
        for sent in self.dispatches:
            if sent.direction is Direction.COMPENSATE:
                steps.setdefault(sent.step)
        return list(steps)

    # --- what must hold, whatever happened ------------------------------------------------------

    def _check(self, before: State, event: Event, effects: tuple[Effect, ...]) -> None:
        after = self.state
        if isinstance(event, Answer) and not _answers(before, event):
            assert after is before, "P6: an answer to nothing outstanding changes nothing"
            assert effects == (RecordStale(),)
        if before.status in CLOSED and not isinstance(event, LateEffect):
            assert after._replace(outstanding=before.outstanding) == before, (
                "a closed instance stays as it is"
            )
            assert not any(isinstance(effect, Dispatch) for effect in effects)
        if after.status in CLOSED:
            fences = after.outstanding is not None and after.outstanding.direction in FENCES
            by_hand = after.status in (Status.TERMINATED, Status.ABANDONED)
            assert after.outstanding is None or (by_hand and fences), "P26: at most a fence is awaited"
            assert self.due_ms is None
            assert before.status in CLOSED or Finish() in effects
        else:
            assert after.outstanding is not None, "an open instance awaits something"
            assert self.due_ms is not None, "an open instance has a wake-up"
            assert Finish() not in effects
        for effect in effects:
            if isinstance(effect, Dispatch):
                self._check_dispatch(before, effect)
        self._check_way(before)
        self._check_incidents(effects)
        assert decode_state(after.namespace, after.run_id, after.encode()) == after

    def _check_dispatch(self, before: State, sent: Dispatch) -> None:
        known = self._ids.setdefault((sent.step, sent.direction, sent.round), sent.command_id)
        assert sent.command_id == known, "P2: every retry and resend keeps the command id"
        assert list(self._ids.values()).count(known) == 1, "P2: no two commands share an id"
        waiting, earlier = self.waiting, before.outstanding
        assert (sent.step, sent.command_id, sent.attempt) == (
            waiting.step,
            waiting.command_id,
            waiting.attempt,
        )
        if earlier is not None and earlier.command_id == sent.command_id:
            assert sent.attempt == earlier.attempt + (0 if sent.resend else 1), "P4: only a retry raises it"
        else:
            assert (sent.attempt, sent.resend) == (1, False)
        if sent.direction is Direction.FORWARD:
            assert not self._turned, "E-01: once compensating, the way forward is closed for good"
            assert sent.step == self.state.done
            assert sent.final is not self.past_pivot, "P20"
        else:
            assert not sent.final
            by_hand = self.state.status in CLOSED
            assert by_hand or not self.past_pivot, "E-05: past the pivot nothing is undone"
        if sent.direction is Direction.FENCE and self.state.status not in CLOSED:
            assert not self._turned
            asked = self.definition.steps[sent.step].in_doubt is InDoubt.INQUIRE
            assert asked or sent.step == self.definition.pivot
        if sent.direction is Direction.COMPENSATE and not sent.round:
            plan = _first_rounds(self.state)
            assert self.definition.steps[sent.step].has_compensation
            ordered = [step for step in plan if step in self.undone]
            assert self.undone == ordered, "E-02: in the order of the plan, none twice"

    def _check_way(self, before: State) -> None:
        plan = _first_rounds(self.state)
        assert plan == sorted(set(plan), reverse=True), "E-02: the latest first, none twice"
        if before.plan:
            assert plan == _first_rounds(before), "E-01: a plan is decided once"
            settled = [undo.step for undo in before.plan if undo.state in SETTLED]
            still = [undo.step for undo in self.state.plan if undo.state in SETTLED]
            assert still[: len(settled)] == settled, "what is undone stays undone"
        if self.state.status in (Status.COMPENSATING, Status.COMPENSATED) or self.state.plan:
            self._turned = True
            assert not self.past_pivot
            assert self.state.cause is not None, "a saga that turned back knows why"
        if self.state.status is Status.COMPENSATED:
            assert all(undo.state in SETTLED for undo in self.state.plan)
            wanted = [i for i in range(self.state.done) if self.definition.steps[i].has_compensation]
            assert set(wanted) <= set(plan), "every step that ran is undone"
        if self.state.status is Status.COMPLETED:
            assert self.state.done == len(self.definition.steps)
            assert not self._turned

    def _check_incidents(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            if isinstance(effect, ResolveIncidents):
                assert effect.step in self._incidents | self._late, "only what was raised is resolved"
                self._incidents.discard(effect.step)
                self._late.discard(effect.step)
            if isinstance(effect, RaiseIncident):
                if effect.kind is IncidentKind.LATE_EFFECT:
                    self._late.add(effect.step)
                elif effect.kind is not IncidentKind.HAD_RUN:
                    self._incidents.add(effect.step)
        assert bool(self._incidents) is (self.state.status is Status.NEEDS_ATTENTION), (
            "an instance needs attention as long as an incident is open, and no longer"
        )


def _first_rounds(state: State) -> list[int]:
    return [undo.step for undo in state.plan if not undo.round]


def _answers(state: State, answer: Answer) -> bool:
    return state.outstanding is not None and state.outstanding.command_id == answer.command_id

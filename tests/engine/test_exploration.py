"""Every order in which a small saga's messages can be handled, lost and repeated, against participants with a barrier.

The world is the engine, one barrier row per step, and the sets of commands and replies on their way. What can happen
next is everything that a network and a participant may do; faults cost one of a few. From every world that can be
reached the saga must be able to close, and where it has closed, effects and undos must add up, also after every
command that was still on its way has been handled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import pytest

from saga.compensation.kinds import InDoubt
from saga.engine.decide import decide, initial, next_due_ms
from saga.engine.effects import Dispatch
from saga.engine.events import (
    ActivityCompleted,
    ActivityFailed,
    ActivityRefused,
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
from saga.engine.model import Definition
from saga.engine.state import CLOSED, State, Status
from saga.errors import PastPivot
from saga.messages import Direction
from saga.retry import RetryPolicy
from tests.engine.runs import RUN, seconds, sequence, words

pytestmark = pytest.mark.stack("pure")

# The barrier row of a step's forward command, as docs/wire.md says.
NONE, RAN, SAID_NO, CLOSED_FIRST, UNDONE = ".", "ran", "said no", "closed first", "undone"

DONE, REFUSED, FAILED, NOTHING, HAD_RUN, LATE = "done", "refused", "failed", "nothing", "had run", "late"


class Sent(NamedTuple):
    """A command on its way."""

    step: int
    direction: Direction
    attempt: int
    final: bool
    round: int = 0
    redelivered: bool = False
    """Its process died before it was acked, so the broker keeps it."""


class Said(NamedTuple):
    """A reply on its way."""

    sent: Sent
    outcome: str


class World(NamedTuple):
    """Everything there is. Times in the state count from now, so that equal worlds are equal."""

    state: State
    rows: tuple[Any, ...]
    """What the participants know, by step: the barrier's row, and more where the effect is outside the database."""
    commands: frozenset[Sent] = frozenset()
    replies: frozenset[Said] = frozenset()
    faults_left: int = 0


class Explorer:
    """All that can happen to one saga with so many faults."""

    row: Any = NONE

    def __init__(self, definition: Definition, faults: int) -> None:
        self.definition = definition
        self.ids: dict[tuple[int, Direction, int], str] = {}
        start = initial("default", RUN)
        self.first = self._moved(
            World(start, (self.row,) * len(definition.steps), faults_left=faults), SagaStarted(at_ms=0)
        )

    def next(self, world: World) -> Iterator[World]:
        """Every world that may follow."""
        for sent in world.commands:
            gone = world._replace(commands=world.commands - {sent})
            yield from self._handled(gone, sent)
            if world.faults_left:
                hurt = world._replace(faults_left=world.faults_left - 1)
                if not sent.redelivered:
                    yield hurt._replace(commands=world.commands - {sent})  # lost
                yield from self._handled(hurt, sent)  # delivered, and on its way once more
        for said in world.replies:
            yield self._moved(world._replace(replies=world.replies - {said}), self._answer(said))
            if world.faults_left:
                hurt = world._replace(faults_left=world.faults_left - 1)
                if not said.outcome.startswith(
                    LATE
                ):  # nobody asks for it: the broker keeps it until the coordinator has it
                    yield hurt._replace(replies=world.replies - {said})
                yield self._moved(hurt, self._answer(said))
        yield from self._time(world)

    def _handled(self, world: World, sent: Sent) -> Iterator[World]:
        """What a participant may make of a command."""
        row = world.rows[sent.step]
        match sent.direction, row:
            case Direction.FORWARD, _ if row == NONE:
                yield self._row(world, sent, RAN, DONE)
                yield from self._hurt(world, sent, SAID_NO if sent.final else NONE, REFUSED)
                yield from self._hurt(world, sent, NONE, FAILED)
            case Direction.FORWARD, _:
                yield self._row(world, sent, row, DONE if row in (RAN, UNDONE) else REFUSED)
            case Direction.FENCE, _ if row == NONE:
                yield self._row(world, sent, CLOSED_FIRST, NOTHING)
            case Direction.FENCE, _:
                yield self._row(world, sent, row, HAD_RUN if row == RAN else NOTHING)
            case Direction.COMPENSATE, _ if row == RAN:
                yield self._row(world, sent, UNDONE, DONE)
                yield from self._hurt(world, sent, RAN, REFUSED)
                yield from self._hurt(world, sent, RAN, FAILED)
            case Direction.COMPENSATE, _:
                closed = CLOSED_FIRST if row == NONE else row
                yield self._row(world, sent, closed, DONE if row == UNDONE else NOTHING)

    def _hurt(self, world: World, sent: Sent, row: Any, outcome: str) -> Iterator[World]:
        if world.faults_left:
            yield self._row(world._replace(faults_left=world.faults_left - 1), sent, row, outcome)

    def _row(self, world: World, sent: Sent, row: Any, outcome: str) -> World:
        rows = (*world.rows[: sent.step], row, *world.rows[sent.step + 1 :])
        return world._replace(rows=rows, replies=world.replies | {Said(sent, outcome)})

    def _time(self, world: World) -> Iterator[World]:
        """The clock moves to the next wake-up: at no cost if nothing else can happen, else somebody was slow."""
        due = next_due_ms(self.definition, world.state, 0)
        if due is not None:
            busy = not self.quiet(world) and world.state.outstanding is not None
            waiting_to_retry = (
                world.state.outstanding is not None and world.state.outstanding.retry_ms is not None
            )
            cost = 1 if busy and not waiting_to_retry else 0
            if world.faults_left >= cost:
                hurt = world._replace(faults_left=world.faults_left - cost)
                yield self._moved(hurt, TimerFired(at_ms=max(due, 0)))
            if world.faults_left and world.state.status not in CLOSED:
                hurt = world._replace(faults_left=world.faults_left - 1)
                yield self._moved(hurt, CancelRequested(at_ms=0))

    def quiet(self, world: World) -> bool:
        """Whether nothing is on its way."""
        return not (world.commands or world.replies)

    def _moved(self, world: World, event: Event) -> World:
        try:
            state, effects = decide(self.definition, world.state, event)
        except PastPivot:
            return world
        commands = set(world.commands)
        for effect in effects:
            if isinstance(effect, Dispatch):
                self.ids[effect.step, effect.direction, effect.round] = effect.command_id
                commands.add(Sent(effect.step, effect.direction, effect.attempt, effect.final, effect.round))
        return world._replace(state=_from_now(state, event.at_ms), commands=frozenset(commands))

    def _answer(self, said: Said) -> Event:
        sent = said.sent
        known: dict[str, Any] = {
            "at_ms": 0,
            "command_id": self.ids[sent.step, sent.direction, sent.round],
            "attempt": sent.attempt,
        }
        forward = sent.direction is Direction.FORWARD
        match said.outcome:
            case "done":
                return ActivityCompleted(**known) if forward else CompensationCompleted(**known)
            case "refused":
                return (
                    ActivityRefused(**known, code="no")
                    if forward
                    else CompensationRefused(**known, code="no")
                )
            case "failed":
                return (
                    ActivityFailed(**known, error="E") if forward else CompensationFailed(**known, error="E")
                )
            case late if late.startswith(LATE):
                step = self.definition.steps[sent.step].name
                return LateEffect(
                    at_ms=0,
                    command_id=known["command_id"],
                    step=step,
                    round=int(late.split()[1]),
                    certain=late.endswith("True"),
                )
            case "had run":
                return FenceFoundEffect(**known)
            case _:
                return CompensationCompleted(**known, nothing=True)


def _from_now(state: State, now_ms: int) -> State:
    waiting = state.outstanding
    if waiting is None:
        return state
    shifted = waiting._replace(
        first_sent_ms=waiting.first_sent_ms - now_ms,
        sent_ms=waiting.sent_ms - now_ms,
        retry_ms=None if waiting.retry_ms is None else waiting.retry_ms - now_ms,
    )
    return state._replace(outstanding=shifted)


ATTEMPTED, CLOSED_UNKNOWN = "attempted", "closed"


class Outside(NamedTuple):
    """A step whose effect is at a provider: its row, the calls on their way there, and what the provider knows."""

    row: str = NONE
    calls: frozenset[Sent] = frozenset()
    charged: bool = False
    refunded: bool = False
    keys: frozenset[int] = frozenset()
    """Rounds under whose keys a refund was asked for: asked again, the provider says what it said before."""
    undone: frozenset[int] = frozenset()
    """Rounds whose undo is on record."""
    began: int = -1
    """Highest round whose undo has begun."""
    late: int = -1
    """Of a late effect: the highest round that had begun when it landed."""
    certain: bool = False

    @property
    def stands(self) -> bool:
        return self.charged and not self.refunded

    def refund(self, round: int) -> Outside:
        return self._replace(
            refunded=self.refunded or (self.charged and round not in self.keys), keys=self.keys | {round}
        )


class OutsideExplorer(Explorer):
    """All that can happen if every effect is outside the database, as saga/participant/outside.py says (D-11, P27)."""

    row = Outside()

    def next(self, world: World) -> Iterator[World]:
        """What may follow, the ends of calls included: made or not, and answered or not."""
        yield from super().next(world)
        for step, known in enumerate(world.rows):
            for sent in known.calls:
                gone = known._replace(calls=known.calls - {sent})
                yield self._ended(world, sent, gone._replace(charged=True))
                if world.faults_left:
                    hurt = world._replace(faults_left=world.faults_left - 1)
                    # a provider that refused one copy of a call has not made the other one
                    for left in {gone, gone._replace(charged=gone.charged or gone.row != SAID_NO)}:
                        if left.row in (CLOSED_UNKNOWN, LATE):
                            yield self._told_late(hurt, sent, left, certain=False)
                        else:
                            yield self._row(hurt, sent, left, FAILED)
                        rows = (*world.rows[:step], left, *world.rows[step + 1 :])
                        yield hurt._replace(
                            rows=rows, commands=world.commands | {sent._replace(redelivered=True)}
                        )  # crashed: it comes again

    def quiet(self, world: World) -> bool:
        return super().quiet(world) and not any(known.calls for known in world.rows)

    def _ended(self, world: World, sent: Sent, known: Outside) -> World:
        match known.row:
            case "attempted":
                return self._row(world, sent, known._replace(row=RAN), DONE)
            case "closed" | "said no" | "late":
                return self._told_late(world, sent, known)
            case _:
                return self._row(world, sent, known, DONE)

    def _told_late(self, world: World, sent: Sent, known: Outside, *, certain: bool = True) -> World:
        certain = certain or known.certain
        late = known._replace(row=LATE, late=max(known.began, known.late, 0), certain=certain)
        return self._row(world, sent, late, f"{LATE} {late.late} {certain}")

    def _handled(self, world: World, sent: Sent) -> Iterator[World]:
        known: Outside = world.rows[sent.step]
        match sent.direction:
            case Direction.FORWARD:
                yield from self._act(world, sent, known)
            case Direction.COMPENSATE:
                yield from self._undo(world, sent, known)
            case _:
                yield from self._fence(world, sent, known)

    def _act(self, world: World, sent: Sent, known: Outside) -> Iterator[World]:
        if known.row in (ATTEMPTED, CLOSED_UNKNOWN, LATE) and known.stands:  # its inquiry says so
            if known.row in (CLOSED_UNKNOWN, LATE):
                yield self._told_late(world, sent, known)
            else:
                yield self._row(world, sent, known._replace(row=RAN), DONE)
        elif known.row in (NONE, ATTEMPTED):
            yield from self._hurt(
                world, sent, known._replace(row=SAID_NO if sent.final else ATTEMPTED), REFUSED
            )
            called = known._replace(row=ATTEMPTED, calls=known.calls | {sent})
            rows = (*world.rows[: sent.step], called, *world.rows[sent.step + 1 :])
            yield world._replace(rows=rows)
        else:
            late = f"{LATE} {known.late} {known.certain}"
            yield self._row(world, sent, known, {RAN: DONE, LATE: late}.get(known.row, REFUSED))

    def _undo(self, world: World, sent: Sent, known: Outside) -> Iterator[World]:
        row = {NONE: CLOSED_FIRST, ATTEMPTED: CLOSED_UNKNOWN}.get(known.row, known.row)
        known = known._replace(row=row, began=max(known.began, sent.round))
        if sent.round in known.undone:
            yield self._row(world, sent, known, DONE)
        elif row == LATE and sent.round <= known.late:
            yield self._row(world, sent, known, f"{LATE} {known.late} {known.certain}")
        elif row in (CLOSED_FIRST, SAID_NO):
            yield self._row(world, sent, known, NOTHING)
        else:
            done = known.refund(sent.round)
            yield self._row(world, sent, done._replace(undone=known.undone | {sent.round}), DONE)
            yield from self._hurt(world, sent, done, FAILED)
            yield from self._hurt(world, sent, known, FAILED)

    def _fence(self, world: World, sent: Sent, known: Outside) -> Iterator[World]:
        had_run = known.row == RAN or (known.row == LATE and known.certain)
        if known.row == ATTEMPTED or (known.row == LATE and not known.certain):
            yield from self._hurt(world, sent, known, FAILED)  # nobody can tell
            had_run = known.stands
            if known.row == LATE:
                known = known._replace(certain=had_run)
            else:
                known = known._replace(row=RAN if had_run else CLOSED_UNKNOWN)
        elif known.row == NONE:
            known = known._replace(row=CLOSED_FIRST)
        yield self._row(world, sent, known, HAD_RUN if had_run else NOTHING)


def explore(definition: Definition, faults: int, kind: type[Explorer] = Explorer) -> tuple[int, int]:
    """Visit every world; return how many there are, and how many of them are closed and quiet."""
    explorer = kind(definition, faults)
    check = _check_provider if kind is OutsideExplorer else _check_books
    seen = {explorer.first}
    todo = [explorer.first]
    came_from: dict[World, list[World]] = defaultdict(list)
    closed: list[World] = []
    quiet = 0
    while todo:
        world = todo.pop()
        if world.state.status in CLOSED:
            closed.append(world)
            if explorer.quiet(world):
                quiet += 1
                check(definition, world)
        for following in explorer.next(world):
            came_from[following].append(world)
            if following not in seen:
                seen.add(following)
                todo.append(following)
    can_close = set(closed)
    while closed:
        for world in came_from[closed.pop()]:
            if world not in can_close:
                can_close.add(world)
                closed.append(world)
    assert seen == can_close, f"never closes: {next(iter(seen - can_close))}"
    return len(seen), quiet


def _check_books(definition: Definition, world: World) -> None:
    """I5: all effects, or none that is not undone; never both ways."""
    if world.state.status is Status.COMPLETED:
        assert set(world.rows) <= {RAN}, world
        return
    for step, row in zip(definition.steps, world.rows, strict=True):
        if step.has_compensation:
            assert row != RAN, world
        if step.kind == "pivot":
            assert row in (NONE, SAID_NO, CLOSED_FIRST), world
    if definition.pivot is not None:
        assert set(world.rows[definition.pivot + 1 :]) <= {NONE}, world


def _check_provider(definition: Definition, world: World) -> None:
    """What the provider holds is what the saga says; a pivot that landed after its inquiry said no is told."""
    for step, known in zip(definition.steps, world.rows, strict=True):
        if world.state.status is Status.COMPLETED:
            assert known.stands, world
        elif step.has_compensation:
            assert not known.stands, world
        elif step.kind == "pivot" and known.stands:
            assert known.row == LATE, world


FORWARD_TWICE: Final = RetryPolicy(attempts=2, schedule_to_close=seconds(100))
UNDO_FOR_EVER: Final = RetryPolicy(attempts=None, schedule_to_close=None, incident_at=2)


@pytest.mark.feature("E-01")
@pytest.mark.feature("E-04")
@pytest.mark.feature("E-05")
@pytest.mark.parametrize(("length", "faults"), [(1, 4), (2, 3), (3, 2)], ids=lambda value: str(value))
def test_no_order_of_messages_leaves_an_effect_and_its_undo_or_a_saga_that_cannot_end(
    length: int, faults: int
) -> None:
    for word in words(length):
        worlds, quiet = explore(
            sequence(word, retry=FORWARD_TWICE, undo_retry=UNDO_FOR_EVER, start_to_close_ms=30_000), faults
        )
        assert quiet > 1
        assert worlds > 10


@pytest.mark.feature("D-11")
@pytest.mark.feature("E-05")
@pytest.mark.parametrize("policy", [InDoubt.UNDO, InDoubt.INQUIRE])
@pytest.mark.parametrize(("words", "faults"), [(("C", "P"), 4), (("CC", "CP"), 3)], ids=["one", "two"])
def test_no_order_of_calls_leaves_a_charge_that_the_saga_does_not_know_of(
    words: tuple[str, ...], faults: int, policy: InDoubt
) -> None:
    """P27: a call may end at any time, after its undo and after the saga's end as well."""
    for word in words:
        worlds, quiet = explore(
            sequence(word, retry=FORWARD_TWICE, undo_retry=UNDO_FOR_EVER, in_doubt=policy),
            faults,
            OutsideExplorer,
        )
        assert quiet > 1
        assert worlds > 10

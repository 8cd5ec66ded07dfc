"""Tries everything that can go wrong at every step of a saga, each in a fresh run, and says which run ended badly.

    print(await try_all(money_transfer, Transfer(...), tables=metadata, prepare=open_accounts, check=conserved))

Whatever goes wrong, a saga must close; what was done must be undone in reverse order if it turned back, nothing may be
done or undone twice, and what a fault ought not to change must be as in a run without it. Where a fault that does not
stop leaves a saga waiting for a person, it must say so by an incident, and close once the fault is gone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, NamedTuple, TypeVar

from saga.definition.builder import Saga, SagaDefinition
from saga.engine.model import Redrive, Step
from saga.engine.state import CLOSED, Status
from saga.errors import ConfigurationError
from saga.testing.driver import StoodStill
from saga.testing.environment import Ended, Environment
from saga.testing.faults import ALWAYS, Fault, FaultKind

I = TypeVar("I")  # noqa: E741 - I for input, R for result
R = TypeVar("R")

Prepare = Callable[[Environment], Awaitable[Any]]
Check = Callable[[Environment, "Ended[R]"], Awaitable[Any]]

_HARMLESS: Final = (
    FaultKind.DUPLICATE_COMMAND,
    FaultKind.DUPLICATE_REPLY,
    FaultKind.CRASH_UNCOMMITTED,
    FaultKind.CRASH,
    FaultKind.CRASH_COORDINATOR,
)
_ANSWERED_LATE: Final = (
    FaultKind.LOSE_COMMAND,
    FaultKind.LOSE_REPLY,
    FaultKind.DELAY_COMMAND,
    FaultKind.DELAY_REPLY,
)
"""The answer comes only after the command was sent again."""
_REDRIVE: Final = timedelta(seconds=30)
_SOME: Final = 3
"""More than once, fewer than the attempts of most schedules."""


class TrialsFailed(AssertionError):
    """Some run ended as none may."""


class Trial(NamedTuple):
    """One fault to be tried, and what it may change."""

    fault: Fault
    ends: str
    """How the saga ends once the fault is over."""
    unchanged: bool
    """What is done is what is done without the fault."""
    turn: Fault | None = None
    """What makes the saga turn back, where the fault is one of an undo."""
    attention: bool = False
    """The fault goes on until the saga waits for a person."""


@dataclass(frozen=True, slots=True)
class Case:
    """One run: the fault, how often it fired, how the saga ended, and what is wrong with that."""

    fault: str
    fired: int
    status: str
    done: tuple[str, ...]
    took: timedelta
    """On the environment's clock."""
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What was tried. As text it is a table."""

    saga: str
    cases: tuple[Case, ...]

    @property
    def failed(self) -> tuple[Case, ...]:
        """The runs with a problem."""
        return tuple(case for case in self.cases if case.problems)

    def __str__(self) -> str:
        rows = [("fault", "fired", "ended", "took", "done")]
        rows += [
            (
                case.fault,
                str(case.fired),
                case.status,
                f"{case.took.total_seconds():.0f} s",
                ", ".join(case.done),
            )
            for case in self.cases
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[4]])
            for row in rows
        ]
        wrong = [f"{case.fault}: {problem}" for case in self.failed for problem in case.problems]
        end = (
            f"{len(self.cases) - len(self.failed)} of {len(self.cases)} runs of {self.saga} as they should be"
        )
        return "\n".join([*lines, *wrong, end])


async def try_all(
    saga: Saga[I, R],
    input: I,
    *,
    prepare: Prepare | None = None,
    check: Check[R] | None = None,
    only: str | None = None,
    **environment: Any,
) -> Report:
    """Run a saga once for each step and each thing that can go wrong there, and return the table of what was tried.

    Each run has an environment of its own, made with `**environment` (`tables=`, `participants=`, `stand_ins=`,
    `redrive=`); `prepare(env)` is awaited before it and `check(env, ended)` after it, for what only you can know.
    `only` names one case, as the table does. The saga's own end without faults, completed or compensated, is what the
    others are compared with. Raises TrialsFailed with the table if a run ended as none may, ConfigurationError if
    there is no such case.
    """
    own = {"database", "clock", "faults", "strict"} & environment.keys()
    if own:
        raise ConfigurationError(f"Each run has its own: leave out {', '.join(sorted(own))}.")
    trying = _Trying(saga, input, prepare, check, environment)
    cases = await trying.cases(only)
    report = Report(saga.name, tuple(cases))
    if report.failed:
        alone = f"try_all({saga.name}, ..., only={report.failed[0].fault!r})"
        raise TrialsFailed(f"{report}\nTo run the first of them alone: {alone}")
    return report


class _Trying:
    """The runs of one `try_all`."""

    def __init__(
        self,
        saga: Saga[Any, Any],
        input: Any,
        prepare: Prepare | None,
        check: Check[Any] | None,
        environment: dict[str, Any],
    ) -> None:
        self._saga = saga
        self._definition = saga.compile()
        self._input = input
        self._prepare = prepare
        self._check = check
        self._environment = environment
        self._usual: dict[str, tuple[str, ...]] = {}
        """What is done without the fault, by what makes the saga turn back."""

    async def cases(self, only: str | None) -> Sequence[Case]:
        usual = await self._run(None)
        self._usual["None"] = usual.done
        if usual.problems:
            return [usual]
        first_ms = int(self._environment.get("redrive", _REDRIVE) / timedelta(milliseconds=1))
        trials = list(_trials(self._definition, usual, Redrive(first_ms, first_ms * 10)))
        chosen = [trial for trial in trials if only in (None, str(trial.fault))]
        if not chosen:
            names = ", ".join(str(trial.fault) for trial in trials)
            raise ConfigurationError(f"There is no case {only!r}; there are {names}.")
        return [usual, *[await self._run(trial) for trial in chosen]]

    async def _run(self, trial: Trial | None) -> Case:
        if trial is not None and str(trial.turn) not in self._usual:
            assert trial.turn is not None
            turned = Trial(_fresh(trial.turn), Status.COMPENSATED, unchanged=False)
            self._usual[str(trial.turn)] = (await self._run(turned)).done
        fault = None if trial is None else _fresh(trial.fault)
        name = "none" if fault is None else str(fault)
        async with Environment(self._saga, **self._environment, strict=False) as env:
            try:
                ended, waited, problems = await self._play(env, trial, fault)
            except StoodStill as still:
                return Case(name, fault.fired if fault else 0, "open", (), timedelta(), (str(still),))
        status = f"needs_attention, then {ended.status}" if waited else ended.status
        fired = 0 if fault is None else fault.fired
        return Case(name, fired, status, ended.done, ended.took, tuple(problems))

    async def _play(
        self, env: Environment, trial: Trial | None, fault: Fault | None
    ) -> tuple[Ended[Any], bool, list[str]]:
        if self._prepare is not None:
            await self._prepare(env)
        for each in (fault, None if trial is None or trial.turn is None else _fresh(trial.turn)):
            if each is not None:
                env.faults.order(each)
        handle = await env.client.start(self._saga, self._input)
        ended = await env.ended(handle)
        waited = ended.status == Status.NEEDS_ATTENTION
        problems: list[str] = []
        if waited and not ended.incidents:
            problems.append("it needs attention and no incident says why")
        if trial is not None and trial.attention and not waited:
            problems.append("it should have needed attention while the fault went on")
        if waited:
            if fault is not None:
                fault.times = fault.fired
            ended = await env.ended(handle, through_attention=True)
        problems += [*self._wrong(trial, ended), *await self._asked(env, ended)]
        problems += [f"a message was parked: {reason}" for reason in await env.parked()]
        return ended, waited, problems + await env.left_behind()

    async def _asked(self, env: Environment, ended: Ended[Any]) -> list[str]:
        if self._check is None:
            return []
        try:
            await self._check(env, ended)
        except AssertionError as wrong:
            return [f"check: {str(wrong) or 'an assertion of it failed'}"]
        return []

    def _wrong(self, trial: Trial | None, ended: Ended[Any]) -> Iterator[str]:
        """Yield what no run may show, and what this one should not."""
        steps = [step.name for step in self._definition.steps]
        forward = [step for step in ended.done if step in steps]
        undone = [step.removeprefix("undo ") for step in ended.done if step not in steps]
        twice = sorted({each for each in ended.done if ended.done.count(each) > 1})
        if twice:
            yield f"done twice: {', '.join(twice)}"
        if forward != sorted(forward, key=steps.index):
            yield f"done out of order: {', '.join(forward)}"
        if undone != [step for step in reversed(forward) if step in undone]:
            yield f"not undone in reverse order: {', '.join(ended.done)}"
        if ended.status == Status.COMPLETED and (forward != steps or undone):
            yield f"it is completed, and what was done is: {', '.join(ended.done)}"
        if ended.status == Status.COMPENSATED and (left := self._not_undone(forward, undone)):
            yield f"it is compensated, and not undone are: {', '.join(left)}"
        if trial is None:
            if ended.status not in CLOSED:
                yield f"without any fault it ended {ended.status}"
            return
        if ended.status != trial.ends:
            yield f"it ended {ended.status} ({ended.reason}), and should have ended {trial.ends}"
        usual = self._usual[str(trial.turn)]
        if trial.unchanged and ended.done != usual:
            yield f"it did {', '.join(ended.done)}; without the fault it does {', '.join(usual)}"

    def _not_undone(self, forward: Sequence[str], undone: Sequence[str]) -> list[str]:
        engine = self._definition.engine
        past = {
            step.name
            for index, step in enumerate(engine.steps)
            if step.has_compensation or index == engine.pivot
        }
        return [step for step in forward if step in past and step not in undone]


def _fresh(fault: Fault) -> Fault:
    return Fault(fault.kind, fault.step, fault.undo, fault.times, fault.reason)


# --- which trials there are -------------------------------------------------------------------


def _trials(definition: SagaDefinition, usual: Case, redrive: Redrive) -> Iterator[Trial]:
    for index, step in enumerate(definition.engine.steps):
        if step.name in usual.done:
            yield from _forward(definition, index, usual.status, redrive)
    for index, step in enumerate(definition.engine.steps):
        if step.has_compensation:
            turn = None if f"undo {step.name}" in usual.done else _turn(definition, index, usual)
            if turn is not None or f"undo {step.name}" in usual.done:
                yield from _backward(step, turn)


def _forward(definition: SagaDefinition, index: int, usual: str, redrive: Redrive) -> Iterator[Trial]:
    step, pivot = definition.engine.steps[index], definition.engine.pivot
    must_succeed = pivot is not None and index > pivot
    back = usual if must_succeed else Status.COMPENSATED
    yield Trial(Fault(FaultKind.REFUSE, step.name, reason="refused"), back, must_succeed, attention=False)
    for times in (1, _SOME):
        if must_succeed or _retries(step, times):
            yield Trial(Fault(FaultKind.FAIL, step.name, times=times), usual, unchanged=True)
    if must_succeed and step.retry.incident_at is not None:
        yield Trial(Fault(FaultKind.FAIL, step.name, times=ALWAYS), usual, unchanged=True, attention=True)
    elif not must_succeed and not step.retry.endless:
        yield Trial(Fault(FaultKind.FAIL, step.name, times=ALWAYS), back, unchanged=False)
    resent_ms = redrive.after_ms(0, step.start_to_close_ms)
    in_time = must_succeed or index == pivot or step.budget_ms is None or step.budget_ms > resent_ms
    for kind in _ANSWERED_LATE:
        yield Trial(Fault(kind, step.name), usual if in_time else back, unchanged=in_time)
    for kind in _HARMLESS:
        yield Trial(Fault(kind, step.name), usual, unchanged=True)


def _retries(step: Step, failures: int) -> bool:
    """Whether the step's schedule allows for so many failures."""
    longest_ms = sum(step.retry.cap_ms(attempt) for attempt in range(1, failures + 1))
    return (step.retry.attempts is None or step.retry.attempts > failures) and (
        step.budget_ms is None or step.budget_ms > longest_ms
    )


def _backward(step: Step, turn: Fault | None) -> Iterator[Trial]:
    def trial(kind: FaultKind, times: int | None = 1, *, attention: bool = False) -> Trial:
        fault = Fault(kind, step.name, undo=True, times=times, reason="refused")
        return Trial(fault, Status.COMPENSATED, unchanged=True, turn=turn, attention=attention)

    yield trial(FaultKind.REFUSE)
    yield trial(FaultKind.FAIL)
    yield trial(FaultKind.FAIL, _SOME)
    if step.undo_retry.incident_at is not None:
        yield trial(FaultKind.FAIL, ALWAYS, attention=True)
    for kind in (*_ANSWERED_LATE, *_HARMLESS):
        yield trial(kind)


def _turn(definition: SagaDefinition, index: int, usual: Case) -> Fault | None:
    """Return what makes a saga turn back after a step: a refusal behind it, or that its own answers never arrive."""
    engine = definition.engine
    last = len(engine.steps) - 1 if engine.pivot is None else engine.pivot
    if engine.steps[index].name not in usual.done:
        return None
    if last > index:
        return Fault(FaultKind.REFUSE, engine.steps[last].name, reason="refused")
    if engine.steps[index].budget_ms is None:
        return None
    return Fault(FaultKind.LOSE_REPLY, engine.steps[index].name, times=ALWAYS)

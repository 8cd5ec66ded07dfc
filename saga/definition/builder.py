"""Declares a saga: `Saga("money-transfer", Transfer).step(withdraw).step(deposit)`, checked as it is written.

A `Saga` is immutable, each `.step(...)` gives a new one; `compile()` gives what the shells run: the engine's view of
it, the codecs, where each step's input comes from, and the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from typing import Any, Final, Generic, NamedTuple, TypeGuard, TypeVar, cast, overload

from pydantic import JsonValue
from pydantic_core import from_json, to_json

from saga.compensation.kinds import InDoubt, StepKind, StepShape, check_kinds
from saga.definition.activity import UNSET, Activity, Limit, Unset, check_name
from saga.definition.refs import (
    SAGA_INPUT,
    Arguments,
    Expression,
    Make,
    Ref,
    as_expression,
    check,
    describe,
    evaluate,
    ref_owner,
    ref_parts,
    ref_type,
    resolve,
    sources,
    to_data,
)
from saga.engine.model import Definition, Step
from saga.errors import DefinitionError, PayloadInvalid
from saga.messages import NULL
from saga.payloads import NONE, Codec, codec
from saga.retry import COMPENSATION, RetryPolicy

I = TypeVar("I")  # noqa: E741 - I for the saga's input, R for its result, X for the input of a step
R = TypeVar("R", covariant=True)
X = TypeVar("X")

CONTENT_FORMAT: Final = 1
STEPS_MAX: Final = 1_000


class _Draft(NamedTuple):
    """One `.step(...)` as it was written."""

    name: str
    activity: Activity[Any, Any, Any]
    expression: Expression
    kind: StepKind
    retry: RetryPolicy | None
    start_to_close: Limit
    no_compensation: str | None
    in_doubt: InDoubt


@dataclass(frozen=True, slots=True)
class StepDefinition:
    """One step: what the shells need beside the engine's view of it."""

    name: str
    activity: Activity[Any, Any, Any]
    queue: str
    expression: Expression
    """Where its input comes from; each reference names a step."""
    needs: frozenset[str]
    """Names of the steps whose outputs the input reads."""
    unchanged: bool
    """The input is the saga's own, byte for byte."""


@dataclass(frozen=True)
class SagaDefinition:
    """A compiled saga: everything that running it needs, and nothing that changes."""

    engine: Definition
    input: Codec[Any]
    output: Codec[Any]
    """Type of the saga's result."""
    steps: tuple[StepDefinition, ...]
    returns: Expression | None
    result_needs: frozenset[str]
    """Names of the steps whose outputs the result reads."""
    content: str
    """Canonical JSON of all that decides how an instance runs."""
    retention: timedelta | None = None
    """How long closed runs are kept; None is as the app says. It decides nothing of how they run."""

    @property
    def name(self) -> str:
        """Name of the saga."""
        return self.engine.name

    @property
    def version(self) -> int:
        """Version of the saga."""
        return self.engine.version

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content, 64 hex digits; the same on every machine and Python version."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    def step_input(self, index: int, values: Mapping[str, bytes]) -> bytes:
        """Return the input of a step as JSON bytes, to be stored and used for every sending of it.

        `values` maps SAGA_INPUT and the step's `needs` to their JSON bytes. Defaults of the input's type are drawn
        here, so a second call may differ (P32). Raises PayloadInvalid, PayloadTooLarge.
        """
        step = self.steps[index]
        if step.unchanged:
            return values[SAGA_INPUT]
        return self._evaluate(
            step.expression, step.activity.input, values, f"input of step {step.name!r}", step.name
        )

    def result(self, values: Mapping[str, bytes]) -> bytes:
        """Return the saga's result as JSON bytes; `values` maps SAGA_INPUT and `result_needs` to theirs.

        Raises PayloadInvalid, PayloadTooLarge.
        """
        if self.returns is None:
            return NULL
        return self._evaluate(self.returns, self.output, values, "result", None)

    def _evaluate(
        self,
        expression: Expression,
        into: Codec[Any],
        values: Mapping[str, bytes],
        what: str,
        step: str | None,
    ) -> bytes:
        try:
            made = to_json(evaluate(expression, _Parsed(values)))
            return into.encode(into.decode(made, what=what), what=what)
        except PayloadInvalid as error:
            error.saga, error.step = self.name, step
            raise


class _Parsed(dict[str, Any]):
    """Parses a source's JSON when an expression first reads it."""

    __slots__ = ("_raw",)

    def __init__(self, raw: Mapping[str, bytes]) -> None:
        super().__init__()
        self._raw = raw

    def __missing__(self, source: str) -> Any:
        value = self[source] = from_json(self._raw[source])
        return value


class Saga(Generic[I, R]):
    """A sequence of steps over an input of type I, with a result of type R (None without `.returns`)."""

    __slots__ = (
        "_compiled",
        "_deadline",
        "_drafts",
        "_input",
        "_name",
        "_retention",
        "_returns",
        "_version",
    )

    def __init__(
        self: Saga[X, None],
        name: str,
        input: type[X],
        *,
        version: int = 1,
        deadline: timedelta | None = None,
        retention: timedelta | None = None,
    ) -> None:
        """`deadline` counts from the start and ends the way forward: what is under way is waited for, then undone.

        It does not bound the undo, and past the pivot it means nothing. None, the default, is without end.
        `retention` is how long completed and compensated runs are kept after they closed; None is as the app says. It
        may change without another version; of several versions in one app, the longest counts.
        """
        check_name(name, what="saga")
        if version < 1:
            raise DefinitionError(f"Version {version} of saga {name!r}: versions count from 1.", saga=name)
        if deadline is not None and deadline < timedelta(milliseconds=1):
            raise DefinitionError(
                f"The deadline of saga {name!r} is a positive duration, or None.", saga=name
            )
        if retention is not None and retention <= timedelta(0):
            raise DefinitionError(
                f"The retention of saga {name!r} is a positive duration, or None.", saga=name
            )
        self._name = name
        self._version = version
        self._deadline = deadline
        self._retention = retention
        self._input: Codec[Any] = codec(input, what=f"input of saga {name!r}")
        self._drafts: tuple[_Draft, ...] = ()
        self._returns: Expression | None = None
        self._compiled: SagaDefinition | None = None

    def __repr__(self) -> str:
        return f"Saga({self._name!r}, version={self._version}, steps={len(self._drafts)})"

    @property
    def name(self) -> str:
        """Name of the saga."""
        return self._name

    @property
    def version(self) -> int:
        """Version of the saga; another content needs another version."""
        return self._version

    @property
    def input(self) -> I:
        """Reference to the saga's own input."""
        return cast("I", Ref(SAGA_INPUT, (), self._input.type))

    @overload
    def step(
        self,
        activity: Activity[I, Any, Any],
        /,
        *,
        name: str | None = None,
        kind: StepKind | None = None,
        retry: RetryPolicy | None = None,
        start_to_close: Limit = UNSET,
        no_compensation: str | None = None,
        in_doubt: InDoubt = InDoubt.UNDO,
    ) -> Saga[I, R]: ...

    @overload
    def step(
        self,
        activity: Activity[X, Any, Any],
        /,
        input: X,
        *,
        name: str | None = None,
        kind: StepKind | None = None,
        retry: RetryPolicy | None = None,
        start_to_close: Limit = UNSET,
        no_compensation: str | None = None,
        in_doubt: InDoubt = InDoubt.UNDO,
    ) -> Saga[I, R]: ...

    def step(
        self,
        activity: Any,
        /,
        input: Any = UNSET,
        *,
        name: str | None = None,
        kind: StepKind | None = None,
        retry: RetryPolicy | None = None,
        start_to_close: Limit = UNSET,
        no_compensation: str | None = None,
        in_doubt: InDoubt = InDoubt.UNDO,
    ) -> Saga[I, R]:
        """Return the saga with one more step.

        `input` is a reference (`saga.input.account`, `withdraw.out`) or `make(Type, field=reference, ...)`, for a
        handler with several payload arguments `arguments(reference, ...)`; without it the step takes the saga's own
        input. `name` is the activity's name unless given; two steps with one
        activity need it. `in_doubt` says what is done if nobody knows whether the step has run (row E-04). What else
        is given goes before what the activity says. Raises DefinitionError.
        """
        if not _is_activity(activity):
            raise DefinitionError(
                f"A step is done by an activity, not by a {type(activity).__name__}; "
                "decorate the function with @participant.activity, or declare a contract.",
                saga=self._name,
            )
        draft = _Draft(
            name=activity.name if name is None else name,
            activity=activity,
            expression=self._expression(activity, input),
            kind=activity.kind if kind is None else kind,
            retry=retry,
            start_to_close=start_to_close,
            no_compensation=activity.no_compensation if no_compensation is None else no_compensation,
            in_doubt=in_doubt,
        )
        self._check_draft(draft)
        return self._with((*self._drafts, draft), self._returns)

    def returns(self, result: X, /) -> Saga[I, X]:
        """Return the saga with a result: a reference or `make(...)`, evaluated when the last step is done."""
        expression = as_expression(result, what=f"result of saga {self._name!r}")
        if not isinstance(expression, Ref | Make):
            raise DefinitionError("The result is a reference or make(...), not a constant.", saga=self._name)
        self._check(expression, _type_of(expression), self._drafts, what="The result")
        return cast("Saga[I, X]", self._with(self._drafts, expression))

    def compile(self) -> SagaDefinition:
        """Return the checked definition, made once. Raises DefinitionError."""
        if self._compiled is None:
            made = _compile(
                self._name, self._version, self._deadline, self._input, self._drafts, self._returns
            )
            self._compiled = replace(made, retention=self._retention)
        return self._compiled

    def _with(self, drafts: tuple[_Draft, ...], returns: Expression | None) -> Saga[I, R]:
        saga = cast("Saga[I, R]", object.__new__(Saga))
        saga._name, saga._version, saga._input = self._name, self._version, self._input
        saga._deadline, saga._retention = self._deadline, self._retention
        saga._drafts, saga._returns, saga._compiled = drafts, returns, None
        return saga

    def _expression(self, activity: Activity[Any, Any, Any], input: Any) -> Expression:
        if isinstance(input, Arguments):
            return self._spread(activity, input.values)
        if not isinstance(input, Unset):
            return as_expression(input, what=f"input of {activity.name!r}")
        if activity.input is NONE and self._input is not NONE:
            return as_expression(None, what="no input")
        return Ref(SAGA_INPUT, (), self._input.type)

    def _spread(self, activity: Activity[Any, Any, Any], values: tuple[Any, ...]) -> Expression:
        names = activity.handler.spread if activity.handler is not None else None
        if names is None:
            raise DefinitionError(
                f"Activity {activity.name!r} takes one payload; give the step that, not arguments(...).",
                saga=self._name,
            )
        if len(names) != len(values):
            raise DefinitionError(
                f"Activity {activity.name!r} takes {len(names)} arguments ({', '.join(names)}), not {len(values)}.",
                saga=self._name,
            )
        fields = zip(names, values, strict=True)
        return Make(activity.input.type, {name: as_expression(value, what=name) for name, value in fields})

    def _check_draft(self, draft: _Draft) -> None:
        """Find at the line of the step what later lines cannot mend."""
        check_name(draft.name, what="step")
        if len(self._drafts) >= STEPS_MAX:
            raise DefinitionError(
                f"A saga has at most {STEPS_MAX:,} steps.", saga=self._name, step=draft.name
            )
        if any(before.name == draft.name for before in self._drafts):
            raise DefinitionError(
                f"Two steps are named {draft.name!r}; give the second another with name='...'.",
                saga=self._name,
                step=draft.name,
            )
        pivots = [before for before in self._drafts if before.kind is StepKind.PIVOT]
        wrong = check_kinds([_order_only(each) for each in (*pivots, draft)])
        if wrong is not None:
            raise DefinitionError(wrong, saga=self._name, step=draft.name)
        if pivots:
            _policy_after_pivot(draft, self._name)
        self._check(
            draft.expression, draft.activity.input.type, self._drafts, what=f"Input of step {draft.name!r}"
        )

    def _check(self, expression: Expression, wanted: Any, before: tuple[_Draft, ...], *, what: str) -> None:
        _checked(self._name, self._input, expression, wanted, before, before, what=what)


def _is_activity(value: Any) -> TypeGuard[Activity[Any, Any, Any]]:
    return isinstance(value, Activity)


def _compile(
    name: str,
    version: int,
    deadline: timedelta | None,
    input: Codec[Any],
    drafts: tuple[_Draft, ...],
    returns: Expression | None,
) -> SagaDefinition:
    if not drafts:
        raise DefinitionError(f"Saga {name!r} has no step.", saga=name)
    wrong = check_kinds([_shape(draft) for draft in drafts])
    if wrong is not None:
        raise DefinitionError(wrong, saga=name)
    for draft in drafts:
        _check_doubt(draft, name)
    pivot = next((i for i, draft in enumerate(drafts) if draft.kind is StepKind.PIVOT), len(drafts))
    engine = Definition(
        name,
        version,
        tuple(_engine_step(draft, name, past_pivot=i > pivot) for i, draft in enumerate(drafts)),
        deadline_ms=None if deadline is None else deadline // timedelta(milliseconds=1),
    )
    steps = tuple(_step(name, input, drafts, index) for index in range(len(drafts)))
    output: Codec[Any] = NONE
    result: Expression | None = None
    if returns is not None:
        output = codec(_type_of(returns), what=f"result of saga {name!r}")
        result = _checked(name, input, returns, output.type, drafts, drafts, what="The result")
    return SagaDefinition(
        engine=engine,
        input=input,
        output=output,
        steps=steps,
        returns=result,
        result_needs=frozenset() if result is None else sources(result) - {SAGA_INPUT},
        content=_content(engine, input, output, steps, result),
    )


def _step(saga: str, input: Codec[Any], drafts: tuple[_Draft, ...], index: int) -> StepDefinition:
    draft = drafts[index]
    takes = draft.activity.input
    what = f"Input of step {draft.name!r}"
    expression = _checked(saga, input, draft.expression, takes.type, drafts[:index], drafts, what=what)
    unchanged = (
        isinstance(expression, Ref) and ref_parts(expression) == (SAGA_INPUT, ()) and input.type == takes.type
    )
    return StepDefinition(
        name=draft.name,
        activity=draft.activity,
        queue=draft.activity.queue,
        expression=expression,
        needs=sources(expression) - {SAGA_INPUT},
        unchanged=unchanged,
    )


# --- references -------------------------------------------------------------------------------


def _checked(
    saga: str,
    input: Codec[Any],
    expression: Expression,
    wanted: Any,
    before: tuple[_Draft, ...],
    known: tuple[_Draft, ...],
    *,
    what: str,
) -> Expression:
    """Return the expression with every reference naming its step, or raise DefinitionError.

    `before` are the steps whose outputs are there, `known` all steps that are declared so far.
    """
    types = {SAGA_INPUT: input.type}
    if sources(expression) - types.keys():
        types |= {draft.name: draft.activity.output.type for draft in before}
    try:
        resolved = resolve(expression, lambda ref: _step_of(ref, known, what))
        check(resolved, wanted, types, what=what)
    except DefinitionError as error:
        error.saga = saga
        raise
    return resolved


def _step_of(ref: Ref, drafts: tuple[_Draft, ...], what: str) -> str:
    source, _ = ref_parts(ref)
    owner = ref_owner(ref)
    if owner is None:
        return source
    if object.__getattribute__(ref, "_named"):
        other = next((each for each in drafts if each.name == source and each.activity.owner != owner), None)
        if other is not None:
            raise DefinitionError(
                f"{what}: step {source!r} is done by {other.activity.name!r}, not by {owner.activity!r}."
            )
        return source
    serves = [draft.name for draft in drafts if draft.activity.owner == owner]
    if len(serves) > 1:
        raise DefinitionError(
            f"{what}: {describe(ref)} could be the output of {', '.join(serves)}; "
            f"say which: {owner.activity}.at({serves[0]!r}).out."
        )
    return serves[0] if serves else source


def _type_of(expression: Expression) -> Any:
    return ref_type(expression) if isinstance(expression, Ref) else cast("Make", expression).type


# --- kinds, schedules, limits -----------------------------------------------------------------


def _order_only(draft: _Draft) -> StepShape:
    """The shape as far as the step's own line decides it: a compensation may be declared further down."""
    return StepShape(draft.name, draft.kind, draft.kind is StepKind.COMPENSATABLE, no_compensation=None)


def _shape(draft: _Draft) -> StepShape:
    undoable = draft.activity.has_compensation and draft.kind is StepKind.COMPENSATABLE
    return StepShape(draft.name, draft.kind, undoable, draft.no_compensation)


def _check_doubt(draft: _Draft, saga: str) -> None:
    """Refuse a policy that could never apply, and a pivot of which nobody could ever tell whether it has run."""
    if draft.in_doubt is not InDoubt.UNDO and not _shape(draft).has_compensation:
        raise DefinitionError(
            f"Step {draft.name!r} has no compensation, so in_doubt={draft.in_doubt.value!r} has nothing to settle; "
            "leave it out.",
            saga=saga,
            step=draft.name,
        )
    activity = draft.activity
    if draft.kind is StepKind.PIVOT and activity.at_least_once and activity.inquiry_ is None:
        raise DefinitionError(
            f"Step {draft.name!r} is a pivot outside the database: after a crash only an inquiry can tell whether it "
            f"has run. Declare one with @{draft.activity.name}.inquiry.",
            saga=saga,
            step=draft.name,
        )


def _policy_after_pivot(draft: _Draft, saga: str) -> RetryPolicy:
    """Past the pivot there is only forward: without end, and with an incident on the way (row E-05)."""
    if draft.retry is not None and not draft.retry.endless:
        raise DefinitionError(
            f"Step {draft.name!r} stands after the pivot, where retries cannot end; "
            "leave retry out, or write attempts=None, schedule_to_close=None.",
            saga=saga,
            step=draft.name,
        )
    policy = draft.retry or draft.activity.retry
    return _with_incident(policy) if policy.endless else COMPENSATION


def _with_incident(policy: RetryPolicy) -> RetryPolicy:
    return policy if policy.incident_at is not None else replace(policy, incident_at=COMPENSATION.incident_at)


def _engine_step(draft: _Draft, saga: str, *, past_pivot: bool) -> Step:
    shape, undo = _shape(draft), draft.activity.compensation_
    limit = draft.activity.start_to_close if isinstance(draft.start_to_close, Unset) else draft.start_to_close
    return Step(
        name=draft.name,
        kind=draft.kind,
        has_compensation=shape.has_compensation,
        no_compensation=draft.no_compensation,
        retry=_policy_after_pivot(draft, saga) if past_pivot else draft.retry or draft.activity.retry,
        undo_retry=COMPENSATION if undo is None else _with_incident(undo.retry),
        start_to_close_ms=_ms(limit),
        undo_start_to_close_ms=_ms(limit if undo is None else undo.start_to_close),
        in_doubt=draft.in_doubt,
    )


def _ms(duration: timedelta | None) -> int | None:
    return None if duration is None else duration // timedelta(milliseconds=1)


# --- fingerprint ------------------------------------------------------------------------------


def _content(
    engine: Definition,
    input: Codec[Any],
    output: Codec[Any],
    steps: tuple[StepDefinition, ...],
    returns: Expression | None,
) -> str:
    """Return the canonical JSON. Each payload schema stands in it once, under its own hash."""
    schemas: dict[str, Any] = {}

    def schema(of: Codec[Any]) -> str:
        shape = _without_prose(of.schema())
        key = hashlib.sha256(_canonical(shape).encode()).hexdigest()[:16]
        schemas[key] = shape
        return key

    return _canonical(
        {
            "format": CONTENT_FORMAT,
            "name": engine.name,
            "version": engine.version,
            "input": schema(input),
            "steps": [
                {
                    "name": run.name,
                    "activity": step.activity.name,
                    "queue": step.queue,
                    "kind": run.kind,
                    "compensated": run.has_compensation,
                    "no_compensation": run.no_compensation,
                    "input": to_data(step.expression),
                    "input_schema": schema(step.activity.input),
                    "output_schema": schema(step.activity.output),
                    "retry": _retry_data(run.retry),
                    "undo_retry": _retry_data(run.undo_retry) if run.has_compensation else None,
                    "start_to_close_ms": run.start_to_close_ms,
                    "undo_start_to_close_ms": run.undo_start_to_close_ms if run.has_compensation else None,
                    **({} if run.in_doubt is InDoubt.UNDO else {"in_doubt": run.in_doubt}),
                }
                for run, step in zip(engine.steps, steps, strict=True)
            ],
            "result": None if returns is None else {"from": to_data(returns), "schema": schema(output)},
            "schemas": schemas,
            # left out where there is none: the fingerprints of before stay as they are
            **({} if engine.deadline_ms is None else {"deadline_ms": engine.deadline_ms}),
        }
    )


def _retry_data(policy: RetryPolicy) -> dict[str, Any]:
    return {
        "initial_ms": _ms(policy.initial),
        "factor": float(policy.factor),
        "maximum_ms": _ms(policy.maximum),
        "attempts": policy.attempts,
        "schedule_to_close_ms": _ms(policy.schedule_to_close),
        "incident_at": policy.incident_at,
    }


_PROSE: Final = frozenset({"title", "description", "examples"})
_MAPS_OF_SCHEMAS: Final = frozenset({"properties", "patternProperties", "$defs"})
_PLAIN_VALUES: Final = frozenset({"default", "const", "enum"})


def _without_prose(schema: JsonValue) -> JsonValue:
    """Return the schema without what only people read, and without the order in which fields were written."""
    if isinstance(schema, list):
        return [_without_prose(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    shape: dict[str, JsonValue] = {}
    for key, value in schema.items():
        if key in _PLAIN_VALUES:
            shape[key] = value
        elif key in _MAPS_OF_SCHEMAS and isinstance(value, dict):
            shape[key] = {name: _without_prose(each) for name, each in value.items()}
        elif key == "required" and isinstance(value, list):
            shape[key] = sorted(value, key=str)
        elif key not in _PROSE:
            shape[key] = _without_prose(value)
    return shape


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

"""Activities declared once: name, queue, types, limits and compensation, with or without their implementation.

    accounts = Participant("accounts", start_to_close=timedelta(seconds=30))

    @accounts.activity
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt: ...

    @withdraw.compensation
    async def refund(transfer: Transfer, session: AsyncSession) -> None: ...

A handler gets what it annotates: its payload, an `AsyncSession` (the barrier's transaction), an `ActivityContext`; a
compensation also the activity's output and undo data, by their types. A plain `def` is a handler too: it runs in a
thread, with a `sqlalchemy.orm.Session`. The decorated name stays callable as the plain function, for unit tests.
`contract()` declares the same without a body, for services that only send the command.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Final,
    Generic,
    ParamSpec,
    TypeVar,
    TypeVarTuple,
    cast,
    get_args,
    get_origin,
    overload,
)

from saga.compensation.kinds import StepKind
from saga.definition.handlers import Handler, Read, read_handler
from saga.definition.refs import Arguments, Owner, Ref
from saga.errors import DefinitionError, DuplicateActivity
from saga.outcomes import ActivityContext, Inquiry, Refused, Result
from saga.payloads import NONE, Codec, codec
from saga.retry import COMPENSATION, FORWARD, RetryPolicy

I = TypeVar("I")  # noqa: E741 - I for input, O for output, U for undo data
O = TypeVar("O")  # noqa: E741
U = TypeVar("U")
P = ParamSpec("P")
Ts = TypeVarTuple("Ts")
# Payload arguments as a type checker can tell them from a session and a context: not those that are dataclasses.
A = TypeVar("A", bound="Payload")
B = TypeVar("B", bound="Payload")
N = TypeVar("N", bound="Injected")
M = TypeVar("M", bound="Injected")
F = TypeVar("F", bound=Callable[..., Any])


class Unset:
    """Marks a limit that was not given, because None means: without limit, and must be written."""


UNSET: Final = Unset()
Limit = timedelta | None | Unset


@dataclass(frozen=True)
class Compensation:
    """How an activity is undone."""

    handler: Handler | None
    start_to_close: timedelta | None
    retry: RetryPolicy


@dataclass(eq=False)
class Activity(Generic[I, O, P]):
    """What a participant can do. Made by `Participant.activity` or `Participant.contract`."""

    name: str
    participant: Participant
    queue: str
    kind: StepKind
    input: Codec[Any]
    output: Codec[Any]
    undo: Codec[Any]
    """Type of the undo data; None's codec where `Result` is not used."""
    handler: Handler | None
    start_to_close: timedelta | None
    retry: RetryPolicy
    no_compensation: str | None
    non_retryable: tuple[type[BaseException], ...]
    at_least_once: bool = False
    """Its effects are outside the participant's database (row D-11)."""
    compensation_: Compensation | None = field(default=None)
    inquiry_: Handler | None = field(default=None)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Call the plain function, as a unit test does; no barrier, no messages."""
        if self.handler is None:
            raise DefinitionError(
                f"Activity {self.name!r} is a contract without implementation.", step=self.name
            )
        return self.handler.function(*args, **kwargs)

    @property
    def out(self) -> O:
        """Reference to the output of the one step that this activity serves."""
        return cast("O", Ref(self.name, (), self.output.type, self.owner, named=False))

    def at(self, step: str) -> StepReference[O]:
        """Refer to the step named `step`, where one activity serves several steps."""
        return StepReference(step, self.output, self.owner)

    @property
    def owner(self) -> Owner:
        """What tells this activity from every other: contract and implementation of one activity share it."""
        return Owner(self.queue, self.name)

    @property
    def has_compensation(self) -> bool:
        """Whether the activity can be undone."""
        return self.compensation_ is not None

    @overload
    def compensation(self, function: F, /) -> F: ...

    @overload
    def compensation(
        self, /, *, start_to_close: Limit = UNSET, retry: RetryPolicy = COMPENSATION, batch: int | None = None
    ) -> Callable[[F], F]: ...

    def compensation(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        start_to_close: Limit = UNSET,
        retry: RetryPolicy = COMPENSATION,
        batch: int | None = None,
    ) -> Any:
        """Declare how this activity is undone. Takes the same input; may ask for the output and undo data by type.

        `batch=N`: takes lists (inputs, and outputs or undo data where asked for) of equal length and returns nothing
        or a list of None and Refused. `retry` has no end, because an undo is never given up (row E-06). Raises
        DefinitionError, DuplicateActivity.
        """
        _check_endless(retry, self.name)

        def declare(function: F) -> F:
            if self.compensation_ is not None and self.compensation_.handler is not None:
                raise DuplicateActivity(f"Activity {self.name!r} has two compensations.", step=self.name)
            limit = self.start_to_close if isinstance(start_to_close, Unset) else start_to_close
            self.compensation_ = Compensation(self._undo_handler(function, batch), limit, retry)
            return function

        return declare if function is None else declare(function)

    @overload
    def inquiry(
        self, function: Callable[..., Awaitable[O | Inquiry]], /
    ) -> Callable[..., Awaitable[Any]]: ...

    @overload
    def inquiry(self, function: Callable[..., O | Inquiry], /) -> Callable[..., Any]: ...

    def inquiry(self, function: Callable[..., Any], /) -> Callable[..., Any]:
        """Declare how to find out whether an attempt that was begun has had its effect (row D-11).

        Takes the same input, and an `ActivityContext` whose `operation_key` is the one that the attempt passed on.
        Returns the activity's output if its effect stands, `Inquiry.DONE` where that is None, else `Inquiry.NOT_DONE`
        (also if it was undone since) or `Inquiry.UNKNOWN`; raising, and taking longer than `start_to_close`, mean
        unknown. Raises DefinitionError, DuplicateActivity.
        """
        what = f"inquiry of {self.name!r}"
        if not self.at_least_once:
            raise DefinitionError(
                f"{what}: the barrier knows what became of each attempt, so there is nothing to ask; "
                "an inquiry belongs to an activity with at_least_once=True.",
                step=self.name,
            )
        if self.inquiry_ is not None:
            raise DuplicateActivity(f"Activity {self.name!r} has two inquiries.", step=self.name)
        read = read_handler(function, what=what, batch=None, undoing=True)
        other = next((name for name, type_ in read.payload.items() if type_ != self.input.type), None)
        if other is not None or read.session is not None:
            raise DefinitionError(
                f"{what}: it takes the activity's input ({self.input.name}) and an ActivityContext, nothing else.",
                step=self.name,
            )
        argument = next(iter(read.payload), None)
        self.inquiry_ = Handler(function, argument, None, None, read.context, threaded=read.threaded)
        return function

    def _undo_handler(self, function: Callable[..., Any], batch: int | None) -> Handler:
        what = f"compensation of {self.name!r}"
        read = read_handler(function, what=what, batch=batch, undoing=True)
        handler: dict[str, Any] = {}
        for name, type_ in read.payload.items():
            plain, optional = _without_none(type_)
            if "payload_argument" not in handler and type_ == self.input.type:
                handler["payload_argument"] = name
            elif "undo_argument" not in handler and self.undo is not NONE and plain == self.undo.type:
                handler |= {"undo_argument": name, "undo_optional": optional}
            elif "output_argument" not in handler and plain == self.output.type:
                handler |= {"output_argument": name, "output_optional": optional}
            elif self.handler is not None and name in (self.handler.spread or ()):
                handler["spread"] = self.handler.spread
            else:
                raise DefinitionError(
                    f"{what}: argument {name!r} is neither the activity's input ({self.input.name}), its output "
                    f"({self.output.name}) nor its undo data ({self.undo.name}).",
                    step=self.name,
                )
        if self.at_least_once:
            _check_outside(what, self.name, read, batch)
            for kind in ("output", "undo"):
                if f"{kind}_argument" in handler and not handler[f"{kind}_optional"]:
                    raise DefinitionError(
                        f"{what}: the action may have run without leaving its {kind}, so "
                        f"{handler[f'{kind}_argument']!r} must accept None: annotate it `... | None`.",
                        step=self.name,
                    )
        return Handler(
            function=function,
            payload_argument=handler.get("payload_argument"),
            spread=handler.get("spread"),
            session_argument=read.session,
            context_argument=read.context,
            output_argument=handler.get("output_argument"),
            output_optional=handler.get("output_optional", False),
            undo_argument=handler.get("undo_argument"),
            undo_optional=handler.get("undo_optional", False),
            batch=batch,
            threaded=read.threaded,
        )


@dataclass(frozen=True)
class StepReference(Generic[O]):
    """A step by name, typed as its activity's output."""

    step: str
    output: Codec[Any]
    owner: Owner

    @property
    def out(self) -> O:
        """Reference to the output of that step."""
        return cast("O", Ref(self.step, (), self.output.type, self.owner))


class Participant:
    """A service that owns activities; its name is the queue that its commands come on.

    `start_to_close` bounds one attempt of each activity that does not say otherwise; it must be given here or there,
    and None, for no bound, must be written.
    """

    def __init__(self, name: str, *, start_to_close: Limit = UNSET, retry: RetryPolicy = FORWARD) -> None:
        check_name(name, what="participant")
        self.name = name
        self.start_to_close = start_to_close
        self.retry = retry
        self.activities: dict[str, Activity[Any, Any, Any]] = {}

    def __repr__(self) -> str:
        return f"Participant({self.name!r})"

    @overload
    def activity(
        self, function: Callable[[A, B, *Ts, N, M], Awaitable[Result[O, U]]], /
    ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
    @overload
    def activity(
        self, function: Callable[[A, B, *Ts, N, M], Awaitable[O]], /
    ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
    @overload
    def activity(
        self, function: Callable[[A, B, *Ts, N], Awaitable[Result[O, U]]], /
    ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
    @overload
    def activity(
        self, function: Callable[[A, B, *Ts, N], Awaitable[O]], /
    ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
    @overload
    def activity(
        self, function: Callable[[A, B, *Ts], Awaitable[Result[O, U]]], /
    ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
    @overload
    def activity(
        self, function: Callable[[A, B, *Ts], Awaitable[O]], /
    ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
    @overload
    def activity(
        self, function: Callable[[A, B, *Ts, N, M], Result[O, U]], /
    ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
    @overload
    def activity(
        self, function: Callable[[A, B, *Ts, N, M], O], /
    ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
    @overload
    def activity(
        self, function: Callable[[A, B, *Ts, N], Result[O, U]], /
    ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
    @overload
    def activity(
        self, function: Callable[[A, B, *Ts, N], O], /
    ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
    @overload
    def activity(
        self, function: Callable[[A, B, *Ts], Result[O, U]], /
    ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
    @overload
    def activity(self, function: Callable[[A, B, *Ts], O], /) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
    @overload
    def activity(
        self, function: Callable[Concatenate[I, P], Awaitable[Result[O, U]]], /
    ) -> Activity[I, O, Concatenate[I, P]]: ...
    @overload
    def activity(
        self, function: Callable[Concatenate[I, P], Awaitable[O]], /
    ) -> Activity[I, O, Concatenate[I, P]]: ...
    @overload
    def activity(
        self, function: Callable[Concatenate[I, P], Result[O, U]], /
    ) -> Activity[I, O, Concatenate[I, P]]: ...
    @overload
    def activity(self, function: Callable[Concatenate[I, P], O], /) -> Activity[I, O, Concatenate[I, P]]: ...

    @overload
    def activity(
        self,
        /,
        *,
        batch: int,
        name: str | None = None,
        queue: str | None = None,
        kind: StepKind = StepKind.COMPENSATABLE,
        start_to_close: Limit = UNSET,
        retry: RetryPolicy | None = None,
        no_compensation: str | None = None,
        non_retryable: Sequence[type[BaseException]] = (),
    ) -> _BatchDecorator: ...

    @overload
    def activity(
        self,
        /,
        *,
        name: str | None = None,
        queue: str | None = None,
        kind: StepKind = StepKind.COMPENSATABLE,
        start_to_close: Limit = UNSET,
        retry: RetryPolicy | None = None,
        no_compensation: str | None = None,
        non_retryable: Sequence[type[BaseException]] = (),
        at_least_once: bool = False,
    ) -> _Decorator: ...

    def activity(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        queue: str | None = None,
        kind: StepKind = StepKind.COMPENSATABLE,
        start_to_close: Limit = UNSET,
        retry: RetryPolicy | None = None,
        no_compensation: str | None = None,
        non_retryable: Sequence[type[BaseException]] = (),
        batch: int | None = None,
        at_least_once: bool = False,
    ) -> Any:
        """Declare an activity by its implementation.

        The function takes its payload first, then what it needs of an `AsyncSession` and an `ActivityContext`. Several
        payload arguments travel as one generated model; a step gives them by `arguments(...)`.
        An `async def` runs on the event loop; a plain `def` in one of 32 threads, with a `sqlalchemy.orm.Session`.
        Nothing can end a thread: at `start_to_close` its command is answered as timed out and what it wrote is never
        committed, but it keeps its thread, its connection and on SQLite the writer until it returns.
        `batch=N` (1 to 1,000): the function takes a list of up to N inputs in one session and returns a list of as
        many outputs, `Result`s or `Refused`; an item answered `Refused` must have written nothing (P24).
        `non_retryable` names exceptions that no retry can mend.
        `at_least_once=True` is for effects outside the participant's database: no session and no batch; a row is
        committed before each call, and `ctx.operation_key` is what the other side must know duplicates by (row D-11).
        Raises DefinitionError, DuplicateActivity.
        """

        def declare(function: Callable[..., Any]) -> Activity[Any, Any, Any]:
            activity_name = name or function.__name__
            read = read_handler(function, what=f"activity {activity_name!r}", batch=batch)
            if at_least_once:
                _check_outside(f"activity {activity_name!r}", activity_name, read, batch)
            return self._declare(
                activity_name,
                read.input,
                read.output,
                read.undo,
                Handler(
                    function,
                    read.payload_argument,
                    read.spread,
                    read.session,
                    read.context,
                    batch=batch,
                    threaded=read.threaded,
                ),
                queue=queue,
                kind=kind,
                start_to_close=start_to_close,
                retry=retry,
                no_compensation=no_compensation,
                non_retryable=tuple(non_retryable),
                at_least_once=at_least_once,
            )

        return declare if function is None else declare(function)

    def contract(
        self,
        name: str,
        input: type[I],
        output: type[O],
        *,
        compensated: bool = False,
        queue: str | None = None,
        kind: StepKind = StepKind.COMPENSATABLE,
        start_to_close: Limit = UNSET,
        retry: RetryPolicy | None = None,
        compensation_retry: RetryPolicy = COMPENSATION,
        no_compensation: str | None = None,
    ) -> Activity[I, O, Any]:
        """Declare an activity that another service implements, in Python or any language: types, no code."""
        activity: Activity[I, O, Any] = self._declare(
            name,
            codec(input, what=f"contract {name!r}, input"),
            codec(output, what=f"contract {name!r}, output"),
            NONE,
            None,
            queue=queue,
            kind=kind,
            start_to_close=start_to_close,
            retry=retry,
            no_compensation=no_compensation,
            non_retryable=(),
        )
        if compensated:
            _check_endless(compensation_retry, name)
            activity.compensation_ = Compensation(None, activity.start_to_close, compensation_retry)
        return activity

    def _declare(
        self,
        name: str,
        input: Codec[Any],
        output: Codec[Any],
        undo: Codec[Any],
        handler: Handler | None,
        *,
        queue: str | None,
        kind: StepKind,
        start_to_close: Limit,
        retry: RetryPolicy | None,
        no_compensation: str | None,
        non_retryable: tuple[type[BaseException], ...],
        at_least_once: bool = False,
    ) -> Activity[Any, Any, Any]:
        check_name(name, what="activity")
        if name in self.activities:
            raise DuplicateActivity(
                f"Participant {self.name!r} has two activities named {name!r}.", step=name
            )
        limit = self.start_to_close if isinstance(start_to_close, Unset) else start_to_close
        if isinstance(limit, Unset):
            raise DefinitionError(
                f"Activity {name!r} has no start_to_close: give it, here or as the participant's default, "
                "or write start_to_close=None for no bound.",
                step=name,
            )
        activity: Activity[Any, Any, Any] = Activity(
            name=name,
            participant=self,
            queue=queue or self.name,
            kind=kind,
            input=input,
            output=output,
            undo=undo,
            handler=handler,
            start_to_close=limit,
            retry=retry or self.retry,
            no_compensation=no_compensation,
            non_retryable=non_retryable,
            at_least_once=at_least_once,
        )
        self.activities[name] = activity
        return activity


if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import date, time
    from decimal import Decimal
    from enum import Enum
    from typing import Protocol

    from pydantic import BaseModel

    class _Session(Protocol):
        """An AsyncSession, which this package must not import."""

        @property
        def sync_session_class(self) -> Any: ...

    class _PlainSession(Protocol):
        """A Session, likewise."""

        @property
        def hash_key(self) -> int: ...

    class _Uuid(Protocol):
        """A UUID, which this package does not import so that it makes none."""

        @property
        def urn(self) -> str: ...

    Injected = _Session | _PlainSession | ActivityContext
    Payload = (
        BaseModel
        | str
        | bytes
        | float
        | Decimal
        | date
        | time
        | timedelta
        | _Uuid
        | Enum
        | Sequence[Any]
        | Mapping[Any, Any]
        | set[Any]
        | frozenset[Any]
        | None
    )

    class _Decorator(Protocol):
        """What `activity(...)` returns: makes an activity of a handler for one command."""

        @overload
        def __call__(
            self, function: Callable[[A, B, *Ts, N, M], Awaitable[Result[O, U]]], /
        ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
        @overload
        def __call__(
            self, function: Callable[[A, B, *Ts, N, M], Awaitable[O]], /
        ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
        @overload
        def __call__(
            self, function: Callable[[A, B, *Ts, N], Awaitable[Result[O, U]]], /
        ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
        @overload
        def __call__(
            self, function: Callable[[A, B, *Ts, N], Awaitable[O]], /
        ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
        @overload
        def __call__(
            self, function: Callable[[A, B, *Ts], Awaitable[Result[O, U]]], /
        ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
        @overload
        def __call__(
            self, function: Callable[[A, B, *Ts], Awaitable[O]], /
        ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
        @overload
        def __call__(
            self, function: Callable[[A, B, *Ts, N, M], Result[O, U]], /
        ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
        @overload
        def __call__(
            self, function: Callable[[A, B, *Ts, N, M], O], /
        ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
        @overload
        def __call__(
            self, function: Callable[[A, B, *Ts, N], Result[O, U]], /
        ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
        @overload
        def __call__(
            self, function: Callable[[A, B, *Ts, N], O], /
        ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
        @overload
        def __call__(
            self, function: Callable[[A, B, *Ts], Result[O, U]], /
        ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
        @overload
        def __call__(
            self, function: Callable[[A, B, *Ts], O], /
        ) -> Activity[Arguments[A, B, *Ts], O, ...]: ...
        @overload
        def __call__(
            self, function: Callable[Concatenate[I, P], Awaitable[Result[O, U]]], /
        ) -> Activity[I, O, Concatenate[I, P]]: ...
        @overload
        def __call__(
            self, function: Callable[Concatenate[I, P], Awaitable[O]], /
        ) -> Activity[I, O, Concatenate[I, P]]: ...
        @overload
        def __call__(
            self, function: Callable[Concatenate[I, P], Result[O, U]], /
        ) -> Activity[I, O, Concatenate[I, P]]: ...
        @overload
        def __call__(
            self, function: Callable[Concatenate[I, P], O], /
        ) -> Activity[I, O, Concatenate[I, P]]: ...

    class _BatchDecorator(Protocol):
        """What `activity(batch=...)` returns: makes an activity of a handler for a list of commands."""

        @overload
        def __call__(
            self,
            function: Callable[Concatenate[list[I], P], Awaitable[Sequence[Result[O, U] | Refused]]],
            /,
        ) -> Activity[I, O, Concatenate[list[I], P]]: ...
        @overload
        def __call__(
            self, function: Callable[Concatenate[list[I], P], Awaitable[Sequence[O | Refused]]], /
        ) -> Activity[I, O, Concatenate[list[I], P]]: ...
        @overload
        def __call__(
            self, function: Callable[Concatenate[list[I], P], Sequence[Result[O, U] | Refused]], /
        ) -> Activity[I, O, Concatenate[list[I], P]]: ...
        @overload
        def __call__(
            self, function: Callable[Concatenate[list[I], P], Sequence[O | Refused]], /
        ) -> Activity[I, O, Concatenate[list[I], P]]: ...


def _check_outside(what: str, step: str, read: Read, batch: int | None) -> None:
    """What is at least once has no part in a transaction of ours, and one row for each call."""
    if read.session is not None or batch is not None:
        unfit = "a session" if read.session is not None else "batch"
        raise DefinitionError(
            f"{what} is at_least_once, so it cannot have {unfit}: its effects are outside the database. "
            "Writes of its own belong to an activity of their own.",
            step=step,
        )


def _without_none(type_: Any) -> tuple[Any, bool]:
    members = get_args(type_)
    if get_origin(type_) is None or type(None) not in members:
        return type_, False
    rest = [member for member in members if member is not type(None)]
    return (rest[0] if len(rest) == 1 else type_), True


def _check_endless(retry: RetryPolicy, activity: str) -> None:
    if not retry.endless:
        raise DefinitionError(
            f"The compensation of {activity!r} is retried until it succeeds; "
            "write attempts=None, schedule_to_close=None in its retry policy.",
            step=activity,
        )


def check_name(name: str, *, what: str) -> None:
    """Raise DefinitionError unless `name` can stand in a queue name: 1 to 100 letters, digits, '-', '_'."""
    if (
        not 1 <= len(name) <= 100
        or not name.replace("-", "").replace("_", "").isalnum()
        or not name.isascii()
    ):
        raise DefinitionError(f"{name!r} cannot name a {what}: 1 to 100 ASCII letters, digits, '-' or '_'.")

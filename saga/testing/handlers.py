"""The participants of an environment: the user's handlers, or stand-ins, each told what goes wrong and kept account of.

What a handler has done is written down in its own transaction, in the order of the commits, so that `done` never tells
of anything that was rolled back. A handler without a session has no transaction to write in: it counts when it first
returns, because what it does is at least once, and its barrier row is all that a copy can repeat.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from sqlalchemy import Boolean, Column, Connection, Insert, Integer, MetaData, Table, Text, insert, select

from saga.definition.activity import Activity, Compensation, Participant
from saga.definition.handlers import Handler
from saga.definition.refs import Owner
from saga.errors import ConfigurationError, PayloadInvalid
from saga.outcomes import ActivityContext, Refused
from saga.payloads import NONE, Codec
from saga.testing.faults import FaultKind, Faults, InjectedFailure

T = TypeVar("T")
StandIns = Mapping[Activity[Any, Any, Any], Any]
"""By activity: its output, or a function of its input that returns or raises what the activity would."""

_CONTEXT: Final = "saga_testing_context"
_INPUT: Final = "saga_testing_input"
_SIMPLEST: Final = (b"null", b"{}", b'""', b"0", b"[]", b"false")

_ledger: Final = Table(
    "saga_testing_done",
    MetaData(),
    Column("number", Integer, primary_key=True),
    Column("run_id", Text, nullable=False),
    Column("step", Text, nullable=False),
    Column("undo", Boolean, nullable=False),
)
_LINE: Final = insert(_ledger)
# lint: allow namespace because the table is the test's own
_LINES: Final = select(_ledger)


@dataclass
class Ledger:
    """What the participants have done and undone."""

    _numbers: int = 0
    _without_session: dict[tuple[str, str, bool], int] = field(
        default_factory=dict[tuple[str, str, bool], int]
    )

    @staticmethod
    def create(connection: Connection) -> None:
        """Make the table."""
        _ledger.create(connection, checkfirst=True)

    def line(
        self, context: ActivityContext, undo: bool, *, session: bool
    ) -> tuple[Insert, dict[str, Any]] | None:
        """Note that a handler has done its work, or return what notes it in its session if it has one."""
        self._numbers += 1
        what = (context.run_id, context.step, undo)
        if session:
            return _LINE, dict(zip(_ledger.columns.keys(), (self._numbers, *what), strict=True))
        self._without_session.setdefault(what, self._numbers)
        return None

    def read(self, connection: Connection, run_id: str) -> tuple[str, ...]:
        """Return what was done for one run, in the order of the commits: `withdraw`, `undo withdraw`."""
        rows = [tuple(row) for row in connection.execute(_LINES)]
        rows += [(number, *what) for what, number in self._without_session.items()]
        mine = sorted(row for row in rows if row[1] == run_id)
        return tuple(f"undo {step}" if undo else str(step) for _, _, step, undo in mine)


@dataclass
class Stage:
    """What the handlers of an environment share with it."""

    faults: Faults
    die: Callable[[], None]
    """Kills the participants' process."""
    ledger: Ledger = field(default_factory=Ledger)
    running: Counter[str] = field(default_factory=Counter[str])
    """Handlers that run now, by what they do."""
    loop: asyncio.AbstractEventLoop | None = None
    """Of the environment, where all of this is changed; set before the first handler runs."""

    def on_loop(self, function: Callable[[], T]) -> T:
        """Run a function there, for a handler in a thread."""
        assert self.loop is not None
        ended: Future[T] = Future()

        def call() -> None:
            try:
                ended.set_result(function())
            except BaseException as error:
                ended.set_exception(error)

        self.loop.call_soon_threadsafe(call)
        return ended.result()


def participants(
    activities: Iterable[Activity[Any, Any, Any]],
    implementations: Iterable[Participant],
    stand_ins: StandIns,
    stage: Stage,
) -> list[Participant]:
    """Return participants that serve these activities: by their own handlers, by those given, else by stand-ins.

    Raises ConfigurationError for a contract whose output nobody can make up.
    """
    own = {each.owner: each for participant in implementations for each in participant.activities.values()}
    says = {activity.owner: said for activity, said in stand_ins.items()}
    made: dict[str, Participant] = {}
    for activity in activities:
        implemented = own.get(activity.owner, activity)
        owner = activity.participant
        serving = made.setdefault(owner.name, Participant(owner.name, start_to_close=None))
        if activity.name not in serving.activities:
            serving.activities[activity.name] = _staged(implemented, says, stage)
    return list(made.values())


def _staged(
    activity: Activity[Any, Any, Any], says: Mapping[Owner, Any], stage: Stage
) -> Activity[Any, Any, Any]:
    forward, undo = activity.handler, activity.compensation_
    if forward is None or activity.owner in says:
        forward = _stand_in(activity, says)
        undo = None if undo is None else replace(undo, handler=Handler(_nothing, None, None, None, None))
    return replace(
        activity, handler=_watched(forward, stage, undo=False), compensation_=_staged_undo(undo, stage)
    )


def _staged_undo(undo: Compensation | None, stage: Stage) -> Compensation | None:
    if undo is None or undo.handler is None:
        return undo
    return replace(undo, handler=_watched(undo.handler, stage, undo=True))


# --- a handler under watch --------------------------------------------------------------------


def _watched(handler: Handler, stage: Stage, *, undo: bool) -> Handler:
    """Return the handler with its faults before it and its line in the ledger behind it; batches are of one."""
    asks = handler.context_argument is not None

    asked = handler.context_argument or _CONTEXT

    def begin(arguments: dict[str, Any]) -> ActivityContext:
        context: ActivityContext = arguments[asked] if asks else arguments.pop(asked)
        stage.running[_doing(context, undo)] += 1
        return context

    def end(context: ActivityContext) -> None:
        stage.running[_doing(context, undo)] -= 1

    def dies(context: ActivityContext) -> bool:
        if stage.faults.strike({FaultKind.CRASH_UNCOMMITTED}, context.step, undo=undo) is None:
            return False
        stage.die()
        return True

    def line(context: ActivityContext) -> tuple[Insert, dict[str, Any]] | None:
        return stage.ledger.line(context, undo, session=handler.session_argument is not None)

    async def run(**arguments: Any) -> Any:
        context = begin(arguments)
        try:
            _strike(stage.faults, context.step, undo)
            value = _single(await handler.function(**_given(handler, arguments)), handler)
            if dies(context):
                await asyncio.get_running_loop().create_future()  # this task is being killed
            if (done := line(context)) is not None:
                await arguments[handler.session_argument or ""].execute(*done)
            return value
        finally:
            end(context)

    def run_in_thread(**arguments: Any) -> Any:
        context = stage.on_loop(lambda: begin(arguments))
        try:
            stage.on_loop(lambda: _strike(stage.faults, context.step, undo))
            value = _single(handler.function(**_given(handler, arguments)), handler)
            if stage.on_loop(lambda: dies(context)):
                raise InjectedFailure("the process of this thread has died")
            if (done := stage.on_loop(lambda: line(context))) is not None:
                arguments[handler.session_argument or ""].execute(*done)
            return value
        finally:
            stage.on_loop(lambda: end(context))

    return replace(
        handler, function=run_in_thread if handler.threaded else run, context_argument=asked, batch=None
    )


def _doing(context: ActivityContext, undo: bool) -> str:
    return f"undo {context.step}" if undo else context.step


def _strike(faults: Faults, step: str, undo: bool) -> None:
    fault = faults.strike({FaultKind.REFUSE, FaultKind.FAIL}, step, undo=undo)
    if fault is not None and fault.kind is FaultKind.REFUSE:
        raise Refused(fault.reason)
    if fault is not None:
        raise InjectedFailure(str(fault))


def _given(handler: Handler, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what the handler takes for this one command."""
    if handler.batch is None:
        return arguments
    return {name: each if name == handler.session_argument else [each] for name, each in arguments.items()}


def _single(returned: Any, handler: Handler) -> Any:
    """Return what it said to this one command. Raises what a batch handler refused."""
    if handler.batch is None:
        return returned
    value = None if returned is None else returned[0]
    if isinstance(value, Refused):
        raise value
    return value


# --- stand-ins --------------------------------------------------------------------------------


def _stand_in(activity: Activity[Any, Any, Any], says: Mapping[Owner, Any]) -> Handler:
    owner = activity.owner
    answer = says[owner] if owner in says else _simplest(activity.output, activity.name)

    async def stand_in(**arguments: Any) -> Any:
        said = answer(*arguments.values()) if callable(answer) else answer
        return await said if inspect.isawaitable(said) else said

    argument = None if activity.input is NONE else _INPUT
    return Handler(stand_in, argument, None, None, None)


def _simplest(output: Codec[Any], activity: str) -> Any:
    """Return the emptiest value of a type."""
    for raw in _SIMPLEST:
        try:
            return output.decode(raw)
        except PayloadInvalid:
            continue
    raise ConfigurationError(
        f"{activity!r} has no implementation here, and a {output.name} cannot be made up: "
        f"give stand_ins={{{activity}: {output.name}(...)}}, or participants=[...] that implement it."
    )


async def _nothing(**_: Any) -> None:
    """The undo of a stand-in."""

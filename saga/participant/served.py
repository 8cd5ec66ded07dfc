"""What this process serves: each activity's handlers, how to call them, and the checks before the first message."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any, Final

from pydantic_core import to_json

from saga.brokers.base import Capabilities
from saga.definition.activity import Activity, Participant
from saga.definition.handlers import Handler
from saga.errors import DefinitionError, DuplicateActivity, MissingCapability, PayloadInvalid
from saga.messages import BODY_BYTES_MAX, NULL, Command, Direction, command_id
from saga.outcomes import ActivityContext, Result
from saga.participant.answers import forward_data
from saga.payloads import NONE, Codec, check_size

IDLE_MARGIN_SECONDS: Final = 5.0


class InputInvalid(Exception):
    """A command's input is not of the declared type; `error` says where."""

    def __init__(self, error: PayloadInvalid) -> None:
        super().__init__()
        self.error = error


class Served:
    """One handler of this process: an activity forward, or its undo."""

    __slots__ = (
        "activity", "batch", "codec", "context_argument", "direction", "function", "handler", "inquiry",
        "limit_seconds", "name", "needs_session", "non_retryable", "output", "payload_argument", "plain", "spread",
        "threaded", "undo",
    )  # fmt: skip

    def __init__(
        self, activity: Activity[Any, Any, Any], direction: str, handler: Handler, limit: float
    ) -> None:
        self.activity: Activity[Any, Any, Any] = activity
        self.direction: str = direction
        self.handler: Handler = handler
        self.function: Callable[..., Any] = handler.function
        self.threaded: bool = handler.threaded
        """A plain `def`: called in a thread."""
        self.name: str = f"{activity.name} ({handler.name})"
        self.limit_seconds: float = limit
        self.batch: int | None = handler.batch
        self.codec: Codec[Any] = activity.input
        self.output: Codec[Any] = activity.output
        self.undo: Codec[Any] = activity.undo
        self.payload_argument: str | None = handler.payload_argument
        self.spread: tuple[str, ...] | None = handler.spread
        self.context_argument: str | None = handler.context_argument
        self.needs_session: bool = handler.session_argument is not None
        self.non_retryable: tuple[type[BaseException], ...] = activity.non_retryable
        self.plain: bool = (
            handler.payload_argument is not None
            and not self.needs_session
            and handler.context_argument is None
            and handler.output_argument is None
            and handler.undo_argument is None
        )
        """Takes its payload and nothing else: the shortest call."""
        self.inquiry: Served | None = None
        """Of an action outside the database: what its inquiry is served by."""

    @property
    def forward(self) -> bool:
        return self.direction == Direction.FORWARD

    @property
    def outside(self) -> bool:
        """Whether its effects are outside the database."""
        return self.activity.at_least_once

    @property
    def inquires(self) -> bool:
        """Whether it is a fence that can find out what became of an action outside the database."""
        return self.function is not _nothing

    def input(self, command: Command) -> Any:
        """Return the command's input. Raises InputInvalid."""
        data = command.data
        if self.direction != "forward":
            data = data.get("input") if isinstance(data, dict) else None
        try:
            return self.codec.decode(to_json(data), what="input")
        except PayloadInvalid as error:
            raise InputInvalid(error) from None

    def arguments(self, input: Any, command: Command, session: Any, past: Past | None) -> dict[str, Any]:
        """Return what the handler asked for, by name."""
        if self.plain:
            return {self.payload_argument: input}  # type: ignore[dict-item]  # plain: it has a payload argument
        arguments: dict[str, Any] = {}
        handler = self.handler
        if self.payload_argument is not None:
            arguments[self.payload_argument] = input
        elif self.spread is not None:
            arguments = {name: getattr(input, name) for name in self.spread}
        if handler.session_argument is not None:
            arguments[handler.session_argument] = session
        if self.context_argument is not None:
            arguments[self.context_argument] = self.context(command)
        if past is not None:
            if handler.output_argument is not None:
                arguments[handler.output_argument] = past.output
            if handler.undo_argument is not None:
                arguments[handler.undo_argument] = past.undo
        return arguments

    def context(self, command: Command) -> object:
        """Return what the handler may know of its command."""
        return context(command)

    def batch_arguments(
        self, items: Sequence[tuple[Any, Command, Past | None]], *, session: Any
    ) -> dict[str, Any]:
        """Return what a batch handler asked for: lists of equal length, and one session."""
        each = [self.arguments(input, command, None, past) for input, command, past in items]
        arguments: dict[str, Any] = {name: [one[name] for one in each] for name in each[0]}
        if self.handler.session_argument is not None:
            arguments[self.handler.session_argument] = session
        return arguments

    def past(self, data: Any) -> Past | None:
        """Return what the undo asks for from the action's `done` data, or the undo command's. Raises InputInvalid."""
        if self.direction == "forward":
            return None
        handler = self.handler
        output = handler.output_argument and self._part(data, "output", self.output)
        undo = handler.undo_argument and self._part(data, "undo", self.undo)
        return Past(output, undo)

    def _part(self, data: Any, name: str, codec: Codec[Any]) -> Any:
        value = data.get(name) if isinstance(data, dict) else None
        if value is None:
            return None
        try:
            return codec.decode(to_json(value), what=name)
        except PayloadInvalid as error:
            raise InputInvalid(error) from None

    def encode(self, value: Any) -> bytes:
        """Return the data of the `done` reply. Raises PayloadInvalid or PayloadTooLarge."""
        if self.direction == "compensate":
            return NULL
        if isinstance(value, Result):
            data = forward_data(
                self.output.encode(value.output, what="output"),
                self.undo.encode(value.undo, what="undo data"),
            )
        elif self.undo is not NONE:
            raise PayloadInvalid(f"The output is not a Result with a {self.undo.name}.")
        else:
            data = b'{"output":' + self.output.encode(value, what="output") + b',"undo":null}'
        if len(data) > BODY_BYTES_MAX:
            check_size(data, what="output with its undo data")
        return data


class Past:
    """What an action left for its undo, as far as the undo asks for it."""

    __slots__ = ("output", "undo")

    def __init__(self, output: Any, undo: Any) -> None:
        self.output: Any = output
        self.undo: Any = undo


def context(command: Command) -> ActivityContext:
    """Return what a handler may know of its command."""
    forward = command.commandid
    if command.direction != "forward":
        forward = command_id(
            *(command.namespace, command.saga, command.runid, command.step),
            *(command.forwarditeration, command.forwardround, "forward"),
        )
    return ActivityContext(
        # an inquiry asks for the action under the key that the action passed on
        operation_key=forward if command.direction == "fence" else command.commandid,
        forward_key=forward,
        namespace=command.namespace,
        saga=command.saga,
        saga_id=command.sagaid,
        run_id=command.runid,
        step=command.step,
        attempt=command.attempt,
    )


async def _nothing() -> None:
    """A fence calls no handler, save an inquiry."""


def fence() -> Served:
    """Return what serves every fence: the barrier alone, no handler."""
    activity = Participant("fence", start_to_close=None).contract("fence", type(None), type(None))
    return Served(activity, Direction.FENCE.value, NO_INQUIRY, inf)


NO_INQUIRY: Final = Handler(_nothing, None, None, None, None)


Table = dict[tuple[str, str], Served]
"""Handlers of one queue by (activity, direction)."""


def serve(
    participants: Iterable[Participant], *, stateless: bool, capabilities: Capabilities
) -> dict[str, Table]:
    """Return every handler by queue, checked. A participant's queue is there even if it has contracts only.

    Raises DuplicateActivity, DefinitionError (a stateless undo that cannot do without its past; P21),
    MissingCapability (the broker takes a delivery back before the handler's limit).
    """
    tables: dict[str, Table] = {}
    for participant in participants:
        for activity in participant.activities.values():
            for served in _handlers(activity):
                _check(served, stateless, capabilities)
                table = tables.setdefault(activity.queue, {})
                if (activity.name, served.direction) in table:
                    raise DuplicateActivity(
                        f"Activity {activity.name!r} is served twice on queue {activity.queue!r}.",
                        step=activity.name,
                    )
                table[activity.name, served.direction] = served
    return tables


def _handlers(activity: Activity[Any, Any, Any]) -> Iterable[Served]:
    limit = activity.start_to_close
    seconds = inf if limit is None else limit.total_seconds()
    inquiry = None
    if activity.at_least_once:
        asking = Served(activity, Direction.FENCE.value, activity.inquiry_ or NO_INQUIRY, seconds)
        inquiry = asking if asking.inquires else None
        yield asking
    if activity.handler is not None:
        forward = Served(activity, Direction.FORWARD.value, activity.handler, seconds)
        forward.inquiry = inquiry
        yield forward
    undo = activity.compensation_
    if undo is not None and undo.handler is not None:
        seconds = inf if undo.start_to_close is None else undo.start_to_close.total_seconds()
        yield Served(activity, Direction.COMPENSATE.value, undo.handler, seconds)


def _check(served: Served, stateless: bool, capabilities: Capabilities) -> None:
    handler, step = served.handler, served.activity.name
    if stateless and served.outside:
        raise DefinitionError(
            f"{served.name} is at_least_once, which keeps a row for each attempt, but the participant has no database; "
            "leave it out: without a database everything is at least once.",
            step=step,
        )
    if stateless and served.needs_session:
        raise DefinitionError(
            f"{served.name} asks for a session, but the participant has no database.", step=step
        )
    for argument, optional in (
        (handler.output_argument, handler.output_optional),
        (handler.undo_argument, handler.undo_optional),
    ):
        if stateless and argument is not None and not optional:
            raise DefinitionError(
                f"{served.name}: without a database the reply that carried {argument!r} may be lost, so the undo "
                f"must accept None: annotate it `... | None` (P21).",
                step=step,
            )
    if served.batch is not None and served.context_argument is not None:
        raise DefinitionError(
            f"{served.name}: a batch handler serves many commands, it has no one context.", step=step
        )
    bound = capabilities.unacked_seconds_max
    if bound is not None and served.limit_seconds > bound / 2:
        raise MissingCapability(
            f"{served.name}: {capabilities.name} takes a delivery back after {bound:.0f} s, so start_to_close must "
            f"be given and at most {bound / 2:.0f} s.",
            step=step,
        )


def limits(participants: Iterable[Participant]) -> list[float]:
    """Return the bound of one attempt of each handler, in seconds; infinite for one that has none."""
    return [
        served.limit_seconds
        for participant in participants
        for activity in participant.activities.values()
        for served in _handlers(activity)
    ]


def idle_in_transaction_seconds(limits: Iterable[float]) -> float | None:
    """Return the idle-in-transaction timeout for the connections of handlers with these bounds (P28).

    The largest plus 5 s; None if one of them has no bound.
    """
    longest = max(limits, default=0.0)
    return None if longest == inf else longest + IDLE_MARGIN_SECONDS

"""Consumers of plain events, declared: topic, type of event, limits, retries, and what tells two events apart (F-08).

    inbox = Inbox()

    @inbox.consumer("orders")
    async def record(event: OrderPlaced, session: AsyncSession, context: EventContext) -> None: ...

A consumer gets what it annotates, as an activity does: its event, a session (the transaction that remembers the event),
an `EventContext`. It returns nothing. A plain `def` runs in a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

from saga.definition.activity import check_name
from saga.definition.handlers import Handler, read_handler
from saga.errors import DefinitionError, DuplicateActivity
from saga.outcomes import EventContext
from saga.payloads import NONE, Codec
from saga.retry import FORWARD, RetryPolicy

F = TypeVar("F", bound=Callable[..., Any])
TYPE_LENGTH_MAX: Final = 200
START_TO_CLOSE: Final = timedelta(seconds=30)


@dataclass(frozen=True, eq=False)
class Consumer:
    """One handler for one type of event on one topic. Made by `Inbox.consumer`."""

    topic: str
    event_type: str
    event: Codec[Any]
    handler: Handler
    key: Callable[[Any], str] | None
    start_to_close: timedelta | None
    retry: RetryPolicy
    non_retryable: tuple[type[BaseException], ...]


class Inbox:
    """The plain events that a service acts on, each once.

    An event is remembered by its `source` and `id` in the transaction of its handler, so a copy has no effect.
    Handlers of different events run at the same time, also where their subject is the same.
    """

    def __init__(self, *, skip_others: bool = False) -> None:
        """`skip_others`: events of types that nobody here consumes are acked and forgotten, instead of parked."""
        self.skip_others: bool = skip_others
        self.consumers: dict[tuple[str, str], Consumer] = {}
        """By topic and type."""

    def consumer(
        self,
        topic: str,
        /,
        *,
        type: str | None = None,
        key: Callable[[Any], str] | None = None,
        start_to_close: timedelta | None = START_TO_CLOSE,
        retry: RetryPolicy = FORWARD,
        non_retryable: Sequence[type[BaseException]] = (),
    ) -> Callable[[F], F]:
        """Declare the handler for events of a topic.

        `type` is the CloudEvents type, by default the name of the event's class. `key` gives a business key by which
        events are known instead of `source` and `id`: two events of one topic with the same key are one. An error is
        retried by `retry`, each time as a delayed message of the outbox, so that nothing waits for it; what is left
        after that is parked, as is an event whose handler raises Refused, at once. `start_to_close` bounds one attempt;
        None is without bound. Raises DefinitionError, DuplicateActivity.
        """
        check_name(topic, what="topic")

        def declare(function: F) -> F:
            what = f"consumer of {topic!r}"
            read = read_handler(function, what=what, batch=None, context=EventContext)
            if read.payload_argument is None:
                raise DefinitionError(f"{what}: it takes one event, by an argument of the event's type.")
            if read.output is not NONE:
                raise DefinitionError(f"{what}: nobody reads what it returns; annotate it `-> None`.")
            event_type = type or read.input.name
            if not 1 <= len(event_type) <= TYPE_LENGTH_MAX:
                raise DefinitionError(f"{what}: a type has 1 to {TYPE_LENGTH_MAX} characters.")
            if (topic, event_type) in self.consumers:
                raise DuplicateActivity(f"Events {event_type!r} of topic {topic!r} have two consumers.")
            handler = Handler(
                function, read.payload_argument, None, read.session, read.context, threaded=read.threaded
            )
            self.consumers[topic, event_type] = Consumer(
                *(topic, event_type, read.input, handler, key, start_to_close, retry, tuple(non_retryable))
            )
            return function

        return declare

"""What this process consumes: each declared consumer as something to be run, by topic and type."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Any

from pydantic_core import to_json

from saga.brokers.base import Channel
from saga.compensation.kinds import StepKind
from saga.definition.activity import Activity, Participant
from saga.definition.inbox import Consumer, Inbox
from saga.errors import DuplicateActivity, PayloadInvalid
from saga.inbox.envelope import Event, message_key
from saga.messages import Command, Direction
from saga.outcomes import EventContext
from saga.participant.served import InputInvalid, Served, Table
from saga.payloads import NONE


@dataclass(kw_only=True)
class EventCommand(Command):
    """An event in the form in which handlers are run: a command that nobody waits for."""

    topic: str
    event: Event = field(repr=False)


class KeyFailed(Exception):
    """The user's own function for a business key raised; its text may hold what the event held."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class ServedEvent(Served):
    """A consumer: an activity of one direction, whose output is nobody's."""

    __slots__ = ("consumer",)

    def __init__(self, consumer: Consumer) -> None:
        activity: Activity[Any, Any, Any] = Activity(
            name=consumer.event_type,
            participant=Participant(consumer.topic),
            queue=consumer.topic,
            kind=StepKind.COMPENSATABLE,
            input=consumer.event,
            output=NONE,
            undo=NONE,
            handler=consumer.handler,
            start_to_close=consumer.start_to_close,
            retry=consumer.retry,
            no_compensation=None,
            non_retryable=consumer.non_retryable,
        )
        super().__init__(activity, Direction.FORWARD.value, consumer.handler, limit_seconds(consumer))
        self.consumer: Consumer = consumer

    def input(self, command: Command) -> Any:
        try:
            return self.codec.decode(to_json(command.data), what="event", unknown=None)
        except PayloadInvalid as error:
            raise InputInvalid(error) from None

    def context(self, command: Command) -> EventContext:
        assert isinstance(command, EventCommand)
        event = command.event
        return EventContext(
            *(event.id, event.source, event.type, command.topic, event.subject, event.time),
            *(event.attempt, event.attributes),
        )

    def key(self, command: EventCommand) -> str:
        """Return what the event is known by: a business key where one is declared. Raises InputInvalid, KeyFailed."""
        event, business = command.event, self.consumer.key
        if business is None:
            return str(message_key("id", event.source, event.id))
        input = self.input(command)
        try:
            return str(message_key("key", str(business(input))))
        except Exception as error:
            raise KeyFailed(error) from error


def limit_seconds(consumer: Consumer) -> float:
    """Return the bound of one attempt, in seconds."""
    return inf if consumer.start_to_close is None else consumer.start_to_close.total_seconds()


def consumed(inboxes: Iterable[Inbox]) -> dict[Channel, Table]:
    """Return every consumer by topic and type. Raises DuplicateActivity."""
    tables: dict[Channel, Table] = {}
    for inbox in inboxes:
        for consumer in inbox.consumers.values():
            table = tables.setdefault(Channel(consumer.topic), {})
            key = (consumer.event_type, Direction.FORWARD.value)
            if key in table:
                raise DuplicateActivity(
                    f"Events {consumer.event_type!r} of topic {consumer.topic!r} have two consumers."
                )
            table[key] = ServedEvent(consumer)
    return tables

"""The commands and replies of an app as an AsyncAPI 3.0 document, for whoever writes a participant in another language.

It is made from the code: the envelopes are those that `saga.messages` reads, the payloads those of the activities. It
describes the participant's side, who receives commands and sends replies. The rules that no schema can say, such as
what a duplicate is answered with, are in docs/wire.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from saga.definition.activity import Activity
from saga.definition.refs import Owner
from saga.messages import (
    CONTENT_TYPE,
    Command,
    Direction,
    Outcome,
    Reply,
    commands_channel,
    envelope_schema,
    replies_channel,
)

VERSION: Final = "3.0.0"
_SCHEMAS: Final = "#/components/schemas/"
_FORMAT: Final = "application/schema+json;version=draft-2020-12"
_NULL: Final[dict[str, Any]] = {"type": "null"}
_TEXT: Final[dict[str, Any]] = {"type": "string", "maxLength": 200}
_REFUSED: Final = {"code": _TEXT, "details": {}}
_RETRY_AFTER: Final = {"type": ["integer", "null"], "minimum": 0}
_Schema = dict[str, Any]


def document(
    title: str, version: str, namespace: str, activities: Iterable[Activity[Any, Any, Any]]
) -> dict[str, Any]:
    """Return the document, ready for `json.dumps`, with one operation for each activity.

    An activity that is given twice, as contract and as implementation, is described as implemented.
    """
    known: dict[Owner, Activity[Any, Any, Any]] = {}
    for activity in activities:
        if activity.owner not in known or activity.handler is not None:
            known[activity.owner] = activity
    served = [known[owner] for owner in sorted(known)]
    payloads, schemas = _payloads(served)
    described = {activity.owner: _Described(activity, payloads) for activity in served}
    messages = {
        name: _message(name, kind, narrowed)
        for each in described.values()
        for name, kind, narrowed in (*each.commands(), *each.replies())
    }
    queues = sorted({activity.queue for activity in served})
    return {
        "asyncapi": VERSION,
        "info": {
            "title": title,
            "version": version,
            "description": "Commands to participants and their replies. Several messages for one channel may travel as "
            "one JSON array; every message may come twice, late and in any order.",
        },
        "defaultContentType": CONTENT_TYPE,
        "channels": {
            **{
                f"commands.{queue}": {
                    "address": commands_channel(namespace, queue),
                    "description": f"Commands to whoever serves {queue}.",
                    "messages": _references(
                        name
                        for each in described.values()
                        if each.activity.queue == queue
                        for name, *_ in each.commands()
                    ),
                }
                for queue in queues
            },
            "replies": {
                "address": replies_channel(namespace),
                "description": "Replies to the coordinators of the namespace.",
                "messages": _references(name for each in described.values() for name, *_ in each.replies()),
            },
        },
        "operations": {each.name: each.operation() for each in described.values()},
        "components": {
            "messages": messages,
            "schemas": {
                "Command": envelope_schema(Command),
                "Reply": envelope_schema(Reply),
                **schemas,
            },
        },
    }


class _Described:
    """One activity's messages: name, envelope, and what of the envelope is certain in this message."""

    def __init__(
        self, activity: Activity[Any, Any, Any], payloads: Mapping[tuple[Owner, str], _Schema]
    ) -> None:
        self.activity = activity
        self.name = f"{activity.queue}.{activity.name}"
        self._input = payloads[activity.owner, "input"]
        self._output = payloads[activity.owner, "output"]
        self._undo = payloads[activity.owner, "undo"]

    def commands(self) -> Iterable[tuple[str, type[Command] | type[Reply], _Schema]]:
        data = {
            Direction.FORWARD: self._input,
            Direction.COMPENSATE: _object(
                input=self._input, output=_or_null(self._output), undo=_or_null(self._undo)
            ),
            Direction.FENCE: _object(input=_or_null(self._input)),
            Direction.CLOSE: _NULL,
        }
        for direction, schema in data.items():
            certain = {"activity": {"const": self.activity.name}, "direction": {"const": str(direction)}}
            yield f"{self.name}.{direction}", Command, {**certain, "data": schema}

    def replies(self) -> Iterable[tuple[str, type[Command] | type[Reply], _Schema]]:
        for (direction, outcome), data in self._answers().items():
            certain = {"direction": {"const": str(direction)}, "outcome": {"const": str(outcome)}}
            yield f"{self.name}.{direction}.{outcome}", Reply, {**certain, "data": data}

    def _answers(self) -> dict[tuple[Direction, Outcome], _Schema]:
        """Return the data of each answer; docs/wire.md says what each of them means."""
        left = {"output": self._output, "undo": self._undo}
        unknown = {"output": _or_null(self._output), "undo": _or_null(self._undo)}
        late = _object(**unknown, round={"type": "integer", "minimum": 0}, certain={"type": "boolean"})
        failed = _object(("error",), error=_TEXT, retry_after_ms=_RETRY_AFTER)
        forward, undo, fence, close = Direction
        return {
            (forward, Outcome.DONE): _object(**left),
            (forward, Outcome.REFUSED): _object(**_REFUSED),
            (forward, Outcome.FAILED): _object(
                ("error", "retryable"),
                error=_TEXT,
                retryable={"type": "boolean"},
                retry_after_ms=_RETRY_AFTER,
            ),
            (forward, Outcome.LATE_EFFECT): late,
            (undo, Outcome.DONE): _NULL,
            (undo, Outcome.NOTHING_TO_UNDO): _NULL,
            (undo, Outcome.LATE_EFFECT): late,
            (undo, Outcome.REFUSED): _object(**_REFUSED),
            (undo, Outcome.FAILED): failed,
            (fence, Outcome.NOTHING_TO_UNDO): _NULL,
            (fence, Outcome.HAD_RUN): _object(**left),
            (fence, Outcome.FAILED): failed,
            (close, Outcome.NOTHING_TO_UNDO): _NULL,
            (close, Outcome.HAD_RUN): _NULL,
            (close, Outcome.FAILED): failed,
        }

    def operation(self) -> _Schema:
        channel = f"#/channels/commands.{self.activity.queue}"
        return {
            "action": "receive",
            "channel": {"$ref": channel},
            "messages": [{"$ref": f"{channel}/messages/{name}"} for name, *_ in self.commands()],
            "reply": {
                "address": {"location": "$message.payload#/replyto"},
                "channel": {"$ref": "#/channels/replies"},
                "messages": [{"$ref": f"#/channels/replies/messages/{name}"} for name, *_ in self.replies()],
            },
        }


def _payloads(
    activities: Iterable[Activity[Any, Any, Any]],
) -> tuple[Mapping[tuple[Owner, str], _Schema], Mapping[str, _Schema]]:
    """Return each activity's payloads, and the models in them under names that are theirs alone."""
    inputs: list[tuple[tuple[Owner, str], JsonSchemaMode, TypeAdapter[Any]]] = [
        ((activity.owner, part), "serialization", getattr(activity, part).adapter)
        for activity in activities
        for part in ("input", "output", "undo")
    ]
    made, shared = TypeAdapter.json_schemas(inputs, by_alias=False, ref_template=_SCHEMAS + "{model}")
    return {key: schema for (key, _), schema in made.items()}, dict(shared.get("$defs", {}))


def _object(required: Iterable[str] | None = None, /, **properties: Any) -> _Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties if required is None else required),
    }


def _or_null(schema: _Schema) -> _Schema:
    return {"anyOf": [schema, _NULL]}


def _message(name: str, kind: type[Command] | type[Reply], certain: _Schema) -> _Schema:
    schema = {"allOf": [{"$ref": _SCHEMAS + kind.__name__}, {"type": "object", "properties": certain}]}
    return {"name": name, "payload": {"schemaFormat": _FORMAT, "schema": schema}}


def _references(names: Iterable[str]) -> _Schema:
    return {name: {"$ref": f"#/components/messages/{name}"} for name in names}

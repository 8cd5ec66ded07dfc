"""Commands and replies on the wire: CloudEvents 1.0 envelopes in JSON, one or a batch per broker message.

The page `docs/wire.md` is the protocol for other languages; its byte vectors are read by a test. This module knows
names and bytes only: no broker, no database, no clock.

What is read is refused unless it is exactly that: see docs/design/0008-strict-decoding.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import lru_cache
from itertools import islice
from math import isfinite
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar

from pydantic import ConfigDict, FailFast, Field, TypeAdapter, ValidationError
from pydantic_core import to_json

from saga.errors import MessageInvalid

COMMAND_TYPE: Final = "saga.command.v1"
REPLY_TYPE: Final = "saga.reply.v1"
CONTENT_TYPE: Final = "application/cloudevents+json; charset=utf-8"
BATCH_CONTENT_TYPE: Final = "application/cloudevents-batch+json; charset=utf-8"
BODY_BYTES_MAX: Final = 256 * 1024
HEAD_BYTES_MAX: Final = 16 * 1024
"""What the attributes of one envelope may take beside its payloads."""
COMMAND_BYTES_MAX: Final = 2 * BODY_BYTES_MAX + HEAD_BYTES_MAX
"""Largest body of commands: an undo carries the input, and what the action left."""
REPLY_BYTES_MAX: Final = BODY_BYTES_MAX + HEAD_BYTES_MAX
PACK_COUNT_MAX: Final = 64
DEPTH_MAX: Final = 64
"""Objects and arrays within each other in one envelope, itself included."""
NUMBER_MAX: Final = 2**31 - 1
NULL: Final = b"null"

Name: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")]
"""A name that a definition gave: nothing that could name a module, a file or another channel."""
Id: TypeAlias = Annotated[str, Field(pattern=r"^[!-~]{1,200}$")]
Text: TypeAlias = Annotated[str, Field(max_length=400)]
Number: TypeAlias = Annotated[int, Field(ge=0, le=NUMBER_MAX)]
Milliseconds: TypeAlias = Annotated[int, Field(ge=-(2**53), le=2**53)]


class Direction(StrEnum):
    """What a command asks for."""

    FORWARD = "forward"
    COMPENSATE = "compensate"
    FENCE = "fence"
    """Makes sure that the action never runs from now on, or learns that it had run; undoes nothing."""
    CLOSE = "close"
    """The same for the undo: a person settled it, and what of it is still in flight must not run (P26)."""


FENCES: Final = frozenset({Direction.FENCE, Direction.CLOSE})
NO_BARRIER: Final = "no_barrier"
"""Error of a failed fence: its participant keeps no barrier."""
OUTCOME_UNKNOWN: Final = "outcome_unknown"
"""Error of an attempt or a fence: an earlier attempt outside the database began, and nobody can tell how it ended."""


class Outcome(StrEnum):
    """How a participant answered a command."""

    DONE = "done"
    """Forward: the effect is committed. Undo: it is undone."""
    REFUSED = "refused"
    """The business said no. Final where the command says so (P20)."""
    FAILED = "failed"
    """This attempt ended with an error and left no effect."""
    NOTHING_TO_UNDO = "nothing_to_undo"
    """Undo of an action that never ran and never will (empty compensation)."""
    HAD_RUN = "had_run"
    """Answer to a fence: the action had run before; `data` is what its own reply held."""
    LATE_EFFECT = "late_effect"
    """The action ran outside the database and ended after its undo had begun: it is to be undone once more (P27)."""


# Not frozen and without slots: they are made by the thousand, and both would double what that costs.
@dataclass(kw_only=True)
class Command:
    """Do or undo one step. `data` is the payload as JSON bytes; everything else travels as an attribute."""

    id: Id
    """Message id: new for every send of the same command."""
    namespace: Name
    saga: Name
    sagaversion: Number
    sagaid: Text
    runid: Id
    step: Name
    activity: Name
    iteration: Number = 0
    round: Number = 0
    forwarditeration: Number = 0
    forwardround: Number = 0
    direction: Literal["forward", "compensate", "fence", "close"]
    commandid: Id
    attempt: Number
    resend: bool = False
    final: bool = False
    """A refusal of this command is the business's last word and is kept (P20)."""
    remainingms: Milliseconds | None = None
    """Milliseconds until the step's deadline, counted from sending; None without a deadline."""
    replyto: Id
    schemaversion: Number = 1
    traceparent: Text | None = None
    data: Any = None


@dataclass(kw_only=True)
class Reply:
    """The answer to one command. `data` depends on `outcome`: docs/wire.md."""

    id: Id
    namespace: Name
    saga: Name
    sagaid: Text
    runid: Id
    step: Name
    iteration: Number = 0
    round: Number = 0
    direction: Literal["forward", "compensate", "fence", "close"]
    commandid: Id
    attempt: Number
    outcome: Literal["done", "refused", "failed", "nothing_to_undo", "had_run", "late_effect"]
    schemaversion: Number = 1
    traceparent: Text | None = None
    data: Any = None


# What only the wire has: the version and type that say which message this is, and that each attribute of the tables
# in docs/wire.md is there. Unknown attributes are ignored, so that a newer sender is understood; an unknown major
# version is another `type` and is parked.
_strict = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


@dataclass(kw_only=True)
class _WireCommand(Command):
    specversion: Literal["1.0"]
    type: Literal["saga.command.v1"]
    source: Text
    subject: Text
    datacontenttype: Literal["application/json"]
    iteration: Number = field()
    round: Number = field()
    forwarditeration: Number = field()
    forwardround: Number = field()
    resend: bool = field()
    final: bool = field()
    schemaversion: Number = field()
    data: Any = field()
    __pydantic_config__ = _strict

    def names(self) -> int:
        """Return how many attributes it has."""
        return 25 + (self.remainingms is not None) + (self.traceparent is not None)


@dataclass(kw_only=True)
class _WireReply(Reply):
    specversion: Literal["1.0"]
    type: Literal["saga.reply.v1"]
    source: Text
    subject: Text
    datacontenttype: Literal["application/json"]
    iteration: Number = field()
    round: Number = field()
    schemaversion: Number = field()
    data: Any = field()
    __pydantic_config__ = _strict

    def names(self) -> int:
        """Return how many attributes it has."""
        return 19 + (self.traceparent is not None)


_command: Final = TypeAdapter(_WireCommand)
_reply: Final = TypeAdapter(_WireReply)
# One bad envelope is enough to look at them one by one, so the first error of a pack is the last one made (L-02).
_commands: Final = TypeAdapter(Annotated[list[_WireCommand], FailFast()])
_replies: Final = TypeAdapter(Annotated[list[_WireReply], FailFast()])

M = TypeVar("M", bound=Command | Reply)
W = TypeVar("W", _WireCommand, _WireReply)


def envelope_schema(kind: type[Command] | type[Reply]) -> dict[str, Any]:
    """Return the JSON Schema of a message's envelope as it is read, `data` left open."""
    schema = (_command if kind is Command else _reply).json_schema()
    return {**schema, "title": kind.__name__, "description": _ENVELOPES[kind]}


_ENVELOPES: Final[dict[type, str]] = {
    Command: "Do or undo one step; a CloudEvents 1.0 event.",
    Reply: "The answer to one command; a CloudEvents 1.0 event.",
}


def command_id(
    namespace: str, saga: str, run_id: str, step: str, iteration: int, round: int, direction: str
) -> str:
    """Return the stable id of one step, pass, round and direction: 32 hex digits, the same on every retry (P2).

    SHA-256 over the length-prefixed UTF-8 fields, first 16 bytes; length prefixes keep ("ab","c") from ("a","bc").
    """
    text = f"{_prefixed(namespace, saga)}{len(run_id.encode())}:{run_id}{_prefixed(step, iteration, round, direction)}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@lru_cache(maxsize=4096)
def _prefixed(*fields: str | int) -> str:
    """Return the fields with their lengths in bytes before them: all of an id but the run's name, which is its own."""
    return "".join([f"{len(str(field).encode())}:{field}" for field in fields])


def commands_channel(namespace: str, queue: str) -> str:
    """Name of the channel that carries commands to a participant's queue."""
    return f"saga.{namespace}.commands.{queue}"


def replies_channel(namespace: str) -> str:
    """Name of the channel that carries replies to the coordinators of a namespace."""
    return f"saga.{namespace}.replies"


def is_ours(channel: str) -> bool:
    """Whether commands or replies travel on the channel; topics of domain events have other names."""
    return channel.startswith("saga.")


def parking_channel(channel: str) -> str:
    """Name of the channel beside a work channel that keeps what could not be handled."""
    return f"{channel}.parked"


def encode_command(command: Command, data: bytes) -> bytes:
    """Return the envelope of `command` around `data`, the payload's JSON bytes, which go in unchanged (P32)."""
    head: dict[str, Any] = {
        "specversion": "1.0",
        "type": COMMAND_TYPE,
        "source": f"/saga/{command.namespace}/coordinator",
        "id": command.id,
        "subject": command.sagaid,
        "datacontenttype": "application/json",
        "namespace": command.namespace,
        "saga": command.saga,
        "sagaversion": command.sagaversion,
        "sagaid": command.sagaid,
        "runid": command.runid,
        "step": command.step,
        "activity": command.activity,
        "iteration": command.iteration,
        "round": command.round,
        "forwarditeration": command.forwarditeration,
        "forwardround": command.forwardround,
        "direction": command.direction,
        "commandid": command.commandid,
        "attempt": command.attempt,
        "resend": command.resend,
        "final": command.final,
        "replyto": command.replyto,
        "schemaversion": command.schemaversion,
    }
    if command.remainingms is not None:
        head["remainingms"] = command.remainingms
    if command.traceparent is not None:
        head["traceparent"] = command.traceparent
    return to_json(head)[:-1] + b',"data":' + data + b"}"


def encode_reply(reply: Reply, data: bytes) -> bytes:
    """Return the envelope of `reply` around `data`, JSON bytes that go in unchanged."""
    head: dict[str, Any] = {
        "specversion": "1.0",
        "type": REPLY_TYPE,
        "source": f"/saga/{reply.namespace}/participant",
        "id": reply.id,
        "subject": reply.sagaid,
        "datacontenttype": "application/json",
        "namespace": reply.namespace,
        "saga": reply.saga,
        "sagaid": reply.sagaid,
        "runid": reply.runid,
        "step": reply.step,
        "iteration": reply.iteration,
        "round": reply.round,
        "direction": reply.direction,
        "commandid": reply.commandid,
        "attempt": reply.attempt,
        "outcome": reply.outcome,
        "schemaversion": reply.schemaversion,
    }
    if reply.traceparent is not None:
        head["traceparent"] = reply.traceparent
    return to_json(head)[:-1] + b',"data":' + data + b"}"


def pack(envelopes: Sequence[bytes]) -> tuple[bytes, str]:
    """Return one body and its content type for envelopes that travel together."""
    if len(envelopes) == 1:
        return envelopes[0], CONTENT_TYPE
    return b"[" + b",".join(envelopes) + b"]", BATCH_CONTENT_TYPE


def packs(envelopes: Iterable[bytes], *, count_max: int, body_bytes_max: int) -> Iterable[list[int]]:
    """Group envelopes, in order, by index, so that each group stays within both bounds; one too large goes alone."""
    group: list[int] = []
    size = 2
    for index, envelope in enumerate(envelopes):
        if group and (len(group) >= count_max or size + len(envelope) + 1 > body_bytes_max):
            yield group
            group, size = [], 2
        group.append(index)
        size += len(envelope) + 1
    if group:
        yield group


def decode_commands(body: bytes) -> Sequence[Command]:
    """Return the commands in a body, one at least, each with `data` as parsed JSON.

    Raises MessageInvalid, never a partial list: `apart` tells the good envelopes of a body from the bad.
    """
    return _decode(body, _command, _commands, COMMAND_BYTES_MAX)


def decode_replies(body: bytes) -> Sequence[Reply]:
    """Return the replies in a body, one at least. Raises MessageInvalid, never a partial list."""
    return _decode(body, _reply, _replies, REPLY_BYTES_MAX)


def apart(
    body: bytes, decode: Callable[[bytes], Sequence[M]]
) -> Iterator[tuple[bytes, M | None, MessageInvalid | None]]:
    """Take a body apart that does not decode as a whole: its envelopes as they came, each with its message or error.

    What has no envelopes that could be told from each other is one part, the body, with its error.
    """
    try:
        parts = split(body)
    except MessageInvalid as error:
        yield body, None, error
        return
    for part in parts:
        try:
            messages = decode(part)
            if len(messages) != 1:
                raise MessageInvalid("A batch within a batch.")
        except MessageInvalid as error:
            yield part, None, error
        else:
            yield part, messages[0], None


def split(body: bytes) -> list[bytes]:
    """Return the envelopes of a body one by one, byte for byte as they came.

    Raises MessageInvalid if the body is no JSON, or no batch within its limits.
    """
    if len(body) > COMMAND_BYTES_MAX:
        raise _too_large(body, COMMAND_BYTES_MAX)
    try:
        parts = list(islice(_envelopes(body.decode()), PACK_COUNT_MAX + 1))
    except (ValueError, IndexError, RecursionError):
        raise MessageInvalid(NOT_JSON) from None
    if not 1 <= len(parts) <= PACK_COUNT_MAX:
        raise _miscounted(len(parts))
    return parts


def _envelopes(text: str) -> Iterator[bytes]:
    place = _after_space(text, 0)
    if text[place] != "[":
        yield text.encode()
        return
    start = _after_space(text, place + 1)
    if text[start] == "]":
        place = start
    while text[place] != "]":
        start = _after_space(text, place + 1)
        _, end = _scanner.raw_decode(text, start)
        yield text[start:end].encode()
        place = _after_space(text, end)
        if text[place] not in ",]":
            raise ValueError
    if _after_space(text, place + 1) != len(text):
        raise ValueError


def read_json(body: bytes, *, bytes_max: int) -> Any:
    """Return what somebody else's body says.

    Raises MessageInvalid above its size or our depth, for a name that stands twice in one object, and for what JSON has
    no number for.
    """
    if len(body) > bytes_max:
        raise _too_large(body, bytes_max)
    value = _read(body)
    if value.__class__ in _LOOKED_INTO:
        _names(value, depth=1)
    return value


def field_paths(error: ValidationError, names: Collection[str]) -> str:
    """Return where and how a payload is wrong, never what it held (PYD-4).

    `names` are the declared ones: any other key is data of the sender's, and stands as `*`.
    """
    found = error.errors(include_input=False, include_context=False, include_url=False)
    return "; ".join(f"{_path(each['loc'], names) or 'body'}: {each['type']}" for each in found[:5])


def _path(location: Iterable[str | int], names: Collection[str]) -> str:
    return ".".join(str(part) if isinstance(part, int) or part in names else "*" for part in location)


# --- the doors --------------------------------------------------------------------------------

NOT_JSON: Final = "body: json_invalid"
_LOOKED_INTO: Final = frozenset({dict, list, float})
_scanner: Final = json.JSONDecoder()
_space: Final = re.compile(r"[ \t\n\r]*")
_attributes: Final = frozenset(each.name for kind in (_WireCommand, _WireReply) for each in fields(kind))


def _decode(body: bytes, one: TypeAdapter[W], many: TypeAdapter[list[W]], bytes_max: int) -> list[W]:
    if len(body) > bytes_max:
        raise _too_large(body, bytes_max)
    try:
        pack = body[:1] != b"{" and body.lstrip()[:1] == b"["
        messages = many.validate_json(body) if pack else [one.validate_json(body)]
    except ValidationError as error:
        raise MessageInvalid(field_paths(error, _attributes)) from None
    if not 1 <= len(messages) <= PACK_COUNT_MAX:
        raise _miscounted(len(messages))
    names = 0
    for message in messages:
        names += message.names()
        if message.data.__class__ in _LOOKED_INTO:
            names += _names(message.data)
    # Every name in the body has its colon. If there are no more of them than names that were found, then no name stood
    # twice in one object; else a colon may have been in a text, and only a second reading can tell.
    if body.count(b":") != names:
        _read(body)
    return messages


def _names(value: Any, depth: int = 2) -> int:
    """Return how many names the objects within a payload have.

    Raises MessageInvalid for data that is nested deeper than an envelope may be, and for what JSON has no number for.
    """
    if value.__class__ is float:
        if not isfinite(value):
            raise MessageInvalid("data: finite_number")
        return 0
    if depth > DEPTH_MAX:
        raise MessageInvalid(f"data: deeper than {DEPTH_MAX} objects and arrays within each other")
    names, inside = (len(value), value.values()) if value.__class__ is dict else (0, value)
    for inner in inside:
        if inner.__class__ in _LOOKED_INTO:
            names += _names(inner, depth + 1)
    return names


def _read(body: bytes) -> Any:
    """Return the value; raise MessageInvalid if a name stands twice in one object, or for NaN in a number's place."""
    try:
        return json.loads(body, object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise MessageInvalid(NOT_JSON) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(pairs) != len(found):
        raise MessageInvalid("A name stands twice in one object.")
    return found


def _no_constant(word: str) -> None:
    raise ValueError


def _after_space(text: str, place: int) -> int:
    found = _space.match(text, place)
    return place if found is None else found.end()


def _too_large(body: bytes, bytes_max: int) -> MessageInvalid:
    return MessageInvalid(f"The body has {len(body)} bytes, the limit is {bytes_max}.")


def _miscounted(count: int) -> MessageInvalid:
    return MessageInvalid(f"A batch has 1 to {PACK_COUNT_MAX} envelopes, this one has {count or 'none'}.")

"""Commands and replies on the wire: CloudEvents 1.0 envelopes in JSON, one or a batch per broker message.

The page `docs/wire.md` is the protocol for other languages; its byte vectors are read by a test. This module knows
names and bytes only: no broker, no database, no clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from saga.errors import MessageInvalid

COMMAND_TYPE: Final = "saga.command.v1"
REPLY_TYPE: Final = "saga.reply.v1"
CONTENT_TYPE: Final = "application/cloudevents+json; charset=utf-8"
BATCH_CONTENT_TYPE: Final = "application/cloudevents-batch+json; charset=utf-8"
BODY_BYTES_MAX: Final = 256 * 1024
PACK_COUNT_MAX: Final = 64
DEPTH_MAX: Final = 64
NULL: Final = b"null"


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


_strict = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True)


# Not frozen and without slots: they are made by the thousand, and both would double what that costs.
@dataclass(kw_only=True)
class Command:
    """Do or undo one step. `data` is the payload as JSON bytes; everything else travels as an attribute."""

    id: str
    """Message id: new for every send of the same command."""
    namespace: str
    saga: str
    sagaversion: int
    sagaid: str
    runid: str
    step: str
    activity: str
    iteration: int = 0
    round: int = 0
    forwarditeration: int = 0
    forwardround: int = 0
    direction: Literal["forward", "compensate", "fence", "close"]
    commandid: str
    attempt: int
    resend: bool = False
    final: bool = False
    """A refusal of this command is the business's last word and is kept (P20)."""
    remainingms: int | None = None
    """Milliseconds until the step's deadline, counted from sending; None without a deadline."""
    replyto: str
    schemaversion: int = 1
    traceparent: str | None = None
    data: Any = None


@dataclass(kw_only=True)
class Reply:
    """The answer to one command. `data` depends on `outcome`: docs/wire.md."""

    id: str
    namespace: str
    saga: str
    sagaid: str
    runid: str
    step: str
    iteration: int = 0
    round: int = 0
    direction: Literal["forward", "compensate", "fence", "close"]
    commandid: str
    attempt: int
    outcome: Literal["done", "refused", "failed", "nothing_to_undo", "had_run"]
    schemaversion: int = 1
    traceparent: str | None = None
    data: Any = None


# What only the wire has: the version and type that say which message this is. Unknown attributes are ignored, so
# that a newer sender is understood; an unknown major version is another `type` and is parked.
@dataclass(kw_only=True)
class _WireCommand(Command):
    specversion: Literal["1.0"]
    type: Literal["saga.command.v1"]
    __pydantic_config__ = _strict


@dataclass(kw_only=True)
class _WireReply(Reply):
    specversion: Literal["1.0"]
    type: Literal["saga.reply.v1"]
    __pydantic_config__ = _strict


_command: Final = TypeAdapter(_WireCommand)
_commands: Final = TypeAdapter(list[_WireCommand])
_reply: Final = TypeAdapter(_WireReply)
_replies: Final = TypeAdapter(list[_WireReply])

M = TypeVar("M")


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
    """Return the commands in a body, each with `data` as parsed JSON. Raises MessageInvalid, never a partial list.

    To park one bad command alone, `split` the body and decode its parts one by one.
    """
    return _decode(body, _command, _commands)


def decode_replies(body: bytes) -> Sequence[Reply]:
    """Return the replies in a body. Raises MessageInvalid, never a partial list."""
    return _decode(body, _reply, _replies)


def _decode(body: bytes, one: TypeAdapter[M], many: TypeAdapter[list[M]]) -> list[M]:
    try:
        if b"NaN" in body or b"Infinity" in body:
            from_json(body, allow_inf_nan=False)  # the parser below takes these words for numbers (PYD-1)
        return many.validate_json(body) if body.lstrip()[:1] == b"[" else [one.validate_json(body)]
    except ValidationError as error:
        raise MessageInvalid(field_paths(error)) from None
    except ValueError:
        raise MessageInvalid("The body is not JSON: NaN and Infinity are no JSON values.") from None


def field_paths(error: ValidationError) -> str:
    """Return where and how a payload is wrong, never what it held (PYD-4)."""
    found = error.errors(include_input=False, include_context=False, include_url=False)
    return "; ".join(f"{'.'.join(map(str, each['loc'])) or 'body'}: {each['type']}" for each in found[:5])


def split(body: bytes) -> list[bytes]:
    """Return the envelopes of a body one by one, re-encoded, so that a bad one can be parked alone.

    Raises MessageInvalid if the body as a whole is no JSON object or array.
    """
    try:
        parsed = from_json(body, allow_inf_nan=False)
    except ValueError:
        raise MessageInvalid("The body is not JSON.") from None
    if isinstance(parsed, dict):
        return [body]
    if not isinstance(parsed, list):
        raise MessageInvalid("The body is neither a JSON object nor an array of objects.")
    return [to_json(part) for part in parsed]

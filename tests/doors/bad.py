"""What must not come in: bodies that are no message, envelopes that are wrong, and payloads that are not of their type.

Each row says how it ends: `parked` with a detail, or `answered` as a failed attempt with a text. Every wrong value has
the canary in it, and no detail or text may show it.
"""

from __future__ import annotations

import base64
import json
import pickle
import re
import uuid
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from saga.messages import COMMAND_BYTES_MAX, Command, command_id, encode_command, replies_channel
from tests.plugins.watch import CANARY

DEEP: Final = 100_000
HUGE: Final = 10 * 1024 * 1024


class Bad(NamedTuple):
    """One bad message. `body` makes it for a namespace."""

    name: str
    body: Callable[[str], bytes]
    ends: str
    """`parked` or `answered`."""
    says: str
    """Part of the detail, or of the answer's message."""


def command(namespace: str, /, **attributes: Any) -> dict[str, Any]:
    """A good command for the desk, with attributes changed; ... takes one away."""
    run = str(uuid.uuid4())
    good = Command(
        id=str(uuid.uuid4()),
        namespace=namespace,
        saga="errand",
        sagaversion=1,
        sagaid="e-1",
        runid=run,
        step="take",
        activity="take",
        direction="forward",
        commandid=command_id(namespace, "errand", run, "take", 0, 0, "forward"),
        attempt=1,
        final=True,
        replyto=replies_channel(namespace),
    )
    envelope = json.loads(encode_command(good, b'{"number":1}')) | attributes
    return {name: value for name, value in envelope.items() if value is not ...}


def written(namespace: str, /, **attributes: Any) -> bytes:
    return json.dumps(command(namespace, **attributes)).encode()


def edited(old: str, new: str) -> Callable[[str], bytes]:
    """The compact text of a good command with a piece of it replaced: for what no writer of JSON writes."""

    def body(namespace: str) -> bytes:
        text = json.dumps(command(namespace, id="m", commandid="c" * 32), separators=(",", ":"))
        assert old in text, old
        return text.replace(old, new).encode("utf-8", "surrogatepass")

    return body


def _whole(name: str, body: bytes, says: str) -> Bad:
    return Bad(name, lambda _: body, "parked", says)


def _text(name: str, old: str, new: str, says: str) -> Bad:
    return Bad(name, edited(old, new), "parked", says)


def _attribute(name: str, says: str, **attributes: Any) -> Bad:
    return Bad(name, lambda namespace: written(namespace, **attributes), "parked", says)


def _payload(name: str, says: str, data: Any) -> Bad:
    return Bad(name, lambda namespace: written(namespace, data=data), "answered", says)


NOT_JSON: Final = "json_invalid"
TWICE: Final = "twice in one object"
DEEPER: Final = "deeper than 64"
DATA: Final = '"data":{"number":1}'

BODIES: Final = (
    _whole("nothing", b"", NOT_JSON),
    _whole("white space", b" \n\t", NOT_JSON),
    _whole("null", b"null", "body: dataclass_type"),
    _whole("a number", b"7", "body: dataclass_type"),
    _whole("a text", f'"{CANARY}"'.encode(), "body: dataclass_type"),
    _whole("an empty object", b"{}", "namespace: missing"),
    _whole("an empty batch", b"[ ]", "1 to 64 envelopes"),
    _whole("a batch in a batch", b"[[]]", "1 to 64 envelopes"),
    _whole("no messages in a batch", b"[7]", "dataclass_type"),
    _whole("a batch of too many", b"[" + b",".join([b"{}"] * 65) + b"]", "1 to 64 envelopes"),
    _whole("half an object", b'{"specversion":"1.0","id":"' + CANARY.encode(), NOT_JSON),
    _whole("bytes that are no UTF-8", b'{"specversion":"\xff\xfe"}', NOT_JSON),
    _whole("UTF-16", '{"specversion":"1.0"}'.encode("utf-16"), NOT_JSON),
    _whole("a byte order mark", b"\xef\xbb\xbf{}", NOT_JSON),
    _whole("a pickle", pickle.dumps({"type": "saga.command.v1", "data": CANARY}), NOT_JSON),
    _whole("a pickle in base64", base64.b64encode(pickle.dumps([CANARY])), NOT_JSON),
    _whole("YAML that calls", b"!!python/object/apply:os.system ['true']", NOT_JSON),
    _whole("XML", b"<command type='saga.command.v1'/>", NOT_JSON),
    _whole("10 MiB of a text", b'"' + b"x" * HUGE + b'"', f"the limit is {COMMAND_BYTES_MAX}"),
    _whole("10 MiB of brackets", b"[" * HUGE, f"the limit is {COMMAND_BYTES_MAX}"),
    _whole("arrays without end", b"[" * DEEP, NOT_JSON),
    _whole("objects without end", b'{"a":' * DEEP, NOT_JSON),
    _whole("arrays deep and closed", b"[" * DEEP + b"]" * DEEP, NOT_JSON),
)
TEXTS: Final = (
    _text("NaN", DATA, '"data":{"number":NaN}', "finite_number"),
    _text("Infinity", DATA, '"data":{"number":Infinity}', "finite_number"),
    _text("negative infinity", DATA, '"data":{"number":-Infinity}', "finite_number"),
    _text("a float beyond all floats", DATA, '"data":{"number":1,"rate":1e999}', "finite_number"),
    _text("5,000 digits", DATA, f'"data":{{"number":{"9" * 5_000}}}', NOT_JSON),
    _text("5,000 digits as attempt", '"attempt":1', f'"attempt":{"9" * 5_000}', NOT_JSON),
    _text("4,000 digits as milliseconds", DATA, f'"remainingms":{"9" * 4_000},{DATA}', "remainingms: "),
    _text("NaN in an attribute that is not ours", DATA, f'"x":NaN,{DATA}', NOT_JSON),
    _text("a leading zero", '"attempt":1', '"attempt":01', NOT_JSON),
    _text("a hexadecimal number", '"attempt":1', '"attempt":0x1', NOT_JSON),
    _text("a plus sign", '"attempt":1', '"attempt":+1', NOT_JSON),
    _text("a comma too many", DATA, f"{DATA},", NOT_JSON),
    _text("a comment", DATA, f"{DATA}/* {CANARY} */", NOT_JSON),
    _text("single quotes", DATA, "'data':null", NOT_JSON),
    _text("more after the end", DATA + "}", DATA + "}{}", NOT_JSON),
    _text("a control character in a text", '"sagaid":"e-1"', '"sagaid":"e\n1"', NOT_JSON),
    _text("half a character", '"sagaid":"e-1"', '"sagaid":"\\ud800"', NOT_JSON),
    _text("half a character in the payload", DATA, '"data":{"number":1,"raw":"\\udfff"}', NOT_JSON),
    _text("half a character as bytes", '"sagaid":"e-1"', '"sagaid":"\ud800"', NOT_JSON),
    _text("an attribute twice", '"attempt":1', '"attempt":1,"attempt":2', TWICE),
    _text("an attribute twice, alike", '"attempt":1', '"attempt":1,"attempt":1', TWICE),
    _text("an attribute twice, once in escapes", '"attempt":1', '"attempt":1,"\\u0061ttempt":2', TWICE),
    _text("an attribute twice, with a space", '"attempt":1', '"attempt" :1,"attempt":1', TWICE),
    _text("the namespace twice", '"saga":', f'"namespace":"{CANARY}","saga":', TWICE),
    _text("the payload twice", DATA, f'{DATA},"data":{{"number":2}}', TWICE),
    _text("a field twice", DATA, '"data":{"number":2,"number":1}', TWICE),
    _text("an inner field twice", DATA, '"data":{"number":1,"item":{"name":"a","name":"b"}}', TWICE),
    _text("an unknown attribute with a name twice", DATA, f'"x":{{"a":1,"a":2}},{DATA}', TWICE),
    _text("depth 65", DATA, '"data":' + "[" * 64 + "]" * 64, DEEPER),
    _text("depth 65 in objects", DATA, '"data":' + '{"a":' * 64 + "1" + "}" * 64, DEEPER),
    _text("depth 150 behind others", DATA, '"data":[1,{},' + "[1,{}," * 149 + "2" + "]" * 150, DEEPER),
    _text("depth 300", DATA, '"data":' + "[" * 300 + "]" * 300, NOT_JSON),
)
ATTRIBUTES: Final = (
    _attribute("no type", "type: missing", type=...),
    _attribute("a type of ours that is not sent here", "type: literal_error", type="saga.reply.v1"),
    _attribute("a type that names a function", "type: literal_error", type="os.system"),
    _attribute("a type of tomorrow", "type: literal_error", type="saga.command.v2"),
    _attribute("another version of the format", "specversion: literal_error", specversion="0.3"),
    _attribute("a saga that names a function", "saga: string_pattern", saga="os.system"),
    _attribute("a step that names a function", "step: string_pattern", step="os.system"),
    _attribute("an activity that names a function", "activity: string_pattern", activity="os.system"),
    _attribute("an activity that names a class", "activity: string_pattern", activity="subprocess:Popen"),
    _attribute("a step that is a path", "step: string_pattern", step="../../etc/passwd"),
    _attribute("a step with a NUL", "step: string_pattern", step="take\0"),
    _attribute("a saga with a line feed", "saga: string_pattern", saga=f"errand\n{CANARY}"),
    _attribute("an empty step", "step: string_pattern", step=""),
    _attribute("a name that is too long", "saga: string_pattern", saga="x" * 101),
    _attribute("an id that is too long", "commandid: string_pattern", commandid="c" * 201),
    _attribute("an id with a NUL", "commandid: string_pattern", commandid="c\0"),
    _attribute("no command id", "commandid: missing", commandid=...),
    _attribute("a run id that is a number", "runid: string_type", runid=7),
    _attribute("a run id that is none", "", runid=CANARY),
    _attribute("a direction that is none", "direction: literal_error", direction=CANARY),
    _attribute("an attempt in a text", "attempt: int_type", attempt="1"),
    _attribute("half an attempt", "attempt: int_type", attempt=1.5),
    _attribute("an attempt with a point", "attempt: int_type", attempt=1.0),
    _attribute("an attempt that is true", "attempt: int_type", attempt=True),
    _attribute("an attempt that is null", "attempt: int_type", attempt=None),
    _attribute("an attempt below zero", "attempt: greater_than_equal", attempt=-1),
    _attribute("an attempt beyond a column", "attempt: less_than_equal", attempt=2**31),
    _attribute("an iteration beyond a column", "iteration: less_than_equal", iteration=2**40),
    _attribute("a resend mark in a text", "resend: bool_type", resend="true"),
    _attribute("a resend mark in a number", "resend: bool_type", resend=1),
    _attribute("a business key without end", "sagaid: string_too_long", sagaid=CANARY * 100),
    _attribute("another namespace", "", namespace="other"),
    _attribute("a reply channel of another namespace", "", replyto="saga.other.replies"),
)
PAYLOADS: Final = (
    _payload("a number in a text", "number: int_type", {"number": CANARY}),
    _payload("digits in a text", "number: int_type", {"number": "12"}),
    _payload("a number with a point", "number: int_type", {"number": 1.0}),
    _payload("true as a number", "number: int_type", {"number": True}),
    _payload("a field missing", "number: missing", {}),
    _payload("an unknown field", "*: extra_forbidden", {"number": 1, CANARY: 1}),
    _payload("an unknown inner field", "item.*: extra_forbidden", {"number": 1, "item": {"name": "a", CANARY: 1}}),
    _payload(
        "a wrong value under a key of theirs",
        "items.*.count: int_type",
        {"number": 1, "items": {CANARY: {"name": "a", "count": CANARY}}},
    ),
    _payload("a list for an object", "body: model_type", [CANARY]),
    _payload("null for an object", "body: model_type", None),
    _payload("money as a float", "price: decimal_float", {"number": 1, "price": 10.5}),
    _payload("money as a float without a fraction", "price: decimal_float", {"number": 1, "price": 10.0}),
    _payload("money that is not a number", "price", {"number": 1, "price": "NaN"}),
    _payload("money in words", "price", {"number": 1, "price": CANARY}),
    _payload("a time without a zone", "at: timezone_aware", {"number": 1, "at": "2026-01-01T00:00:00"}),
    _payload("a time in seconds", "at: datetime_type", {"number": 1, "at": 1_700_000_000}),
    _payload("a key that is none", "key: uuid_parsing", {"number": 1, "key": CANARY}),
    _payload("a rate in a text", "rate: float_type", {"number": 1, "rate": "1.5"}),
    _payload("a kind that is none", "kind: literal_error", {"number": 1, "kind": CANARY}),
    _payload("a flag in a number", "flag: bool_type", {"number": 1, "flag": 1}),
    _payload("an object that names a class", "*: extra_forbidden", {"number": 1, "py/object": "os.system"}),
    _payload("a payload beyond the limit", "the limit is 262144", {"number": 1, "raw": "x" * 270_000}),
)  # fmt: skip

HEAVY: Final = tuple(
    each for each in (*BODIES, *TEXTS) if re.search("10 MiB|end$|deep and closed|digits", each.name)
)
TABLE: Final = (*BODIES, *TEXTS, *ATTRIBUTES, *PAYLOADS)

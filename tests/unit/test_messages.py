"""Envelopes: what is read, what is refused, how they share a body, and the id that every retry keeps."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saga.errors import MessageInvalid
from saga.messages import (
    BATCH_CONTENT_TYPE,
    CONTENT_TYPE,
    NULL,
    Command,
    Reply,
    command_id,
    commands_channel,
    decode_commands,
    decode_replies,
    encode_command,
    encode_reply,
    pack,
    packs,
    parking_channel,
    replies_channel,
    split,
)

pytestmark = pytest.mark.stack("pure")

COMMAND = Command(
    id="m-1",
    namespace="default",
    saga="transfer",
    sagaversion=1,
    sagaid="order-1",
    runid="01890a5d-ac96-774b-bcce-b302099a8057",
    step="withdraw",
    activity="withdraw",
    direction="forward",
    commandid="c" * 32,
    attempt=1,
    replyto="saga.default.replies",
)
REPLY = Reply(
    id="m-2",
    namespace="default",
    saga="transfer",
    sagaid="order-1",
    runid="01890a5d-ac96-774b-bcce-b302099a8057",
    step="withdraw",
    direction="forward",
    commandid="c" * 32,
    attempt=1,
    outcome="done",
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


def raw(value: Any) -> bytes:
    return json.dumps(value).encode()


def changed(**attributes: Any) -> bytes:
    """The command's envelope with attributes changed; ... takes one away."""
    body = json.loads(encode_command(COMMAND, NULL)) | attributes
    return raw({name: value for name, value in body.items() if value is not ...})


def plain(message: Command | Reply) -> dict[str, Any]:
    return {
        each.name: getattr(message, each.name)
        for each in fields(type(message))
        if hasattr(message, each.name)
    }


@given(json_values, st.integers(0, 1_000), st.booleans(), st.none() | st.integers(0, 10**9))
def test_a_command_is_read_as_it_was_written(
    data: Any, attempt: int, flag: bool, remaining: int | None
) -> None:
    command = replace(
        COMMAND, attempt=attempt, resend=flag, final=not flag, remainingms=remaining, traceparent="00-x"
    )

    (read,) = decode_commands(encode_command(command, raw(data)))

    assert {name: plain(read)[name] for name in plain(command)} == plain(replace(command, data=data))


@given(json_values, st.sampled_from(["done", "refused", "failed", "nothing_to_undo", "had_run"]))
def test_a_reply_is_read_as_it_was_written(data: Any, outcome: Any) -> None:
    reply = replace(REPLY, outcome=outcome)

    (read,) = decode_replies(encode_reply(reply, raw(data)))

    assert {name: plain(read)[name] for name in plain(reply)} == plain(replace(reply, data=data))


def test_the_payloads_bytes_go_in_unchanged() -> None:
    """P32: a resend carries the same bytes, whatever they look like."""
    odd = b'{ "b": 1,\n"a": 1.50 }'

    assert encode_command(COMMAND, odd).endswith(b',"data":' + odd + b"}")


def test_an_unknown_attribute_is_ignored() -> None:
    """A newer sender is understood."""
    (read,) = decode_commands(changed(priority=3, dataschema="x"))

    assert read.step == "withdraw"


@pytest.mark.parametrize(
    "attributes",
    [
        {"type": "saga.command.v2"},
        {"type": "saga.reply.v1"},
        {"type": ...},
        {"specversion": "0.3"},
        {"specversion": ...},
        {"direction": "sideways"},
        {"attempt": "1"},
        {"attempt": 1.0},
        {"attempt": True},
        {"resend": "true"},
        {"commandid": ...},
        {"runid": 7},
        {"remainingms": "soon"},
    ],
    ids=str,
)
def test_what_is_no_command_of_this_protocol_is_refused(attributes: dict[str, Any]) -> None:
    """PYD-1. It is parked with its bytes and never acked unread."""
    with pytest.raises(MessageInvalid):
        decode_commands(changed(**attributes))
    with pytest.raises(MessageInvalid):
        decode_replies(changed(**attributes))


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"null", b"7", b'"text"', b"{}", b"{", b"[{}]", b"\xff\xfe", b"[" * 100_000),
        encode_command(COMMAND, b"NaN"),
        encode_command(COMMAND, b'{"x":[-Infinity]}'),
        encode_command(COMMAND, b"[" * 300 + b"]" * 300),
    ],
    ids=lambda body: body[-12:].decode(errors="replace"),
)
def test_a_body_that_is_no_message_is_refused_not_crashed_on(body: bytes) -> None:
    """PYD-7, F29."""
    with pytest.raises(MessageInvalid):
        decode_commands(body)


def test_words_in_texts_are_no_numbers() -> None:
    assert decode_commands(encode_command(COMMAND, b'"NaN, Infinity"'))[0].data == "NaN, Infinity"


def test_a_refusal_names_the_attribute_and_not_its_value() -> None:
    """PYD-4."""
    with pytest.raises(MessageInvalid) as caught:
        decode_commands(changed(attempt="4111111111111111"))

    assert "attempt: int_type" in caught.value.text
    assert "4111" not in f"{caught.value!r}{caught.value.text}{caught.value.__notes__}"
    assert caught.value.__cause__ is None


# --- several in one body --------------------------------------------------------------------------


def test_one_envelope_travels_alone_and_several_as_a_batch() -> None:
    one = encode_command(COMMAND, NULL)

    assert pack([one]) == (one, CONTENT_TYPE)
    body, content_type = pack([one, one])
    assert content_type == BATCH_CONTENT_TYPE
    assert [each.commandid for each in decode_commands(body)] == ["c" * 32] * 2
    assert len(decode_commands(b"\n " + body)) == 2, "white space before JSON means nothing"


@given(st.lists(st.integers(1, 120), max_size=60), st.integers(1, 10), st.integers(10, 200))
def test_packs_keep_order_and_both_bounds_and_let_only_a_giant_go_alone(
    sizes: list[int], count_max: int, bytes_max: int
) -> None:
    envelopes = [b"x" * size for size in sizes]

    groups = list(packs(envelopes, count_max=count_max, body_bytes_max=bytes_max))

    assert [index for group in groups for index in group] == list(range(len(sizes)))
    for group in groups:
        assert 1 <= len(group) <= count_max
        body, _ = pack([envelopes[index] for index in group])
        assert len(body) <= bytes_max or len(group) == 1
    for group, following in pairwise(groups):
        together, _ = pack([envelopes[index] for index in [*group, following[0]]])
        assert len(group) == count_max or len(together) >= bytes_max, "a group ends only where a bound is"


def test_a_bad_command_can_be_taken_out_of_its_batch() -> None:
    good = encode_command(COMMAND, raw({"a": 1}))
    body, _ = pack([good, changed(attempt="x"), good])

    with pytest.raises(MessageInvalid):
        decode_commands(body)
    parts = split(body)
    assert [len(decode_commands(parts[index])) for index in (0, 2)] == [1, 1]
    with pytest.raises(MessageInvalid):
        decode_commands(parts[1])
    assert split(good) == [good]


@pytest.mark.parametrize(
    "body", [b"", b"[", b"[]", b"[{]", b"[1 2]", b"[1]2", b"[" * 5_000, b"[1" + b",1" * 64 + b"]"]
)
def test_what_has_no_parts_cannot_be_split(body: bytes) -> None:
    with pytest.raises(MessageInvalid):
        split(body)


# --- names ----------------------------------------------------------------------------------------

RUN = "01890a5d-ac96-774b-bcce-b302099a8057"


def test_the_command_id_of_a_known_step_never_changes() -> None:
    """P2: participants dedupe on it and pass it to external systems."""
    assert (
        command_id("default", "money-transfer", RUN, "withdraw", 0, 0, "forward")
        == "2927e512c7e5edda5c5a9bdc3b2080c1"
    )
    assert (
        command_id("default", "überweisung", RUN, "s", 3, 1, "forward") == "0fa15bb8cbac4cc5d149143ae3145309"
    )


text = st.text(max_size=5)


@given(
    *[st.tuples(text, text, text, text, st.integers(0, 20), st.integers(0, 20), st.sampled_from("fc"))] * 2
)
def test_two_command_ids_are_equal_only_if_all_their_parts_are(first: Any, second: Any) -> None:
    assert (command_id(*first) == command_id(*second)) is (first == second)


def test_length_prefixes_keep_neighbouring_fields_apart() -> None:
    assert command_id("ab", "c", "", "", 0, 0, "f") != command_id("a", "bc", "", "", 0, 0, "f")


def test_channels_carry_their_namespace() -> None:
    assert commands_channel("default", "bank") == "saga.default.commands.bank"
    assert replies_channel("default") == "saga.default.replies"
    assert parking_channel("saga.default.replies") == "saga.default.replies.parked"

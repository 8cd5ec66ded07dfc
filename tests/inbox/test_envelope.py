"""Events on the wire: what is read, what is refused and how, and what a retry adds and takes away."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from saga.errors import MessageInvalid
from saga.inbox.envelope import again, message_key, original, read_event
from saga.messages import REPLY_BYTES_MAX
from tests.inbox.rig import envelope

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def test_an_event_has_its_attributes_and_data() -> None:
    body = envelope(7, id="e-1", subject="o-7", time="2026-01-01T00:00:00Z", tenant="north", priority=3)
    event = read_event(body)
    assert (event.id, event.source, event.type) == ("e-1", "https://shop.example/orders", "OrderPlaced")
    assert (event.subject, event.time, event.attempt) == ("o-7", datetime(2026, 1, 1, tzinfo=UTC), 1)
    assert event.attributes == {"tenant": "north", "priority": "3"}
    assert event.data["number"] == 7


def test_a_retry_is_the_same_bytes_with_the_attempt_before_them() -> None:
    """No number of the payload is read and written again: 1.10 stays 1.10."""
    body = b'{"specversion":"1.0","id":"e","source":"s","type":"t","data":{"price":1.10,"big":12345678901234567890}}'
    second = again(read_event(body), NOW)
    event = read_event(second)
    assert (event.attempt, event.since) == (2, NOW)
    third = again(event, datetime(2027, 1, 1, tzinfo=UTC))
    assert read_event(third).attempt == 3
    assert read_event(third).since == NOW
    assert original(read_event(third)) == body
    assert original(read_event(body)) == body


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"\xff", "json_invalid"),
        (b"[]", "not one event"),
        (envelope(1, specversion="0.3"), "specversion"),
        (envelope(1, id=" ").replace(b'"id": " "', b'"id": ""'), "id: missing"),
        (envelope(1, source=None), "source: missing"),
        (envelope(1, type=7), "type: not a text"),
        (envelope(1, time="yesterday"), "time: not an instant"),
        (envelope(1, time="2026-01-01T00:00:00"), "time: not an instant"),
        (envelope(1, datacontenttype="text/xml"), "data: not JSON"),
        (envelope(1, data_base64="AAAA"), "data: not JSON"),
        (envelope(1, sagaattempt=0), "sagaattempt"),
        (envelope(1, sagaattempt=True), "sagaattempt"),
        (envelope(1).replace(b'{"spec', b'{"id": "x", "spec'), "A name stands twice"),
        (envelope(1, data=json.loads("[" * 80 + "]" * 80)), "deeper than"),
        (envelope(1).replace(b'"number": 1', b'"number": 1e999'), "finite_number"),
        (envelope(1).replace(b'"number": 1', b'"number": NaN'), "json_invalid"),
        (b" " * (REPLY_BYTES_MAX + 1), "the limit is"),
    ],
)
def test_what_is_no_event_is_refused_by_attribute(body: bytes, says: str) -> None:
    with pytest.raises(MessageInvalid) as caught:
        read_event(body)
    assert says in caught.value.text


def test_keys_tell_apart_where_one_text_ends_and_the_next_begins() -> None:
    assert message_key("ab", "c") != message_key("a", "bc")
    assert message_key("a", "b") == message_key("a", "b")

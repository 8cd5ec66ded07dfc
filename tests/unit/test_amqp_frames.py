"""The hand-written AMQP frames equal what pamqp writes, and refuse what AMQP cannot carry."""

from __future__ import annotations

import subprocess
import sys

import pamqp.frame
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands as spec
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from saga.brokers.base import OutMessage
from saga.brokers.rabbitmq import frames

FRAME_BYTES_MAX = 4096
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def by_pamqp(message: OutMessage, message_id: str, channel: int) -> bytes:
    publish = spec.Basic.Publish(exchange="", routing_key=message.channel, mandatory=True)
    properties = spec.Basic.Properties(
        content_type=message.content_type,
        headers=dict(message.headers),
        delivery_mode=2,
        message_id=message_id,
    )
    parts = [
        pamqp.frame.marshal(publish, channel),
        pamqp.frame.marshal(ContentHeader(body_size=len(message.body), properties=properties), channel),
    ]
    size = FRAME_BYTES_MAX - 8
    bodies = [message.body[start : start + size] for start in range(0, len(message.body), size)]
    return b"".join([*parts, *(pamqp.frame.marshal(ContentBody(body), channel) for body in bodies)])


@given(
    queue=text.filter(bool),
    content_type=text.filter(bool),
    headers=st.dictionaries(text, text, min_size=1, max_size=5),
    body=st.binary(max_size=10_000),
    channel=st.integers(1, 2047),
)
def test_a_publish_is_written_as_pamqp_writes_it(
    queue: str, content_type: str, headers: dict[str, str], body: bytes, channel: int
) -> None:
    # pamqp sorts header names; we keep the order given
    message = OutMessage(queue, body, content_type, headers=dict(sorted(headers.items())))
    encoder = frames.PublishEncoder(channel, FRAME_BYTES_MAX)
    assert encoder.encode(message, "id-1") == by_pamqp(message, "id-1", channel)
    assert encoder.encode(message, "id-2") == by_pamqp(message, "id-2", channel), "also from its caches"


@pytest.mark.parametrize("tag", [1, 2**40])
@pytest.mark.parametrize("multiple", [True, False])
def test_acks_and_nacks_are_written_as_pamqp_writes_them(tag: int, multiple: bool) -> None:
    assert frames.ack(7, tag, multiple=multiple) == pamqp.frame.marshal(
        spec.Basic.Ack(delivery_tag=tag, multiple=multiple), 7
    )
    assert frames.requeue(7, tag) == pamqp.frame.marshal(
        spec.Basic.Nack(delivery_tag=tag, multiple=False, requeue=True), 7
    )


@pytest.mark.parametrize(
    "message",
    [
        OutMessage("q" * 256, b"", "text/plain"),
        OutMessage("q", b"", "t" * 256),
        OutMessage("q", b"", "text/plain", headers={"n" * 256: ""}),
        OutMessage("q", b"", "text/plain", headers={"n": "\ud800"}),
        OutMessage("\ud800", b"", "text/plain"),
    ],
    ids=["long queue", "long content type", "long header name", "lone surrogate", "lone surrogate in queue"],
)
def test_what_amqp_cannot_carry_is_a_value_error(message: OutMessage) -> None:
    """The publisher answers REFUSED for it, and its neighbours pass."""
    with pytest.raises(ValueError):
        frames.PublishEncoder(1, FRAME_BYTES_MAX).encode(message, "id")


def test_every_publish_is_mandatory_and_persistent() -> None:
    """RMQ-1, RMQ-3: neither is the driver's default."""
    data = frames.PublishEncoder(1, FRAME_BYTES_MAX).encode(OutMessage("q", b"x", "text/plain"), "id")
    size, _, publish = pamqp.frame.unmarshal(data)
    assert isinstance(publish, spec.Basic.Publish)
    assert publish.mandatory
    assert not publish.exchange, "the default exchange, which cannot be missing (RMQ-12)"
    _, _, header = pamqp.frame.unmarshal(data[size:])
    assert isinstance(header, ContentHeader)
    assert header.properties.delivery_mode == 2


def test_without_the_driver_the_error_names_the_extra() -> None:
    program = "import sys; sys.modules['aiormq'] = None; import saga.brokers.rabbitmq"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode != 0
    assert "MissingExtra" in ended.stderr
    assert "saga[rabbitmq]" in ended.stderr

"""Content: what goes in comes out, byte for byte."""

from __future__ import annotations

from saga.brokers.base import OutMessage, PublishOutcome
from saga.testing.contract.harness import Harness, expect
from saga.testing.contract.registry import behaviour


async def _through(h: Harness, message_body: bytes, content_type: str, headers: dict[str, str]) -> None:
    broker = await h.connect()
    name = await h.channel(broker)
    message = OutMessage(name, message_body, content_type, key="k", headers=headers)
    expect(await h.outcomes(broker.publish([message])) == [PublishOutcome.CONFIRMED], "confirmed")
    (delivery,) = await h.left(broker, name, 1)
    expect(
        delivery.body == message_body, f"body of {len(message_body)} bytes became {len(delivery.body)} bytes"
    )
    expect(delivery.content_type == content_type, f"content type became {delivery.content_type!r}")
    expect(
        {name: delivery.headers.get(name) for name in headers} == headers,
        f"headers became {delivery.headers}",
    )
    expect(delivery.channel == name, "the delivery names its channel")


@behaviour()
async def every_byte_value_passes(h: Harness) -> None:
    """A body is bytes, not text."""
    await _through(h, bytes(range(256)) * 3, "application/octet-stream", {})


@behaviour()
async def an_empty_body_passes(h: Harness) -> None:
    """Nothing is a body too."""
    await _through(h, b"", "application/json", {"a": "b"})


@behaviour()
async def a_body_of_256_kib_passes(h: Harness) -> None:
    """The largest pack (S21), which is several frames on some brokers."""
    await _through(h, bytes(range(256)) * 1024, "application/cloudevents-batch+json", {})


@behaviour()
async def a_body_that_looks_like_a_frame_end_passes(h: Harness) -> None:
    """Bytes that mean something on the wire mean nothing in a body."""
    await _through(h, b"\xce" * 1000 + b"\x00\r\n\r\n--\xce", "application/octet-stream", {})


@behaviour()
async def headers_pass(h: Harness) -> None:
    """Names and values are text of any script, also empty."""
    headers = {
        "id": "0189-ab",
        "ünï": "żółć 漢字 🙂",
        "empty": "",
        "long": "x" * 5000,
        "Case": "A",
        "case": "b",
    }
    await _through(h, b"x", "application/json", headers)


@behaviour()
async def a_message_without_headers_arrives_without_those_of_another(h: Harness) -> None:
    """Headers belong to one message."""
    broker = await h.connect()
    name = await h.channel(broker)
    await h.send(broker, name, b"1", headers={"mine": "1"})
    await h.send(broker, name, b"2")
    first, second = sorted(await h.left(broker, name, 2), key=lambda delivery: delivery.body)
    expect(first.headers.get("mine") == "1", "the header of the first")
    expect("mine" not in second.headers, "is not one of the second")


@behaviour()
async def the_content_type_passes(h: Harness) -> None:
    """With its parameters."""
    await _through(h, b"{}", "application/cloudevents+json; charset=utf-8", {})

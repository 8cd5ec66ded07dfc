"""A message as a Kafka record and back: the body is the value, the key decides the partition, headers are bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from saga.brokers.base import EMPTY, Delivery, OutMessage

CONTENT_TYPE: Final = "content-type"
"""Record header of the CloudEvents binding for Kafka. A sender's own header of that name gives way."""


class Record(NamedTuple):
    """What aiokafka takes."""

    key: bytes
    value: bytes
    headers: Sequence[tuple[str, bytes]]


def record_of(message: OutMessage) -> Record:
    """Return the record of a message. Errors: ValueError for text that is not Unicode.

    A message without a key has the empty one, so that those stay in order among themselves too.
    """
    headers = [(CONTENT_TYPE, message.content_type.encode())]
    for name, value in message.headers.items():
        name.encode()
        if name != CONTENT_TYPE:
            headers.append((name, value.encode()))
    return Record(message.key.encode(), message.body, headers)


def delivery_of(channel: str, record: Any, token: object) -> Delivery:
    """Return the first delivery of a record: a log keeps no account of deliveries."""
    content_type, headers = "", EMPTY
    if record.headers:
        texts = {name: (value or b"").decode("utf-8", "replace") for name, value in record.headers}
        content_type = texts.pop(CONTENT_TYPE, "")
        headers = texts or EMPTY
    return Delivery(
        channel=channel,
        body=record.value or b"",
        content_type=content_type,
        headers=headers,
        redelivered=False,
        delivery_count=1,
        token=token,
    )

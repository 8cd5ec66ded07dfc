"""Names: where an address says the cluster is, and what a channel is called on it."""

from __future__ import annotations

import hashlib
import re
from typing import Final
from urllib.parse import urlsplit

from saga.errors import ConfigurationError

SCHEME: Final = "kafka"
NOTES_GROUP: Final = "saga.channels"
"""Group without members whose committed offsets carry a note for each topic: where its poison goes."""
_PORT: Final = 9092
_NAME_LENGTH_MAX: Final = 249
_LEGAL: Final = re.compile(r"[A-Za-z0-9._-]+")


def servers_of(address: str) -> list[str]:
    """Return `host:port` of each broker in `kafka://host:port,host2:port`. Raises ConfigurationError."""
    parts = urlsplit(address)
    if parts.scheme != SCHEME or not parts.netloc:
        raise ConfigurationError("a Kafka address is of the form kafka://host:port,host2:port")
    if "@" in parts.netloc:
        raise ConfigurationError("a Kafka address has no user: SASL is not there yet")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ConfigurationError("a Kafka address ends with its brokers; everything else is in KafkaOptions")
    return [_server(each) for each in parts.netloc.split(",")]


def _server(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(_PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigurationError("each broker of a Kafka address is host:port")
    return f"{host}:{port}"


def topic_of(channel: str) -> str:
    """Return the topic of a channel, which is the name of its group too.

    A name that Kafka takes stays as it is. Others get a digest, so that no two channels meet in one topic.
    """
    if _LEGAL.fullmatch(channel) and len(channel) <= _NAME_LENGTH_MAX and channel not in (".", ".."):
        return channel
    digest = hashlib.sha256(channel.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    kept = re.sub(r"[^A-Za-z0-9.-]", "-", channel)[: _NAME_LENGTH_MAX - len(digest) - 1]
    return f"{kept}-{digest}"

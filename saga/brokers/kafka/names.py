"""Names: what a channel is called on the cluster."""

from __future__ import annotations

import hashlib
import re
from typing import Final

NOTES_GROUP: Final = "saga.channels"
"""Group without members whose committed offsets carry a note for each topic: where its poison goes."""
_NAME_LENGTH_MAX: Final = 249
_LEGAL: Final = re.compile(r"[A-Za-z0-9._-]+")


def topic_of(channel: str) -> str:
    """Return the topic of a channel, which is the name of its group too.

    A name that Kafka takes stays as it is. Others get a digest, so that no two channels meet in one topic.
    """
    if _LEGAL.fullmatch(channel) and len(channel) <= _NAME_LENGTH_MAX and channel not in (".", ".."):
        return channel
    digest = hashlib.sha256(channel.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    kept = re.sub(r"[^A-Za-z0-9.-]", "-", channel)[: _NAME_LENGTH_MAX - len(digest) - 1]
    return f"{kept}-{digest}"

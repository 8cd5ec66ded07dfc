"""An event on the wire: a CloudEvents 1.0 message in structured JSON, from our outbox or anybody else's.

A retry is the same bytes with two attributes of ours before them, so that no number of the payload is read and written
again on its way.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

from pydantic_core import to_json

from saga.errors import MessageInvalid
from saga.messages import NUMBER_MAX, REPLY_BYTES_MAX, read_json

ATTEMPT: Final = "sagaattempt"
SINCE: Final = "sagasince"
TEXT_LENGTH_MAX: Final = 2_000
NAMES: Final = frozenset(
    {"specversion", "type", "source", "id", "subject", "time", "datacontenttype", "data", ATTEMPT, SINCE}
)
_JSON: Final = re.compile(r"application/([a-z0-9.-]+\+)?json\s*(;.*)?", re.IGNORECASE)
_OURS: Final = re.compile(rb'\{"sagaattempt":\d+,"sagasince":"[^"]*",')


class Event(NamedTuple):
    """An event as it was received."""

    body: bytes
    id: str
    source: str
    type: str
    subject: str | None
    time: datetime | None
    attributes: Mapping[str, str]
    data: Any
    attempt: int
    since: datetime | None
    """When the first attempt failed; None before that."""


def read_event(body: bytes) -> Event:
    """Return the event in a body. Raises MessageInvalid, which names the attribute and never its value."""
    found = read_json(body, bytes_max=REPLY_BYTES_MAX)
    if not isinstance(found, dict):
        raise MessageInvalid("body: not one event")
    if found.get("specversion") != "1.0":
        raise MessageInvalid("specversion: not 1.0")
    if "data_base64" in found or not _JSON.fullmatch(_text(found, "datacontenttype") or "application/json"):
        raise MessageInvalid("data: not JSON")
    attempt = found.get(ATTEMPT, 1)
    if type(attempt) is not int or not 1 <= attempt <= NUMBER_MAX:
        raise MessageInvalid(f"{ATTEMPT}: not a number of an attempt")
    return Event(
        body,
        _required(found, "id"),
        _required(found, "source"),
        _required(found, "type"),
        _text(found, "subject"),
        _instant(found, "time"),
        {name: _shown(value) for name, value in found.items() if name not in NAMES},
        found.get("data"),
        attempt,
        _instant(found, SINCE),
    )


def original(event: Event) -> bytes:
    """Return the event as its publisher sent it."""
    return _OURS.sub(b"{", event.body, count=1)


def again(event: Event, now: datetime) -> bytes:
    """Return the event as the next attempt."""
    since = event.since or now
    head = to_json({ATTEMPT: event.attempt + 1, SINCE: since.isoformat()})
    return head[:-1] + b"," + original(event).lstrip()[1:]


def message_key(*parts: str) -> UUID:
    """Return the key that some texts make: 122 bits of their SHA-256, their lengths among them."""
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return UUID(bytes=hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16], version=5)


def _required(found: Mapping[str, Any], name: str) -> str:
    text = _text(found, name)
    if not text:
        raise MessageInvalid(f"{name}: missing")
    return text


def _text(found: Mapping[str, Any], name: str) -> str | None:
    value = found.get(name)
    if value is not None and (not isinstance(value, str) or len(value) > TEXT_LENGTH_MAX):
        raise MessageInvalid(f"{name}: not a text of at most {TEXT_LENGTH_MAX} characters")
    return value


def _instant(found: Mapping[str, Any], name: str) -> datetime | None:
    text = _text(found, name)
    if text is None:
        return None
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        instant = None
    if instant is None or instant.tzinfo is None:
        raise MessageInvalid(f"{name}: not an instant with its offset")
    return instant


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value).decode()

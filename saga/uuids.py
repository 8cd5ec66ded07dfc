"""Making and reading UUIDs: with asyncpg's class where it is installed, whose instances cost a fifth of the standard's.

It is a subclass of `uuid.UUID`, equal and hashed alike, so nothing else needs to know which one it has.
"""

from __future__ import annotations

from uuid import UUID

try:
    from asyncpg.pgproto import pgproto
except ImportError:
    pgproto = None


def uuid_of(raw: bytes) -> UUID:
    """Return the UUID of 16 bytes."""
    made: UUID = UUID(bytes=raw) if pgproto is None else pgproto.UUID(raw)
    return made


def parse_uuid(text: str) -> UUID:
    """Return the UUID that a text names. Raises ValueError."""
    parsed: UUID = UUID(text) if pgproto is None else pgproto.UUID(text)
    return parsed

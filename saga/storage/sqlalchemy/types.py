"""Column types that mean the same on every database.

MySQL and MariaDB need a length for what is part of a key, compare texts without case and trailing blanks unless told
otherwise (MDB-7), and have small defaults for bytes and fractions of a second. An address may name them as one dialect
or as the other.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import BINARY, VARBINARY, BigInteger, DateTime, Integer, LargeBinary, Text, Uuid
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine

IDENTITY = BigInteger().with_variant(Integer, "sqlite")
"""Identity columns: SQLite numbers INTEGER keys only (LITE-4)."""

MYSQL: Final = ("mysql", "mariadb")
COLLATION: Final = "utf8mb4_bin"
NAME_LENGTH: Final = 255
"""Characters of what is part of a key: three of them, a word and three numbers fit into 3,072 bytes."""
WORD_LENGTH: Final = 40


class UtcDateTime(TypeDecorator[datetime]):
    """An instant: aware in, aware UTC out, whatever the database keeps (LITE-4, MDB-8)."""

    impl: TypeEngine[Any] | type[TypeEngine[Any]] = DateTime(timezone=True)
    cache_ok: bool | None = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name in MYSQL:
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return super().load_dialect_impl(dialect)

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("an instant without time zone")
        utc = value.astimezone(UTC)
        return utc if dialect.name == "postgresql" else utc.replace(tzinfo=None)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        instant: datetime = value
        return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)


class BinaryUuid(TypeDecorator[UUID]):
    """A UUID as its 16 bytes, whose order is that of the ids."""

    impl: TypeEngine[Any] | type[TypeEngine[Any]] = BINARY(16)
    cache_ok: bool | None = True

    def process_bind_param(self, value: UUID | None, dialect: Dialect) -> bytes | None:
        return None if value is None else value.bytes

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> UUID | None:
        return None if value is None else UUID(bytes=value)


class BinaryText(TypeDecorator[str]):
    """A text as its bytes: every collation that both servers know takes `a` and `a ` for the same (MDB-7)."""

    impl: TypeEngine[Any] | type[TypeEngine[Any]] = VARBINARY(4 * NAME_LENGTH)
    cache_ok: bool | None = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> bytes | None:
        return None if value is None else value.encode()

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> str | None:
        return None if value is None else value.decode()


def instant() -> TypeEngine[Any]:
    """Return the column type of an instant."""
    return UtcDateTime()


def uuid() -> TypeEngine[UUID]:
    """Return the column type of an id."""
    return Uuid().with_variant(BinaryUuid(), *MYSQL)


def key() -> TypeEngine[str]:
    """Return the column type of an id or key of any characters, blanks at its end included."""
    return Text().with_variant(BinaryText(), *MYSQL)


def name() -> TypeEngine[str]:
    """Return the column type of a name, which has no blanks: what keys are made of."""
    return _varchar(NAME_LENGTH)


def word() -> TypeEngine[str]:
    """Return the column type of a word of ours, which is short."""
    return _varchar(WORD_LENGTH)


def long_name() -> TypeEngine[str]:
    """Return the column type of a command's id, which is made of several names."""
    return _varchar(2 * NAME_LENGTH)


def prose() -> TypeEngine[str]:
    """Return the column type of a text of any length."""
    return Text().with_variant(mysql.MEDIUMTEXT(charset="utf8mb4", collation=COLLATION), *MYSQL)


def data() -> TypeEngine[bytes]:
    """Return the column type of payloads and messages."""
    return LargeBinary().with_variant(mysql.MEDIUMBLOB(), *MYSQL)


def _varchar(length: int) -> TypeEngine[str]:
    return Text().with_variant(mysql.VARCHAR(length, charset="utf8mb4", collation=COLLATION), *MYSQL)

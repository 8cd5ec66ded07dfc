"""The columns that steps are made of; frozen like the steps, so that a later release makes the same tables.

On MySQL and MariaDB what is part of a key has a length, texts compare byte by byte (MDB-7), and instants keep their
fractions (MDB-8). Elsewhere a text is a text.
"""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.dialects import mysql

_MYSQL: Final = ("mysql", "mariadb")
_COLLATED: Final = {"charset": "utf8mb4", "collation": "utf8mb4_bin"}

NUMBER: Final = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # LITE-4: SQLite numbers INTEGER keys only
INNODB: Final = {"mysql_engine": "InnoDB"}


def name(column: str, *, nullable: bool = False) -> sa.Column[str]:
    """A name, which has no blanks: what keys are made of."""
    return _varchar(column, 255, nullable)


def key(column: str) -> sa.Column[str]:
    """An id or key of any characters: as bytes, because collations do not see blanks at an end (MDB-7)."""
    return sa.Column(column, sa.Text().with_variant(sa.VARBINARY(1020), *_MYSQL), nullable=False)


def word(column: str, *, nullable: bool = False) -> sa.Column[str]:
    """A short word of ours."""
    return _varchar(column, 40, nullable)


def long_name(column: str) -> sa.Column[str]:
    """The id of a command."""
    return _varchar(column, 510, nullable=False)


def prose(column: str, *, nullable: bool = False) -> sa.Column[str]:
    """A text of any length."""
    kind = sa.Text().with_variant(mysql.MEDIUMTEXT(**_COLLATED), *_MYSQL)
    return sa.Column(column, kind, nullable=nullable)


def data(column: str, *, nullable: bool = False) -> sa.Column[bytes]:
    """A payload or a message."""
    return sa.Column(column, sa.LargeBinary().with_variant(mysql.MEDIUMBLOB(), *_MYSQL), nullable=nullable)


def uuid(column: str, *, nullable: bool = False) -> sa.Column[Any]:
    """An id of ours."""
    return sa.Column(column, sa.Uuid().with_variant(sa.BINARY(16), *_MYSQL), nullable=nullable)


def instant(column: str, *, nullable: bool = False) -> sa.Column[Any]:
    """An instant."""
    kind = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), *_MYSQL)
    return sa.Column(column, kind, nullable=nullable)


def integer(column: str, *, nullable: bool = False) -> sa.Column[int]:
    """A number."""
    return sa.Column(column, sa.Integer(), nullable=nullable)


def small(column: str) -> sa.Column[int]:
    """A number that is never large."""
    return sa.Column(column, sa.SmallInteger(), nullable=False)


def number() -> sa.Column[int]:
    """A number that the database gives."""
    return sa.Column("id", NUMBER, autoincrement=True, nullable=False)


def create_index(op: Operations, index: str, table: str, columns: list[str], **options: Any) -> None:
    """Make an index unless it is there; MySQL has no words for the second half."""
    context = op.get_context()
    if context.dialect.name not in _MYSQL:
        op.create_index(index, table, columns, if_not_exists=True, **options)
    elif context.as_sql or index not in _indexes(op.get_bind(), table):
        op.create_index(index, table, columns)


def _indexes(connection: sa.Connection, table: str) -> set[str | None]:
    return {index["name"] for index in sa.inspect(connection).get_indexes(table)}


def _varchar(column: str, length: int, nullable: bool) -> sa.Column[str]:
    kind = sa.Text().with_variant(mysql.VARCHAR(length, **_COLLATED), *_MYSQL)
    return sa.Column(column, kind, nullable=nullable)

"""A schema as text: what a part is called and what it looks like. Two of them are compared part by part."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import CheckConstraint, Connection, Index, Table, UniqueConstraint, inspect, text
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeEngine

from saga.storage.sqlalchemy.tables import metadata

TABLE: Final = "table"
KEY: Final = "primary key of"
FOREIGN: Final = "column that is not ours,"


class Part(NamedTuple):
    table: str
    kind: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name} on {self.table}" if self.name else f"{self.kind} {self.table}"


def expected(dialect: Dialect) -> dict[Part, str]:
    """Return what this release wants."""
    reading = _reading(dialect)
    shapes: dict[Part, str] = {}
    for table in metadata.sorted_tables:
        shapes[Part(table.name, TABLE)] = ""
        for column in table.columns:
            shapes[Part(table.name, "column", column.name)] = _column_shape(
                reading.type_of(column.type), bool(column.nullable), column.autoincrement is True
            )
        key = table.primary_key
        shapes[Part(table.name, KEY)] = _key_shape(
            reading.key_name(table), [column.name for column in key.columns]
        )
        for constraint in table.constraints:
            if isinstance(constraint, UniqueConstraint):
                part = Part(table.name, "unique key", str(constraint.name))
                shapes[part] = ", ".join(column.name for column in constraint.columns)
            elif isinstance(constraint, CheckConstraint) and reading.keeps_checks():
                part = Part(table.name, "check", str(constraint.name))
                shapes[part] = _condition(constraint.sqltext)
        for index in table.indexes:
            shapes[Part(table.name, "index", str(index.name))] = _index_shape(
                [column.name for column in index.columns], bool(index.unique), reading.where(index)
            )
    return shapes


def actual(connection: Connection, schema: str | None) -> dict[Part, str]:
    """Return what is there of our tables."""
    inspector, shapes = inspect(connection), dict[Part, str]()
    dialect, ours = connection.dialect, list(metadata.tables)
    reading = _reading(dialect)
    numbered, collations = reading.numbered(connection), reading.collations(connection)
    for (_, table), columns in inspector.get_multi_columns(schema=schema, filter_names=ours).items():
        shapes[Part(table, TABLE)] = ""
        for column in columns:
            name, nullable = column["name"], column["nullable"]
            counts = (
                bool(column.get("autoincrement")) if numbered is None else name == "id" and table in numbered
            )
            shapes[Part(table, "column", name)] = _column_shape(
                _collated(reading.type_of(column["type"]), collations.get((table, name))), nullable, counts
            )
            if name not in metadata.tables[table].columns and not nullable and column["default"] is None:
                shapes[Part(table, FOREIGN, name)] = ""
    for (_, table), key in inspector.get_multi_pk_constraint(schema=schema, filter_names=ours).items():
        shapes[Part(table, KEY)] = _key_shape(key["name"], key["constrained_columns"])
    for (_, table), uniques in inspector.get_multi_unique_constraints(
        schema=schema, filter_names=ours
    ).items():
        for unique in uniques:
            shapes[Part(table, "unique key", str(unique["name"]))] = ", ".join(unique["column_names"])
    for (_, table), checks in inspector.get_multi_check_constraints(schema=schema, filter_names=ours).items():
        for each in checks:
            shapes[Part(table, "check", str(each["name"]))] = _condition(each["sqltext"])
    for (_, table), indexes in inspector.get_multi_indexes(schema=schema, filter_names=ours).items():
        for index in indexes:
            shapes[Part(table, "index", str(index["name"]))] = _index_shape(
                [str(name) for name in index["column_names"]],
                bool(index["unique"]),
                index.get("dialect_options", {}).get(f"{dialect.name}_where"),
            )
    return shapes


class _Reading:
    """What a dialect keeps of what it is told, and in which words; this one is PostgreSQL's."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect

    def type_of(self, type_: TypeEngine[Any]) -> str:
        """Return a column's type."""
        return type_.compile(self.dialect)

    def key_name(self, table: Table) -> str | None:
        """Return the name of the primary key, None where it gets none."""
        return str(table.primary_key.name)

    def where(self, index: Index) -> object:
        """Return the condition of an index, None for a whole one."""
        return index.dialect_options[self.dialect.name]["where"]

    def keeps_checks(self) -> bool:
        """Whether there are checks."""
        return True

    def numbered(self, _connection: Connection) -> set[str] | None:
        """Return the tables that number their rows, None where reflection tells."""
        return None

    def collations(self, _connection: Connection) -> dict[tuple[str, str], str]:
        """Return how the columns of texts compare, by table and column, where reflection tells only what is unusual."""
        return {}


class _SqliteReading(_Reading):
    def key_name(self, table: Table) -> str | None:
        # only a key that is declared with its column is numbered, which leaves it without a name
        return None if table.dialect_options["sqlite"]["autoincrement"] else super().key_name(table)

    def numbered(self, connection: Connection) -> set[str] | None:
        """Return the tables whose numbers never come back (LITE-3); reflection does not tell."""
        rows = connection.execute(
            text("SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE '%AUTOINCREMENT%'")
        )
        return set(rows.scalars())


class _MySQLReading(_Reading):
    def type_of(self, type_: TypeEngine[Any]) -> str:
        # a collation says which character set it is of, and some versions tell an integer's width, which means nothing
        return re.sub(
            r" CHARACTER SET \w+|(?<=INT)\(\d+\)|(?<=INTEGER)\(\d+\)", "", type_.compile(self.dialect)
        )

    def collations(self, connection: Connection) -> dict[tuple[str, str], str]:
        rows = connection.execute(
            text(
                "SELECT table_name, column_name, collation_name FROM information_schema.columns"
                " WHERE table_schema = DATABASE() AND collation_name IS NOT NULL"
            )
        )
        return {(table, column): collation for table, column, collation in rows}

    def key_name(self, table: Table) -> str | None:
        return None

    def where(self, index: Index) -> object:
        return None

    def keeps_checks(self) -> bool:
        """Before 8.0.16 MySQL reads them and forgets them."""
        server: Any = self.dialect
        return bool(server.is_mariadb or server.server_version_info >= (8, 0, 16))


def _collated(type_: str, collation: str | None) -> str:
    """Return a type with its collation."""
    return type_ if collation is None else f"{type_.partition(' COLLATE ')[0]} COLLATE {collation}"


def _reading(dialect: Dialect) -> _Reading:
    return {"sqlite": _SqliteReading, "mysql": _MySQLReading}.get(dialect.name, _Reading)(dialect)


def _column_shape(type_: str, nullable: bool, numbered: bool) -> str:
    return type_ + ("" if nullable else " NOT NULL") + (" numbered" if numbered else "")


def _key_shape(name: str | None, columns: Sequence[str]) -> str:
    return f"({', '.join(columns)})" + (f" named {name}" if name else "")


def _index_shape(columns: Sequence[str], unique: bool, where: object) -> str:
    shape = ("unique " if unique else "") + ", ".join(columns)
    return shape if where is None else f"{shape} where {_condition(where)}"


def _condition(sql: object) -> str:
    """Return a condition without what a database adds when it stores one: blanks, brackets, quotes and case."""
    return re.sub(r'[\s()"`]+', "", str(sql)).lower()

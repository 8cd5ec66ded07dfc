"""What each stack is made of, said once: where its database is, which broker it has, and what runs on all four."""

from __future__ import annotations

import os
from typing import Final

import pytest

from tests.features_due import (
    EVERYWHERE,
    MARIADB,
    MARIADB_KAFKA,
    MARIADB_RABBITMQ,
    MYSQL,
    POSTGRES,
    POSTGRES_KAFKA,
    POSTGRES_RABBITMQ,
    SQLITE,
    SQLITE_SHARED,
)

BROKERS: Final = {
    SQLITE: None,
    POSTGRES_RABBITMQ: "rabbitmq_url",
    POSTGRES_KAFKA: "kafka_url",
    POSTGRES: "database://",
    SQLITE_SHARED: "database://",
    MARIADB: "database://",
    MYSQL: None,
    MARIADB_RABBITMQ: "rabbitmq_url",
    MARIADB_KAFKA: "kafka_url",
}
"""Stack to its broker's address, or to the fixture that gives one; None is the broker in the process."""
SERVERS: Final = {
    POSTGRES_RABBITMQ: "postgres_server",
    POSTGRES_KAFKA: "postgres_server",
    POSTGRES: "postgres_server",
    MARIADB: "mariadb_server",
    MYSQL: "mysql_server",
    MARIADB_RABBITMQ: "mariadb_server",
    MARIADB_KAFKA: "mariadb_server",
}
"""Stack to the fixture that gives its database's server."""
EVERY_SERVER: Final = bool(os.environ.get("SAGA_TEST_EVERY_SERVER"))
REPEATED: Final = (MARIADB_RABBITMQ, MYSQL) if EVERY_SERVER else ()
"""What these would show once more after PostgreSQL: `make test-servers` and `make features` have it. On MariaDB
statements, errors, migrations, the barrier and the database broker run always."""
TWIN: Final = (MYSQL,) if EVERY_SERVER else ()
"""What MySQL would show once more after MariaDB; statements, errors and migrations run on both always."""
AGAIN: Final = (POSTGRES_KAFKA, MARIADB_RABBITMQ, MARIADB_KAFKA) if EVERY_SERVER else ()
"""The same for tests of whole services: what Kafka, and MariaDB with each, would show once more after RabbitMQ."""

every_stack: Final = pytest.mark.parametrize("stack", EVERYWHERE, indirect=True)
"""For a test whose fixture `stack` has fewer by itself."""


def broker_of(stack: str, request: pytest.FixtureRequest) -> str | None:
    """Return the address of a stack's broker; None is the one in the process."""
    named = BROKERS[stack]
    return str(request.getfixturevalue(named)) if named is not None and "://" not in named else named


def in_file(stack: str) -> bool:
    """Whether the stack's database is SQLite."""
    return stack in (SQLITE, SQLITE_SHARED)


def in_queue(stack: str) -> bool:
    """Whether the stack's broker is the database itself."""
    return BROKERS[stack] == "database://"

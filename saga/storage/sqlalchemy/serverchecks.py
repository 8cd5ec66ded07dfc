"""What a server must be for the promises to hold: its version and settings, looked at before anything else starts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import Connection, bindparam, func, select, text

from saga.clock import Clock
from saga.errors import UnsupportedDatabase

log: Final[logging.Logger] = logging.getLogger("saga.storage")

POSTGRESQL_MIN: Final = 14
SQLITE_MIN: Final = (3, 35)
MARIADB_MIN: Final = (10, 6)
MYSQL_MIN: Final = (8, 0)
CLOCK_OFFSET_MAX: Final = timedelta(seconds=1)


def check_server(connection: Connection, clock: Clock) -> None:
    """Raise UnsupportedDatabase unless the server's version and settings are those that the promises rest on."""
    _CHECKS[connection.dialect.name](connection, clock)


def _check_sqlite(connection: Connection, _clock: Clock) -> None:
    version: str = connection.scalar(select(func.sqlite_version())) or ""
    if tuple(int(part) for part in version.split(".")[:2]) < SQLITE_MIN:
        raise UnsupportedDatabase(f"SQLite {version} is too old; 3.35 or later is needed.")
    for pragma, wanted, name in (
        ("PRAGMA journal_mode", "wal", "WAL"),
        ("PRAGMA synchronous", 2, "FULL"),
        ("PRAGMA foreign_keys", 1, "on"),
    ):
        found = connection.exec_driver_sql(pragma).scalar()
        if found != wanted:
            raise UnsupportedDatabase(
                f"SQLite: {pragma} is {found}, not {name}; is the file on a network disk?"
            )


def _check_postgresql(connection: Connection, clock: Clock) -> None:
    before = clock.now()
    row = connection.execute(
        select(
            func.clock_timestamp(),
            func.pg_is_in_recovery(),
            *(func.current_setting(name) for name in _SETTINGS),
        )
    ).one()
    after = clock.now()
    database_now, replica, version, number, isolation, read_only, durable, *timeouts = row
    if int(number) // 10_000 < POSTGRESQL_MIN:
        raise UnsupportedDatabase(f"PostgreSQL {version} is too old; {POSTGRESQL_MIN} or later is needed.")
    if replica or read_only == "on":
        raise UnsupportedDatabase(
            "This PostgreSQL is a replica or read-only; give the address of the primary."
        )
    if isolation != "read committed":
        raise UnsupportedDatabase(f"Transactions run at {isolation.upper()}, not READ COMMITTED.")
    for name, value in zip(_TIMEOUTS, timeouts, strict=True):
        if value == "0":
            raise UnsupportedDatabase(
                f"{name} did not reach the server; a connection pooler drops it: set it on the role."
            )
    if durable == "off":
        log.warning("synchronous_commit is off: a crash of the database may take back what was promised")
    _compare_clocks(database_now, before, after)


def _check_mysql(connection: Connection, clock: Clock) -> None:
    before = clock.now()
    now, version = connection.execute(_NOW_AND_VERSION).one()
    after = clock.now()
    mariadb = "mariadb" in version.lower()
    name, oldest = ("MariaDB", MARIADB_MIN) if mariadb else ("MySQL", MYSQL_MIN)
    if tuple(int(part) for part in version.partition("-")[0].split(".")[:2]) < oldest:
        needed = ".".join(map(str, oldest))
        raise UnsupportedDatabase(f"{name} {version} is too old; {needed} or later is needed.")
    rows = connection.execute(_VARIABLES, {"names": _MARIADB_NAMES if mariadb else _MYSQL_NAMES})
    found: dict[str, str] = {row[0].removeprefix("tx_").removeprefix("transaction_"): row[1] for row in rows}
    if found["read_only"] == "ON":
        raise UnsupportedDatabase(f"This {name} is a replica or read-only; give the address of the primary.")
    if (level := found["isolation"].replace("-", " ")) != "READ COMMITTED":
        raise UnsupportedDatabase(f"Transactions run at {level}, not READ COMMITTED.")
    for setting, value in found.items():
        if setting in _MYSQL_BOUNDS and not 0 < float(value) <= _MYSQL_BOUNDS[setting]:
            raise UnsupportedDatabase(f"{setting} did not reach the server; a proxy drops it: set it there.")
    if "STRICT_TRANS_TABLES" not in found["sql_mode"]:
        raise UnsupportedDatabase(
            "sql_mode lacks STRICT_TRANS_TABLES; a proxy drops it: set it on the server."
        )
    if found["innodb_flush_log_at_trx_commit"] != "1":
        log.warning(
            "innodb_flush_log_at_trx_commit is not 1: a crash of the database may take back what was promised"
        )
    _compare_clocks(now.replace(tzinfo=UTC), before, after)


def _compare_clocks(database_now: datetime, before: datetime, after: datetime) -> None:
    offset = database_now - (before + (after - before) / 2)
    if abs(offset) > CLOCK_OFFSET_MAX:
        log.warning("the clock of this host is %+.1f s off the database's", -offset.total_seconds())


_TIMEOUTS: Final = ("statement_timeout", "lock_timeout")
_SETTINGS: Final = (
    "server_version",
    "server_version_num",
    "transaction_isolation",
    "transaction_read_only",
    "synchronous_commit",
    *_TIMEOUTS,
)

_NOW_AND_VERSION: Final = text("SELECT UTC_TIMESTAMP(6), VERSION()")
_VARIABLES: Final = text("SHOW SESSION VARIABLES WHERE variable_name IN :names").bindparams(
    bindparam("names", expanding=True)
)
_OF_BOTH: Final = ("read_only", "sql_mode", "innodb_flush_log_at_trx_commit", "innodb_lock_wait_timeout")
_MARIADB_NAMES: Final = (*_OF_BOTH, "tx_isolation", "max_statement_time")
_MYSQL_NAMES: Final = (*_OF_BOTH, "transaction_isolation", "max_execution_time")
_MYSQL_BOUNDS: Final = {
    "innodb_lock_wait_timeout": 10,
    "max_execution_time": 10_000,
    "max_statement_time": 10,
}
_CHECKS: Final[dict[str, Callable[[Connection, Clock], None]]] = {
    "mysql": _check_mysql,
    "postgresql": _check_postgresql,
    "sqlite": _check_sqlite,
}

"""Connections of asyncmy and PyMySQL to MySQL or MariaDB: each wait has a bound, and no warning is told.

SQL-6: an answer that does not come in time is a lost connection, which is what errors of a dead link say.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Any, Final

import asyncmy.connection
import asyncmy.cursors
import pymysql.connections
from sqlalchemy import Engine, event

from saga.storage.sqlalchemy.pools import is_over

DIGITS_MAX: Final = 1_000_000
"""Bytes that are written as digits; max_allowed_packet is 16 MB by default, and messages may have 10 MiB."""


def settings(*, statement_seconds: float, lock_seconds: float, idle_seconds: float | None) -> str:
    """Return the statement that tells the server of our bounds, for which each kind has names of its own.

    What only one of them understands stands in comments that only that one reads. MySQL bounds no statement but reads,
    and cannot tell an idle transaction from an idle connection; the pool lends none that was closed.
    """
    mariadb = f", max_statement_time = {statement_seconds:g}"
    mysql = f", max_execution_time = {int(statement_seconds * 1000)}"
    if idle_seconds is not None:
        mariadb += f", idle_transaction_timeout = {int(idle_seconds)}"
        mysql += f", wait_timeout = {int(idle_seconds)}"
    bounds = f"innodb_lock_wait_timeout = {int(lock_seconds)}, lock_wait_timeout = {int(lock_seconds)}"
    # MDB-5: what does not fit is an error, and is not made to fit
    strict = "sql_mode = CONCAT(@@sql_mode, ',STRICT_TRANS_TABLES')"
    return f"SET SESSION {bounds}, {strict} /*M! {mariadb} */ /*!80000 {mysql} */"


def arguments(told: str, *, connect_seconds: float, answer_seconds: float) -> dict[str, Any]:
    """Return the arguments of an asynchronous connection. `told` is the statement that it begins with."""

    async def connect(**named: Any) -> BoundedConnection:
        connection = BoundedConnection(**named)  # type: ignore[no-untyped-call]
        async with asyncio.timeout(connect_seconds):  # the driver's own ends when there is a socket
            await connection.connect()
        return connection

    return {
        "async_creator_fn": connect,
        "connect_timeout": connect_seconds,
        "read_timeout": answer_seconds,
        "init_command": told,
        "cursor_cls": QuietCursor,
    }


def thread_arguments(told: str, *, connect_seconds: float, answer_seconds: float) -> dict[str, Any]:
    """Return the arguments of a connection of threads."""
    return {
        "connect_timeout": connect_seconds,
        "read_timeout": answer_seconds,
        "write_timeout": answer_seconds,
        "init_command": told,
        "binary_prefix": True,  # else bytes are taken for text first, and warned about
    }


def silence() -> None:
    """Keep the driver from logging the server's warnings, which have keys of rows in them (SQL-9).

    Our own connections ask for none; those of a caller's session do, and our statements run there, too.
    """
    logging.getLogger("asyncmy").addFilter(_tells_no_warning)


def _tells_no_warning(record: logging.LogRecord) -> bool:
    return record.levelno != logging.WARNING


def bound(engine: Engine) -> None:
    """Let an engine of threads make connections that know whether they are dead."""

    @event.listens_for(engine, "do_connect")
    def connect(
        _dialect: Any, _record: Any, arguments: Any, named: dict[str, Any]
    ) -> BoundedThreadConnection:
        return BoundedThreadConnection(*arguments, **named)


class QuietCursor(asyncmy.cursors.Cursor):
    """A cursor that does not ask for warnings: the driver would log their texts, with values of rows (SQL-9)."""

    async def _show_warnings(self, conn: Any) -> None:
        pass


class BoundedConnection(asyncmy.connection.Connection):
    """A connection of the loop."""

    # the driver has them, and its stubs do not
    _transport: asyncio.Transport | None
    _stream_broken: bool

    def escape(self, obj: Any, mapping: Any = None) -> Any:
        """Return a value as SQL has it."""
        return digits(obj) or super().escape(obj, mapping)  # type: ignore[no-untyped-call]

    def is_closed(self) -> bool:
        """Whether it is dead, as far as it is known without a question to the server."""
        return not self.connected or self._stream_broken

    async def ensure_closed(self) -> None:
        """Say goodbye and close, waiting for nobody: what is still to be sent would never be (SQL-6)."""
        transport = self._transport
        if transport is not None and not self.is_closed() and not transport.get_write_buffer_size():
            transport.write(b"\x01\x00\x00\x00\x01")
        if transport is not None and transport.get_write_buffer_size():
            transport.abort()
        self.close()


def digits(value: Any) -> str | None:
    """Return bytes as a literal of hexadecimal digits; None for all else, and for what is so large that it matters.

    Of digits none needs to be escaped, for which the drivers go through bytes one by one: a quarter of what the
    coordinator computed. They take twice the bytes, though, of what the server takes at all.
    """
    return f"x'{value.hex()}'" if type(value) is bytes and len(value) <= DIGITS_MAX else None


def _unchecked() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


_UNCHECKED: Final = _unchecked()


class BoundedThreadConnection(pymysql.connections.Connection):  # type: ignore[misc]  # has no types
    """A connection of threads."""

    def escape(self, obj: Any, mapping: Any = None) -> Any:
        """Return a value as SQL has it."""
        return digits(obj) or super().escape(obj, mapping)

    def is_closed(self) -> bool:
        """Whether it is dead, as far as it is known without a question to the server."""
        link = self._sock
        return not self.open or link is None or is_over(link.fileno())

    def _create_ssl_ctx(self, sslp: Any) -> Any:
        # where nothing is said PyMySQL encrypts and checks nobody, and so do we: only it reads every authority of the
        # system before that, 70 ms of the processor for each connection, in which no other thread runs
        return super()._create_ssl_ctx(sslp) if sslp else _UNCHECKED

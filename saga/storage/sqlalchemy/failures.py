"""What a driver's exception means for a transaction: tables by SQLSTATE, number or name, never by class (SQL-5)."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any, Final

from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from saga import transport


class Failure(Enum):
    """What to do about an error."""

    BUSY = "busy"
    """The database refused this try: roll back and run the whole function again."""
    LOST = "lost"
    """The connection is gone, the outcome unknown: run the whole function again on a new one (P3)."""
    FATAL = "fatal"
    """Running it again would give the same: raise."""


BUSY_STATES: Final = frozenset({"40001", "40P01", "55P03", "57014"})
LOST_STATES: Final = frozenset({"57P01", "57P02", "57P03", "53300"})
REFUSED_STATES: Final = ("28", "3D")
"""Classes of states of a refused log-in: user, password, database. An operator must act."""
REFUSALS: Final = {
    "28P01": re.compile("password authentication failed|no password supplied"),
    "3D000": re.compile('database ".*" does not exist'),
    "28000": re.compile(
        'role ".*" (does not exist|is not permitted to log in)|authentication failed|pg_hba.conf|'
        "requires a valid client certificate"
    ),
}
"""psycopg does not tell the state of a refused log-in. Servers that speak another language are tried again in vain."""
INSECURE: Final = {
    "its certificate is for another host": re.compile("server certificate for .* does not match host name"),
    "its certificate is not accepted": re.compile("certificate verify failed"),
    "it speaks no TLS": re.compile(
        "rejected SSL upgrade|server does not support SSL|SSL is required but the server doesn't support it"
    ),
    "our key may be read by others (chmod 600)": re.compile("private key file .* has group or world access"),
    "our certificate or key cannot be used": re.compile("could not load (certificate|private key) file"),
}
"""How libpq, asyncpg and PyMySQL tell in words what is wrong with TLS; the others have an `ssl.SSLError` inside."""
BUSY_CODES: Final = frozenset(
    {
        1020,  # the row changed after the snapshot was taken (MariaDB)
        1205,  # waited for a lock
        1213,  # deadlock, or on Galera another node was first
        1317,  # the statement was ended by somebody
        1412,  # the table's definition changed under the transaction
        1615,  # the same, of a prepared statement
        1969,  # took longer than max_statement_time (MariaDB)
        3024,  # took longer than max_execution_time (MySQL)
        3572,  # would have had to wait for a lock (MySQL)
    }
)
LOST_CODES: Final = frozenset(
    {
        0,  # the driver's own: it is not connected
        1040,  # too many connections
        1047,  # this node of Galera takes no statements now
        1053,  # the server shuts down
        1180,  # COMMIT failed (Galera): nobody can tell how it ended
        1203,  # too many connections of this user
        1927,  # killed
        2002,  # could not be made, of a socket
        2003,  # could not be made
        2006,  # gone
        2013,  # broke during a statement
        2014,  # answer and question are out of step
        2027,  # a packet that makes no sense
        2055,  # broke during a statement
        4031,  # idle for too long
    }
)
REFUSED_CODES: Final = frozenset({1044, 1045, 1049, 1130, 1698})
"""Of a refused log-in on MySQL and MariaDB: user, password, database, host."""
NUMBERING: Final = ("asyncmy", "pymysql")
"""Drivers whose errors have the server's number first. The states that they have as well tell less: many share one."""
BUSY_SQLITE: Final = ("SQLITE_BUSY", "SQLITE_LOCKED")
UNUSABLE_SQLITE: Final = ("SQLITE_CANTOPEN", "SQLITE_NOTADB")


class TryAgain(Exception):
    """The database refused this try in other ways than by an error: roll back and run the whole function again."""


def classify(error: BaseException) -> Failure:
    """Return what `error` means. Connection errors and timeouts that no driver wrapped count as lost."""
    if insecure(error):
        return Failure.FATAL
    if isinstance(error, DBAPIError):
        if error.connection_invalidated:
            return Failure.LOST
        if (number := code(error)) is not None:
            return _meaning(number)
        state = sqlstate(error)
        if state in BUSY_STATES or sqlite_name(error).startswith(BUSY_SQLITE):
            return Failure.BUSY
        if state in LOST_STATES or state.startswith("08"):
            return Failure.LOST
        if _is_stale_plan(error.orig):
            return Failure.BUSY  # PG-5: DDL under a live connection; once is enough
        if not state and isinstance(error, OperationalError) and _diagnosis(error.orig) is not None:
            return Failure.LOST  # psycopg: libpq's own words, and every error of connecting
        return Failure.FATAL
    if isinstance(error, PoolTimeout | TryAgain):
        return Failure.BUSY  # every connection is in use; it is no DBAPIError and no TimeoutError
    if isinstance(error, ConnectionError | TimeoutError | OSError):
        return Failure.LOST
    return Failure.FATAL


def describe(error: BaseException) -> str:
    """Return what may be logged of an error: class, SQLSTATE and constraint; never its text (SQL-9)."""
    cause = getattr(error, "orig", None) or error
    constraint = next(
        filter(
            None,
            (getattr(part, "constraint_name", None) for part in (cause, cause.__cause__, _diagnosis(cause))),
        ),
        None,
    )
    number = code(error)
    known = sqlstate(error) or sqlite_name(error) if number is None else str(number or "")
    return " ".join(filter(None, (type(cause).__name__, known, str(constraint or ""))))


def is_refusal(error: BaseException) -> bool:
    """Whether the server refuses the log-in, so that an operator must act."""
    number = code(error)
    return sqlstate(error).startswith(REFUSED_STATES) if number is None else number in REFUSED_CODES


def insecure(error: BaseException) -> str:
    """Return why there is no link as the address wants it, for people; empty if an error is about something else."""
    if why := transport.disagreement(error):
        return why
    cause = getattr(error, "orig", None) or error
    told = isinstance(error, OperationalError) and (_diagnosis(cause) is not None or code(error) is not None)
    if not told and type(cause) is not ConnectionError:
        return ""
    words = str(cause)
    return next((why for why, said in INSECURE.items() if said.search(words)), "")


def code(error: BaseException) -> int | None:
    """Return the number of an error of MySQL or MariaDB, 0 if the driver itself raised it; None for other drivers."""
    cause = getattr(error, "orig", None) or error
    if type(cause).__module__.partition(".")[0] not in NUMBERING:
        return None
    first = cause.args[0] if cause.args else 0
    return first if isinstance(first, int) else 0


def sqlstate(error: BaseException) -> str:
    """Return the SQLSTATE of a driver's error, empty where it has none."""
    cause = getattr(error, "orig", None)
    for candidate in (cause, getattr(cause, "__cause__", None)):
        state = getattr(candidate, "sqlstate", None) or getattr(candidate, "pgcode", None)
        if state:
            return str(state)
    if isinstance(error, OperationalError) and _diagnosis(cause) is not None:
        words = str(cause)
        return next((state for state, refused in REFUSALS.items() if refused.search(words)), "")
    return ""


def sqlite_name(error: BaseException) -> str:
    """Return SQLite's name of a driver's error, empty where it has none."""
    cause = getattr(error, "orig", None)
    return str(getattr(cause, "sqlite_errorname", ""))


def _meaning(number: int) -> Failure:
    if number in BUSY_CODES:
        return Failure.BUSY
    return Failure.LOST if number in LOST_CODES else Failure.FATAL


def _diagnosis(cause: object) -> Any:
    """Return the parts of an error as psycopg has them, None for another driver's."""
    return getattr(cause, "diag", None)


def _is_stale_plan(cause: object) -> bool:
    if type(cause).__name__ == "InvalidCachedStatementError":
        return True
    # psycopg knows the state alone, which others share; the function's name is in no language
    return getattr(_diagnosis(cause), "source_function", None) == "RevalidateCachedQuery"

"""What a driver's exception means for a transaction: one table by SQLSTATE or error name, never by class (SQL-5)."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any, Final

from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout


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
        'role ".*" (does not exist|is not permitted to log in)|authentication failed|pg_hba.conf'
    ),
}
"""psycopg does not tell the state of a refused log-in. Servers that speak another language are tried again in vain."""
BUSY_SQLITE: Final = ("SQLITE_BUSY", "SQLITE_LOCKED")
UNUSABLE_SQLITE: Final = ("SQLITE_CANTOPEN", "SQLITE_NOTADB")


def classify(error: BaseException) -> Failure:
    """Return what `error` means. Connection errors and timeouts that no driver wrapped count as lost."""
    if isinstance(error, DBAPIError):
        if error.connection_invalidated:
            return Failure.LOST
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
    if isinstance(error, PoolTimeout):
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
    parts = [type(cause).__name__, sqlstate(error) or sqlite_name(error), str(constraint or "")]
    return " ".join(filter(None, parts))


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


def _diagnosis(cause: object) -> Any:
    """Return the parts of an error as psycopg has them, None for another driver's."""
    return getattr(cause, "diag", None)


def _is_stale_plan(cause: object) -> bool:
    if type(cause).__name__ == "InvalidCachedStatementError":
        return True
    # psycopg knows the state alone, which others share; the function's name is in no language
    return getattr(_diagnosis(cause), "source_function", None) == "RevalidateCachedQuery"

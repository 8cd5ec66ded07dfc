"""Finds a word in log records: in their message, arguments, `extra` and traceback.

Imports the standard library only, since every process that a test starts loads it.
"""

from __future__ import annotations

import logging
from typing import Final

CANARY: Final = "canary-4f1d9c"
DRIVER: Final = "aiosqlite"
"""Tells every call with its arguments, those of a test's own engine too. SQLAlchemy holds its own loggers back."""

PLAIN: Final = frozenset(logging.makeLogRecord({}).__dict__)
"""What every record has."""


class Watch(logging.Handler):
    """Keeps in which records the word stood."""

    def __init__(self) -> None:
        super().__init__()
        self.hits: list[str] = []
        self.records = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.records += 1
        extra = [value for name, value in record.__dict__.items() if name not in PLAIN]
        told = [record.getMessage(), repr(record.args), repr(extra)]
        if record.exc_info:
            told.append(logging.Formatter().formatException(record.exc_info))
        if any(CANARY in each for each in told):
            self.found(f"the log {record.name} at {record.levelname}: {record.msg!r}")

    def found(self, where: str) -> None:
        """Keep where the word stood."""
        self.hits.append(where)

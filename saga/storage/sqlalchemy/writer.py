"""P36: which SQLite file the running handler works on, so that a start inside it can refuse instead of deadlocking.

The store sets it around each handler that has a session; tasks that the handler starts inherit it. `client.start`
without `session=` compares it with its own database and raises `WouldDeadlock`. It is never set on other databases.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

HOLDING_SECONDS_MAX: Final = 1.0
"""A handler that holds the one writer longer than this is named in the log."""

handler_writes_to: ContextVar[str | None] = ContextVar("saga_handler_writes_to", default=None)
"""Path of the SQLite file (`Database.url.database`) whose writer the running handler holds or will hold."""

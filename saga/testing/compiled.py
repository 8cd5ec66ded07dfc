"""Statements are compiled once in a run, though every environment has engines of its own."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import LRUCache

STATEMENTS_MAX: Final = 2_000


class _Compiled(LRUCache[Any, Any]):
    """SQLAlchemy's cache of compiled statements, with what it leads its keys with left out: the engine's dialect.

    That is an object of each engine, and all of ours are SQLite through the same driver with the same options.
    """

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(key[1:], default)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key[1:], value)


_COMPILED: Final = _Compiled(STATEMENTS_MAX)


def compile_once(engine: AsyncEngine) -> None:
    """Let an engine on a SQLite file share what the ones before it have compiled."""
    engine.sync_engine.update_execution_options(compiled_cache=_COMPILED)

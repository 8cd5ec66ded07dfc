"""Loaded by every Python process that a test starts: watches its log at DEBUG, and leaves what it prints as it is.

What it finds it appends to a file in the folder `CANARY_HITS`, at once, because the process may be killed.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

HITS = os.environ.get("CANARY_HITS")


def _watch(hits: Path) -> None:
    # by its path: the tests' packages may not be importable where this process runs, and shall not become so
    found = importlib.util.spec_from_file_location("_watch", Path(__file__).parents[1] / "watch.py")
    assert found is not None
    assert found.loader is not None
    watch = importlib.util.module_from_spec(found)
    found.loader.exec_module(watch)

    class Telling(watch.Watch):  # type: ignore[misc,name-defined]
        def emit(self, record: logging.LogRecord) -> None:
            super().emit(record)
            last = logging.lastResort
            if root.handlers == [self] and last is not None and record.levelno >= last.level:
                last.handle(record)  # a program that configures nothing prints its warnings

        def found(self, where: str) -> None:
            with (hits / str(os.getpid())).open("a") as file:
                file.write(f"{where}\n")

    root, watching = logging.getLogger(), Telling()

    def set_level(level: int | str) -> None:
        """Set what is printed; the watch goes on hearing everything."""
        for handler in root.handlers:
            if handler is not watching:
                handler.setLevel(level)

    def basic_config(**given: object) -> None:
        root.removeHandler(watching)  # or the program's own, with nothing to add to, would add nothing
        configure(**given)  # type: ignore[call-overload]
        if given.get("level") is None:
            set_level(logging.WARNING)
        root.addHandler(watching)

    configure, logging.basicConfig = logging.basicConfig, basic_config
    root.addHandler(watching)
    root.setLevel(logging.DEBUG)
    root.setLevel = set_level  # type: ignore[method-assign]
    logging.getLogger(watch.DRIVER).setLevel(logging.WARNING)


if HITS:
    _watch(Path(HITS))

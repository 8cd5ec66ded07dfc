"""What is kept of runs that are purged: each is handed to the app's archive before its rows go.

    App(..., archive=FileArchive("/var/lib/shop/sagas.jsonl"))

First the archive, then the deletion: after a crash between the two a run is archived once more, and never none at all.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from pydantic_core import from_json

from saga.storage.base import AuditEntry, Payload
from saga.views import Description, plain

NEWLINE: Final = b"\n"


@dataclass(frozen=True, slots=True)
class ArchivedRun:
    """A run as a whole, payloads included: nothing else of it is left when it is purged."""

    instance: Description
    """Without steps and plan if this process does not declare the version that it ran."""
    state: Any
    """Its last snapshot, as the row had it."""
    audit: tuple[AuditEntry, ...]
    payloads: tuple[Payload, ...]

    def as_json(self) -> dict[str, Any]:
        """Return what `saga show --payloads --json` prints, and the snapshot beside it, as JSON types."""
        known: dict[str, Any] = plain(
            {
                "instance": self.instance,
                "settlement": self.instance.settlement,
                "audit": self.audit,
                "payloads": [{**each._asdict(), "data": from_json(each.data)} for each in self.payloads],
                "state": self.state,
            }
        )
        return known


class Archive(Protocol):
    """What `App(archive=...)` takes: a function or an object of this form."""

    async def __call__(self, runs: Sequence[ArchivedRun]) -> None:
        """Keep the runs, at most 100; they are deleted when this returns.

        It may be called with a run once more, after a crash or where another process held its row. What it raises
        keeps the runs where they are, until the next pass.
        """
        ...


class FileArchive:
    """Appends each run to a file, as one line of JSON. What is written is on the disk when the call returns.

    The directory is there already. One file is for one process at a time; which they are, the upkeep sees to. A line
    that a crash has cut off stands alone, and its run follows whole.
    """

    def __init__(self, path: str | Path) -> None:
        self.path: Path = Path(path)

    async def __call__(self, runs: Sequence[ArchivedRun]) -> None:
        """Append; raises OSError."""
        lines = b"".join(json.dumps(run.as_json()).encode() + NEWLINE for run in runs)
        await asyncio.to_thread(self._append, lines)

    def _append(self, lines: bytes) -> None:
        is_new = not self.path.exists()
        with self.path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != NEWLINE:
                    file.write(NEWLINE)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            _sync_directory(self.path.parent)


def _sync_directory(path: Path) -> None:
    """Make the name of a new file last as well."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)

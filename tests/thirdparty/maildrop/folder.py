"""Messages as files: a channel is a folder, a message is renamed from `new/` to `held/SESSION/` and back, or deleted.

A rename is atomic, so of two that take a message one gets it. Who holds something is a session: a locked file, whose
lock the operating system drops with the process. What a dead session held, whoever looks next gives back.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

_count = itertools.count()


class Letter(NamedTuple):
    """A message that was taken."""

    name: str
    """The file's; its last part counts the deliveries, this one included."""
    deliveries: int
    content_type: str
    headers: Mapping[str, str]
    body: bytes


class Session:
    """A process at the folder, for as long as its file is there and locked."""

    def __init__(self, root: Path) -> None:
        """Open one. Raises OSError."""
        self.id = uuid.uuid4().hex
        self.path = root / ".sessions" / self.id
        self.path.parent.mkdir(exist_ok=True)
        making = root / f".making-{self.id}"
        self._file = making.open("wb")
        # locked before it is seen, or somebody might take it for a dead one's
        fcntl.flock(self._file, fcntl.LOCK_EX)
        making.rename(self.path)

    def is_there(self) -> bool:
        """Whether nobody has ended it."""
        return self.path.exists()

    def end(self) -> None:
        """What it held is given back by whoever looks next."""
        with suppress(OSError):
            self.path.unlink()
        self._file.close()


def is_alive(root: Path, session: str) -> bool:
    """Whether the process of a session lives."""
    path = root / ".sessions" / session
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


class Box:
    """One channel's folder."""

    def __init__(self, root: Path, channel: str) -> None:
        self.channel = channel
        self._root = root
        self.path = root / quote(channel, safe="")
        self._new = self.path / "new"

    def is_there(self) -> bool:
        """Whether it was declared."""
        return self.path.is_dir()

    def make(self, parking: str) -> None:
        """Make it whole or not at all; another process may be making it too."""
        making = self._root / f".making-{uuid.uuid4().hex}"
        for part in ("new", "held", "readers"):
            (making / part).mkdir(parents=True)
        (making / "parking").write_text(parking)
        try:
            making.rename(self.path)
        except OSError:
            shutil.rmtree(making)

    @property
    def parking(self) -> str:
        """The channel that takes what was delivered too often; empty for none."""
        return (self.path / "parking").read_text()

    def put(self, content_type: str, headers: Mapping[str, str], body: bytes) -> None:
        """Add a message. Raises FileNotFoundError if the channel is not there."""
        head = json.dumps({"content_type": content_type, "headers": dict(headers)})
        making = self.path / f".making-{uuid.uuid4().hex}"
        making.write_bytes(head.encode() + b"\n" + body)
        # one process's names rise with time and its counter, which is the order of a key's publisher
        making.rename(self._new / f"{time.time_ns():020d}-{next(_count):09d}-{uuid.uuid4().hex}.0")

    def waiting(self) -> int:
        """Return how many messages wait."""
        return len(os.listdir(self._new))

    def take(self, session: str, limit: int, deliveries_max: int) -> Iterator[Letter]:
        """Take the oldest messages; what was delivered too often goes to the parking channel instead."""
        held = self.path / "held" / session
        for name in sorted(os.listdir(self._new)) if limit else ():
            if limit <= 0:
                return
            stem, _, count = name.rpartition(".")
            if int(count) >= deliveries_max and (parking := self.parking):
                with suppress(FileNotFoundError):
                    (self._new / name).rename(Box(self._root, parking)._new / f"{stem}.0")
                continue
            held.mkdir(exist_ok=True)
            mine = held / f"{stem}.{int(count) + 1}"
            try:
                (self._new / name).rename(mine)
                head, _, body = mine.read_bytes().partition(b"\n")
            except FileNotFoundError:
                continue  # another has it
            limit -= 1
            yield Letter(mine.name, int(count) + 1, **json.loads(head), body=body)

    def done(self, session: str, name: str) -> None:
        """Delete a message that was taken."""
        with suppress(FileNotFoundError):
            (self.path / "held" / session / name).unlink()

    def give_back(self, session: str, name: str) -> None:
        """Let a message wait again, in its place."""
        with suppress(FileNotFoundError):
            (self.path / "held" / session / name).rename(self._new / name)

    def give_back_of_the_dead(self, alive: str) -> None:
        """Let wait again what sessions hold that live no more. `alive` is the caller's own."""
        for session in os.listdir(self.path / "held"):
            if session == alive or is_alive(self._root, session):
                continue
            for name in os.listdir(self.path / "held" / session):
                self.give_back(session, name)
            with suppress(OSError):
                (self.path / "held" / session).rmdir()

    def read_by(self, session: str, reader: str) -> None:
        """Note a consumer."""
        (self.path / "readers" / f"{session}.{reader}").touch()

    def read_no_more(self, session: str, reader: str) -> None:
        """Forget a consumer."""
        (self.path / "readers" / f"{session}.{reader}").unlink(missing_ok=True)

    def readers(self) -> int:
        """Return how many consumers there are, in all processes."""
        sessions = [name.partition(".")[0] for name in os.listdir(self.path / "readers")]
        return sum(is_alive(self._root, session) for session in sessions)

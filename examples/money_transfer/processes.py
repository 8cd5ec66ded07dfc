"""One process of the demo: started with its output in files, watched, and ended by its id, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
READY: Final = "saga.app ready"
READY_SECONDS_MAX: Final = 30.0
GRACE_SECONDS: Final = 5.0
POLL_SECONDS: Final = 0.02


class DemoError(Exception):
    """The stage itself broke down: a process ended by itself or never got ready. Not a finding about money."""


class Child:
    """A Python process of the demo."""

    def __init__(
        self, name: str, arguments: Sequence[str], environment: Mapping[str, str], directory: Path
    ) -> None:
        self.name = name
        self._log = _fresh(directory, f"{name}.log")
        self._output = _fresh(directory, f"{name}.out")
        with self._log.open("wb") as log, self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the demo, which then ends its processes itself
            )

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs, negative if a signal ended it."""
        return self._process.poll()

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.status == -signal.SIGKILL

    @property
    def output(self) -> str:
        """What it wrote to its standard output so far."""
        return self._output.read_text()

    def wait_until_ready(self) -> None:
        """Return when it serves or was killed. Raises DemoError if it ends otherwise or takes too long."""
        for _ in within(READY_SECONDS_MAX):
            if READY in self._log.read_text() or self.killed:
                return
            if self.status is not None:
                break
        raise self.failure("did not get ready")

    def failure(self, what: str) -> DemoError:
        """Return the error that says what it did, with the last lines of its log."""
        tail = "\n".join(f"    {line}" for line in self._log.read_text().splitlines()[-12:])
        return DemoError(f"process {self.name} {what} (status {self.status})\n{tail}")

    def end(self) -> None:
        """Ask it to end, and kill it if it does not within the grace."""
        if self.status is None:
            self._process.terminate()
            try:
                self._process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End it at once."""
        if self.status is None:
            self._process.kill()
            self._process.wait(GRACE_SECONDS)


def _fresh(directory: Path, name: str) -> Path:
    """Return a path in the directory that no earlier process of that name has used."""
    return directory / f"{len(list(directory.iterdir())):03}-{name}"


def within(seconds: float) -> Iterator[None]:
    """Yield again and again until the time is up: the caller leaves the loop when it has what it waits for."""
    # lint: allow clock because the demo waits for real processes and is in no simulation
    until = time.monotonic() + seconds
    while time.monotonic() < until:  # lint: allow clock because see above
        yield
        time.sleep(POLL_SECONDS)  # lint: allow clock because see above

"""The life of a server that was started from the programs of this machine: it can be broken, and comes back."""

from __future__ import annotations

import shutil
import signal
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from devservices.base import NotControllable, Service
from devservices.processes import ServerProcess, guard


class LocalServer(Service):
    """One process, or one that has children, in a temporary directory. Stands before the kind of server it is."""

    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    stop_seconds: ClassVar[float] = 20
    """How long `stop` waits before it kills."""

    _directory: Path
    _process: ServerProcess | None

    @property
    def pid(self) -> int:
        """The process id of the server's first process."""
        return self._running().pid

    def kill(self) -> None:
        self._running().kill()

    def stop(self) -> None:
        self._running().terminate(self.stop_signal, timeout_seconds=self.stop_seconds)

    def start(self) -> None:
        if self._process is not None and self._process.alive:
            raise NotControllable(f"{self.name} is running; call stop() or kill() before start()")
        self._launch()

    def pause(self) -> None:
        self._running().pause()

    def resume(self) -> None:
        self._running().resume()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None
        if self._directory.exists():
            shutil.rmtree(self._directory, ignore_errors=True)
            guard().forget_directory(self._directory)

    def _running(self) -> ServerProcess:
        if self._process is None:
            raise NotControllable(f"{self.name} is closed")
        return self._process

    @abstractmethod
    def _launch(self) -> None:
        """Start the process on the data there is; return when it answers."""

"""What every provided service can do: an address, a version, and for servers of our own, being broken on purpose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import ClassVar, NamedTuple, Self


class Unavailable(Exception):
    """The service can be had in no way on this machine; the text says what was tried and what to do."""


class NotControllable(RuntimeError):
    """A fault was asked of a server that we did not start, so that we may not stop it."""


class Origin(StrEnum):
    """Where a server comes from."""

    URL = "url"
    DOCKER = "docker"
    LOCAL = "local"


class Certificates(NamedTuple):
    """PEM files with which a server of our own speaks TLS, beside plain text."""

    authority: Path
    """Whose certificates of clients it believes."""
    certificate: Path
    key: Path


class Service(ABC):
    """One server, alive between `__enter__` and `__exit__`.

    Only servers with `origin == Origin.LOCAL` can be killed, stopped, paused and started again; for the others
    these methods raise NotControllable.
    """

    name: ClassVar[str]
    origin: Origin
    url: str
    version: str

    @property
    def description(self) -> str:
        """One line for summaries: product, version and where it comes from."""
        return f"{self.name} {self.version} ({self.origin})"

    def kill(self) -> None:
        """Kill every process of the server at once (SIGKILL) and return when they are gone."""
        raise self._not_controllable("kill")

    def stop(self) -> None:
        """Stop the server quickly; its data stays for `start`."""
        raise self._not_controllable("stop")

    def start(self) -> None:
        """Start it again on the same data and port; returns when it answers."""
        raise self._not_controllable("start")

    def pause(self) -> None:
        """Freeze every process of the server (SIGSTOP); sockets stay open."""
        raise self._not_controllable("pause")

    def resume(self) -> None:
        """Undo `pause` (SIGCONT)."""
        raise self._not_controllable("resume")

    @abstractmethod
    def close(self) -> None:
        """End the server if it is ours and remove its data. Closing twice is legal."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _not_controllable(self, verb: str) -> NotControllable:
        return NotControllable(
            f"cannot {verb} this {self.name}: it was not started by us (origin: {self.origin}). "
            "Unset its SAGA_TEST_..._URL and stop Docker to have one started from local programs."
        )

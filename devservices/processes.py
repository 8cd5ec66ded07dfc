"""Starts server processes so that none of them outlives us, and signals only those."""

from __future__ import annotations

import atexit
import contextlib
import os
import pwd
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from devservices import reaper
from devservices.base import Unavailable

# Below the range from which the kernel takes local ports for outgoing connections (32768 and up): a server that
# is down for a moment must not find its port taken when it comes back.
_PORTS = range(15_000, 32_000)


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on now."""
    for port in random.sample(_PORTS, 200):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise Unavailable("no free TCP port between 15000 and 32000 on the loopback interface")


class Guard:
    """Our end of the reaper: while it is open, what was registered lives; when we die, it all goes."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(16)
        self._owner = os.getpid()
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", "-S", reaper.__file__, self.token],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            env={},  # without the token of an outer guard, whose reaper would end this one before its work is done
            text=True,
        )
        self._lock = threading.Lock()
        atexit.register(self._close)

    def add_process(self, pid: int) -> None:
        """Have this process and all below it killed when we die."""
        started = reaper.start_time(pid)
        if started is not None:
            self._tell(f"pid {pid} {started}")

    def make_directory(self, prefix: str) -> Path:
        """Make a temporary directory that is removed when we die."""
        path = Path(tempfile.mkdtemp(prefix=prefix))
        self._tell(f"dir {path}")
        return path

    def forget_directory(self, path: Path) -> None:
        """The owner has removed the directory."""
        self._tell(f"keep {path}")

    def _close(self) -> None:
        """At our orderly end: what nobody has ended is ended now, and we wait for it."""
        if self._owner != os.getpid() or self._reaper.stdin is None:
            return
        self._reaper.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._reaper.wait(10)

    def _tell(self, line: str) -> None:
        assert self._reaper.stdin is not None
        with self._lock:
            self._reaper.stdin.write(line + "\n")
            self._reaper.stdin.flush()


_guards: dict[int, Guard] = {}


def guard() -> Guard:
    """Return the guard of this process (a forked child gets its own)."""
    pid = os.getpid()
    if pid not in _guards:
        _guards[pid] = Guard()
    return _guards[pid]


class ServerProcess:
    """One foreground server program with its children, in a session of its own."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str],
        log: Path,
        directory: Path,
        user: str | None = None,
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self._popen = _spawn(command, environment, output, directory, user)
        guard().add_process(self._popen.pid)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def wait_until(self, ready: Callable[[], bool], *, timeout_seconds: float, what: str) -> None:
        """Return when `ready` says so; raise Unavailable with the end of the log if that does not come."""
        deadline = time.monotonic() + timeout_seconds
        while not ready():
            if not self.alive:
                raise Unavailable(f"{what} ended with status {self._popen.returncode}: {self._log_end()}")
            if time.monotonic() > deadline:
                self.kill()
                raise Unavailable(f"{what} was not ready within {timeout_seconds:g} s: {self._log_end()}")
            time.sleep(0.02)

    def pause(self) -> None:
        """Stop the program and everything below it; return when all of them stand still."""
        deadline = time.monotonic() + 10
        while moving := [pid for pid in reaper.descendants(self.pid) if not reaper.is_stopped(pid)]:
            reaper.signal_all(moving, signal.SIGSTOP)
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {moving} did not stop within 10 s")
            time.sleep(0.005)

    def resume(self) -> None:
        """Let all of them go on."""
        reaper.signal_all(reaper.descendants(self.pid), signal.SIGCONT)

    def terminate(self, number: signal.Signals, *, timeout_seconds: float) -> None:
        """Ask the program itself to end; kill it with all below it when it takes too long."""
        below = reaper.descendants(self.pid)
        if self.alive:
            reaper.signal_all([self.pid], number)
            reaper.signal_all(below, signal.SIGCONT)
        try:
            self._popen.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        _wait_until_gone(below)

    def kill(self) -> None:
        """SIGKILL the program and everything below it; return when all of them are gone."""
        if self.alive:
            reaper.signal_all([self.pid], signal.SIGSTOP)
            below = reaper.descendants(self.pid)
            reaper.signal_all(below, signal.SIGKILL)
            self._popen.wait()
            _wait_until_gone(below)

    def _log_end(self) -> str:
        with contextlib.suppress(OSError):
            return (
                " | ".join(self.log.read_text(errors="replace").strip().splitlines()[-8:])
                or "its log is empty"
            )
        return f"no log at {self.log}"


def _spawn(
    command: Sequence[str | Path],
    environment: Mapping[str, str],
    output: IO[bytes],
    directory: Path,
    user: str | None,
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**environment, reaper.TOKEN: guard().token},
        cwd=directory,
        start_new_session=True,
        user=user,
        group=None if user is None else primary_group(user),
        extra_groups=None if user is None else [],
    )


def primary_group(user: str) -> int:
    """Return the group that a user has by itself; it need not be called like him."""
    return pwd.getpwnam(user).pw_gid


def _wait_until_gone(pids: Sequence[int]) -> None:
    deadline = time.monotonic() + 10
    while any(reaper.start_time(pid) is not None for pid in pids):
        if time.monotonic() > deadline:
            reaper.signal_all(list(pids), signal.SIGKILL)
            deadline = time.monotonic() + 10
        time.sleep(0.01)

"""Finds and ends processes that we started, also after our own death. Runs as a script, so it imports nothing of ours.

As a script it reads lines from stdin and waits for end of file, which comes when the process that started it ends,
even by SIGKILL. Then it kills everything that carries its token in the environment or was named to it, with all
descendants, and removes the directories that were named. Processes that end in good order are ended by their
owner; the reaper then finds nothing.

    pid PID STARTTIME      a process whose environment cannot be trusted to stay readable (PostgreSQL overwrites it)
    dir PATH               a directory to remove
    keep PATH              forget that directory
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time

TOKEN = "SAGA_DEVSERVICES_TOKEN"


def start_time(pid: int) -> str | None:
    """Return the start time of a live process in clock ticks, which with the id names it for ever."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def is_stopped(pid: int) -> bool:
    """Whether a process stands still after SIGSTOP, or is no more."""
    fields = _stat(pid)
    return fields is None or fields[0] in "TZX"


def descendants(root: int) -> list[int]:
    """Return the root and everything below it, parents first. Zombies are left out."""
    children: dict[int, list[int]] = {}
    alive: set[int] = set()
    for pid in _all_pids():
        fields = _stat(pid)
        if fields is not None and fields[0] not in "ZX":
            alive.add(pid)
            children.setdefault(int(fields[1]), []).append(pid)
    found, queue = [], [root]
    while queue:
        pid = queue.pop()
        if pid in alive:
            found.append(pid)
        queue.extend(children.get(pid, ()))
    return found


def carrying(token: str) -> list[int]:
    """Return the processes with our token in their environment."""
    wanted = f"{TOKEN}={token}".encode()
    found = []
    for pid in _all_pids():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as environment:
            if wanted in environment.read().split(b"\0"):
                found.append(pid)
    return found


def kill_tree(root: int) -> None:
    """SIGKILL a process and all below it. The root is stopped first, so that it cannot make new children meanwhile."""
    signal_all([root], signal.SIGSTOP)
    signal_all(descendants(root), signal.SIGKILL)


def signal_all(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to each; those that ended meanwhile do not matter."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on; the name before it may hold spaces and brackets."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


def _main() -> None:
    token = sys.argv[1]
    named: list[tuple[int, str]] = []
    directories: list[str] = []
    for line in sys.stdin:
        verb, _, rest = line.rstrip("\n").partition(" ")
        if verb == "pid":
            pid, _, started = rest.partition(" ")
            named.append((int(pid), started))
        elif verb == "dir":
            directories.append(rest)
        elif verb == "keep" and rest in directories:
            directories.remove(rest)
    for _ in range(100):
        roots = [pid for pid, started in named if start_time(pid) == started] + carrying(token)
        if not roots:
            break
        for pid in roots:
            kill_tree(pid)
        time.sleep(0.05)
    for path in directories:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _main()

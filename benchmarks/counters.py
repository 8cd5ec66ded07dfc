"""What a run costs: processor time from /proc, statements and commits per database role from pg_stat_statements."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import asyncpg

from devservices import reaper

_TICK_SECONDS: Final = 1 / os.sysconf("SC_CLK_TCK")
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_SERVER_PROGRAMS: Final = ("postgres", "mariadbd", "beam.smp", "java")
_ANSWER_SECONDS_MAX: Final = 10.0

_COUNTS: Final = """
SELECT r.rolname,
       coalesce(sum(s.calls) FILTER (WHERE s.query ~* '^\\s*commit'), 0),
       coalesce(sum(s.calls) FILTER (WHERE s.query !~* '^\\s*(begin|start|commit|rollback)'), 0),
       coalesce(sum(s.calls) FILTER (WHERE s.query ~* '^\\s*(with|insert|update|delete)'), 0)
  FROM pg_roles r LEFT JOIN pg_stat_statements s ON s.userid = r.oid
 WHERE r.rolname = ANY($1) GROUP BY r.rolname
"""


class Counts(NamedTuple):
    """Of one role."""

    commits: int
    statements: int
    """All but BEGIN, COMMIT and ROLLBACK."""


class StatementCounter:
    """Asks pg_stat_statements on a connection of its own."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @classmethod
    async def connect(cls, url: str) -> StatementCounter:
        """Raises if the server does not preload pg_stat_statements."""
        plain = url.replace("postgresql+asyncpg://", "postgresql://")
        connection = await asyncpg.connect(plain, timeout=_ANSWER_SECONDS_MAX)
        await connection.execute(
            "CREATE EXTENSION IF NOT EXISTS pg_stat_statements", timeout=_ANSWER_SECONDS_MAX
        )
        return cls(connection)

    async def read(self, roles: Sequence[str], *, self_committing: Sequence[str] = ()) -> dict[str, Counts]:
        """Return the counts of roles. For those in `self_committing` whatever writes counts as a commit too.

        That is for statements that commit by themselves, without a COMMIT to be counted. It is never too little: what
        such a role writes between BEGIN and COMMIT is counted twice.
        """
        rows = await self._connection.fetch(_COUNTS, list(roles), timeout=_ANSWER_SECONDS_MAX)
        return {
            role: Counts(int(commits) + (int(writes) if role in self_committing else 0), int(statements))
            for role, commits, statements, writes in rows
        }

    async def checkpoint(self) -> None:
        """Write everything out now, so that a checkpoint that is due does not fall into one system's run."""
        await self._connection.execute("CHECKPOINT", timeout=60)

    async def close(self) -> None:
        await self._connection.close(timeout=_ANSWER_SECONDS_MAX)


@dataclass(frozen=True, slots=True)
class Processors:
    """Processor seconds used so far, by process name, and by the whole machine."""

    by_name: dict[str, float]
    machine: float

    def since(self, before: Processors) -> tuple[dict[str, float], float]:
        """Return what each process used since, and the seconds used by others."""
        used = {name: self.by_name[name] - before.by_name[name] for name in self.by_name}
        return used, max(self.machine - before.machine - sum(used.values()), 0.0)


def read_processors(roots: dict[str, int]) -> Processors:
    """Return the processor time of some processes with everything below them."""
    return Processors({name: _tree_seconds(pid) for name, pid in roots.items()}, _machine_seconds())


def _tree_seconds(root: int) -> float:
    # of the root also what its dead children used: PostgreSQL's workers come and go
    ticks = sum(_ticks(pid, dead_children=pid == root) for pid in reaper.descendants(root))
    return ticks * _TICK_SECONDS


def _ticks(pid: int, *, dead_children: bool) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(int(field) for field in fields[11 : 15 if dead_children else 13])


def _machine_seconds() -> float:
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) * _TICK_SECONDS


def server_pid(url: str) -> int | None:
    """Return the server process that listens at an address of this machine, if it can be seen from here."""
    parts = urlsplit(url)
    if parts.hostname not in _LOOPBACK or parts.port is None:
        return None
    sockets = {
        f"socket:[{fields[9]}]"
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for fields in map(str.split, Path(table).read_text().splitlines()[1:])
        if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == parts.port
    }
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "comm").read_text().strip() not in _SERVER_PROGRAMS:
                continue
            if any(os.readlink(each) in sockets for each in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:
            continue  # gone, or not ours to look at
    return None

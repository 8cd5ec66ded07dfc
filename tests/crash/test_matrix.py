"""A process is killed at every crash point there is; started again, it brings every saga to its end (reliability.md 3).

A few processes die side by side at a time. A point that no process passes fails its test.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Final

import pytest

from saga.failpoints import POINTS
from tests.crash.books import Books

ROOT: Final = Path(__file__).parents[2]
FORGES: Final = 3

SCENES: Final = {
    "T1": "reply lost",
    "T2": "reply lost",
    "T3": "timer and reply at once",
    "M3": "queue deleted",
    "M4": "stopped in a handler",
}
"""What must happen for a point to be passed at all; the others are on the way of every saga."""
LATER: Final = {"C6": 4, "C7": 5, "C8": 6, "W1": 3, "W2": 4, "W3": 5, "W4": 3, "W5": 6, "W6": 4, "W7": 2}
"""Points that a saga passes many times are also tried in its middle."""
ELSEWHERE: Final = ("M1", "N2", "N3", "N4")
"""Points that no saga passes on its way: tests/retention and tests/inbox have them."""
CASES: Final = [(point, 1) for point in POINTS if point not in ELSEWHERE] + list(LATER.items())

ENDS: Final = {
    "plain": "completed",
    "refused": "compensated",
    "in session": "completed",
    "cancelled": "compensated",
    "late": "compensated",
}


class Forge:
    """Makes processes that have everything imported: see `tests.crash.stage`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.stage"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, path: Path, *, scene: str = "", fail: str = "") -> int:
        """Run one process to its end and return its status, negative for the signal that ended it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"path": str(path), "scene": scene, "fail": fail}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@dataclass
class Death:
    """One process killed, one started after it, and what both left."""

    died: int
    after_death: Books
    recovered: int
    at_rest: Books
    log: str


class Matrix:
    """Plays cases ahead of the tests that ask for them, as many at a time as there are forges."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._forges: SimpleQueue[Forge] = SimpleQueue()
        self._all = [Forge() for _ in range(FORGES)]
        for forge in self._all:
            self._forges.put(forge)
        self._threads = ThreadPoolExecutor(FORGES)
        self._deaths: dict[tuple[str, int], Future[Death]] = {}

    def ask(self, point: str, n: int) -> Future[Death]:
        if (point, n) not in self._deaths:
            self._deaths[point, n] = self._threads.submit(self._play, point, n)
        return self._deaths[point, n]

    def _play(self, point: str, n: int) -> Death:
        path = self._directory / f"{point}-{n}.db"
        forge = self._forges.get()
        try:
            died = forge.run(path, scene=SCENES.get(point, ""), fail=f"{point}:kill:n={n}")
            after_death = Books.of_file(path)
            recovered = forge.run(path)
        finally:
            self._forges.put(forge)
        return Death(died, after_death, recovered, Books.of_file(path), path.with_suffix(".log").read_text())

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for forge in self._all:
            forge.close()


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    matrix = Matrix(tmp_path_factory.mktemp("crash"))
    for item in request.session.items:
        if item.path == request.path and hasattr(item, "callspec"):
            matrix.ask(*item.callspec.params["case"])
    yield matrix
    matrix.close()


@pytest.mark.stack("sqlite")
@pytest.mark.feature("E-07", acceptance=True)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_every_saga_ends_after_a_kill_at(case: tuple[str, int], matrix: Matrix) -> None:
    """I1 to I4, I6, I10, I11; P3, P9, P11, P31."""
    death = matrix.ask(*case).result()
    assert death.died == -signal.SIGKILL, f"no process passed {case[0]} {case[1]} times\n{death.log}"
    death.after_death.check_always()
    assert death.recovered == 0, death.log
    ends = ENDS | ({"waits": "completed"} if case[0] == "M4" else {})
    death.at_rest.check_rest(ends)

"""Row I-11 as chaos: 8 accounts, 32 transfers at a time, all faults at once, and no cent missing in any snapshot."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import asyncpg
import pytest

from devservices import Postgres, RabbitMq
from examples.money_transfer.books import Books
from examples.money_transfer.layouts import LAYOUTS, STARTER, Environment, Layout
from examples.money_transfer.load import opening
from tests.plugins.features import Faults

SCALE = 0.02
HOUR_SECONDS = 3600
DRAIN_SECONDS_MAX = 150
"""P4 bounds resends per 30 s, and a restart of the in-process broker uses much of that: the last lost reply waits."""
SNAPSHOT_SECONDS = 0.25
STAGE = "tests.examples.load"
ACCOUNTS = opening(8)
TOTAL = 4_000_000

STARTING = ("C1", "C2", "C3", "C4")
COORDINATING = ("C5", "C6", "C7", "C8", "R1", "R2", "R3")
WORKING = ("W1", "W2", "W3", "W4", "W5", "W6", "W7")
MOVES_PER_CRASH = 60
"""After so many moves of money a process is killed, and its successor dies at a crash point drawn by chance."""


@pytest.fixture(params=["sqlite", "postgres-rabbitmq"])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def layout(
    stack: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Layout]:
    monkeypatch.setenv("LOAD_DIRECTORY", str(tmp_path))
    if "postgres" in stack:
        postgres: Postgres = request.getfixturevalue("postgres_server")
        monkeypatch.setenv("SAGA_DEMO_POSTGRES_URL", postgres.url)
    if "rabbitmq" in stack:
        rabbitmq: RabbitMq = request.getfixturevalue("rabbitmq_server")
        monkeypatch.setenv("SAGA_DEMO_RABBITMQ_URL", rabbitmq.url)
    made = LAYOUTS[stack](opening=ACCOUNTS, stage=STAGE)
    with made:
        yield made


@pytest.mark.slow
@pytest.mark.feature("I-11", acceptance=True, scale=SCALE)
def test_money_is_conserved_in_every_snapshot_while_everything_fails_and_every_transfer_ends(
    layout: Layout, faults: Faults, tmp_path: Path
) -> None:
    """I1, I2, I3, I5, I12."""
    faults.declare("lost-reply", "duplicate", "refusal", "crash")
    random = Random()
    layout.launch(STARTER, order=str(tmp_path))
    snapshots, crashes = _run_with_faults(layout, random)
    (tmp_path / "drain").touch()
    open_ends = _drain(layout)
    (tmp_path / "leave").touch()
    ends = _ends(layout)
    assert open_ends == 0, Counter(ends.values())
    _check_effects(layout.auditor.read(), ends)
    counts = Counter(ends.values())
    for name in ("lost-reply", "duplicate"):
        faults.fired(name, len((tmp_path / f"{name}.count").read_text()))
    faults.fired("refusal", counts["compensated"])
    faults.fired("crash", crashes)
    print(f"{snapshots} snapshots, ends {dict(counts)}, faults {dict(faults.counts)}")
    assert not faults.too_rare()
    assert snapshots > HOUR_SECONDS * SCALE / 2
    assert counts["completed"] > HOUR_SECONDS * SCALE, "I12: it went on meanwhile"


def _run_with_faults(layout: Layout, random: Random) -> tuple[int, int]:
    """Read snapshot after snapshot; return how many, and how many processes died."""
    snapshots = 0
    crashes: Counter[str] = Counter()
    until = time.monotonic() + HOUR_SECONDS * SCALE
    kill_at = MOVES_PER_CRASH
    while time.monotonic() < until:
        books = layout.auditor.read()
        assert books.total == TOTAL, f"snapshot {snapshots}: {books.balances}, {books.on_the_way} on the way"
        snapshots += 1
        if len(books.moves) >= kill_at:
            kill_at = len(books.moves) + MOVES_PER_CRASH
            victim = random.choice([*layout.services, STARTER])
            layout.kill(victim)
            crashes = layout.raise_the_dead({victim: _point(victim, layout, random)})
        else:
            crashes = layout.raise_the_dead()
        time.sleep(SNAPSHOT_SECONDS)
    return snapshots, crashes.total()


def _point(name: str, layout: Layout, random: Random) -> Environment:
    if not layout.services:
        points: tuple[str, ...] = (*STARTING, *COORDINATING, *WORKING)
    elif name == STARTER:
        points = STARTING
    else:
        points = COORDINATING if name == "coordinator" else WORKING
    return {"SAGA_FAIL": f"{random.choice(points)}:kill:n={random.randint(1, 30)}"}


def _drain(layout: Layout) -> int:
    """The faults are over: wait until nothing is open; return what still is at the bound (I3)."""
    deadline = time.monotonic() + DRAIN_SECONDS_MAX
    while True:
        layout.raise_the_dead()
        still_open = sum(status not in ("completed", "compensated") for status in _ends(layout).values())
        if not still_open or time.monotonic() > deadline:
            return still_open
        time.sleep(SNAPSHOT_SECONDS)


def _ends(layout: Layout) -> dict[str, str]:
    """Return the status of every transfer that was ever started."""
    query = "SELECT saga_id, status FROM saga_instance"
    url = layout.environment["MONEY_TRANSFER_COORDINATOR_DATABASE" if layout.services else "DEMO_DATABASE"]
    if url.startswith("sqlite"):
        connection = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=10.0)
        try:
            return dict(connection.execute(query).fetchall())
        finally:
            connection.close()

    async def read() -> dict[str, str]:
        server = await asyncpg.connect(url.replace("+asyncpg", ""), timeout=10.0)
        try:
            return {row["saga_id"]: row["status"] for row in await server.fetch(query)}
        finally:
            await server.close(timeout=10.0)

    return asyncio.run(read())


def _check_effects(books: Books, ends: dict[str, str]) -> None:
    """I2, I5: each step moved once, and a transfer went forward or back, never both."""
    moves: dict[str, list[str]] = {transfer: [] for transfer in ends}
    for move in books.moves:
        moves[move.transfer].append(move.kind)
    notified = Counter(books.notified)
    for transfer, status in ends.items():
        if status == "completed":
            assert (moves[transfer], notified[transfer]) == (["withdraw", "deposit"], 1)
        else:
            assert moves[transfer] in ([], ["withdraw", "refund"])
            assert not notified[transfer]
    assert books.on_the_way == 0
    assert books.total == TOTAL

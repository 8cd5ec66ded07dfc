"""The load form as a user runs it: every transfer ends, no cent is missing in any snapshot, the figures are told."""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from devservices import Postgres, RabbitMq
from examples.money_transfer.books import Books, Move, SqliteAuditor
from examples.money_transfer.layouts import prepare_service
from examples.money_transfer.load import Run, opening
from examples.money_transfer.transfer import accounts, ledger, notifications

ROOT = Path(__file__).parents[2]
SECONDS_MAX = 120
RATE = re.compile(r"(\d+) transfers in [\d.]+ s: \d+/s, p50 \d+ ms, p99 \d+ ms")
MONEY = re.compile(r"load: total before (\d+), after (\d+); conserved in (\d+) of (\d+) snapshots")

pytestmark = [pytest.mark.feature("I-11")]


def load(*arguments: str) -> tuple[int, list[str], str]:
    ran = subprocess.run(
        [sys.executable, "-m", "examples.money_transfer", "load", "--seed", "7", *arguments],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    return ran.returncode, ran.stdout.splitlines(), ran.stderr


def check(transfers: int, told: tuple[int, list[str], str]) -> None:
    status, lines, errors = told
    assert status == 0, "\n".join([*lines, errors])
    rate, states, money = lines[-3:]
    done = RATE.fullmatch(rate)
    assert done is not None, rate
    assert int(done[1]) == transfers
    counts = {name: int(count) for name, count in (state.split() for state in states.split(", "))}
    assert set(counts) == {"completed", "compensated"}
    assert sum(counts.values()) == transfers
    found = MONEY.fullmatch(money)
    assert found is not None, money
    before, after, conserved, snapshots = map(int, found.groups())
    assert before == after == 4_000_000
    assert conserved == snapshots > 0
    assert f" {transfers}/{transfers} " in errors, "the last line of the bar"


@pytest.mark.stack("sqlite")
def test_embedded_load_ends_with_every_transfer_closed_and_no_cent_missing() -> None:
    check(60, load("--transfers", "60", "--concurrency", "16"))


@pytest.mark.slow
@pytest.mark.stack("postgres-rabbitmq")
def test_load_on_servers_ends_with_every_transfer_closed_and_no_cent_missing(
    postgres_server: Postgres, rabbitmq_server: RabbitMq
) -> None:
    servers = ["--database", postgres_server.url, "--broker", rabbitmq_server.url]
    check(200, load("--transfers", "200", "--concurrency", "32", *servers))


@pytest.mark.stack("pure")
def test_a_broker_without_a_database_is_refused() -> None:
    status, _, errors = load("--broker", "amqp://127.0.0.1/")
    assert status == 2
    assert errors.startswith("load: the database's address must be of the form postgresql://")


@pytest.mark.stack("pure")
def test_accounts_are_shared_between_the_banks() -> None:
    assert {bank: len(held) for bank, held in opening(8).items()} == {"savings": 4, "giro": 4}
    assert {bank: len(held) for bank, held in opening(3).items()} == {"savings": 1, "giro": 2}


@pytest.mark.stack("pure")
def test_percentiles_are_those_of_the_transfers() -> None:
    run = Run(seconds=[number / 1000 for number in range(1, 101)], snapshots=2, conserved=1, took=4.0)
    assert run.told({"completed": 99, "running": 1}, 5, 4) == [
        "100 transfers in 4.0 s: 25/s, p50 50 ms, p99 99 ms",
        "completed 99, running 1",
        "load: total before 5, after 4; conserved in 1 of 2 snapshots",
    ]


@pytest.mark.stack("sqlite")
@pytest.mark.parametrize(
    "moves",
    [
        [],
        [Move("t", "withdraw", "alice", -5)],
        [Move("t", "withdraw", "alice", -5), Move("t", "withdraw", "alice", -5)],
        [Move("t", "withdraw", "alice", -5), Move("t", "refund", "alice", 5)],
        [
            Move("t", "withdraw", "alice", -5),
            Move("t", "deposit", "bob", 5),
            Move("u", "withdraw", "bob", -2),
        ],
    ],
    ids=["nothing", "on the way", "withdrawn twice", "refunded", "deposited"],
)
def test_the_total_in_sql_is_the_total_of_the_books(moves: list[Move], tmp_path: Path) -> None:
    path = tmp_path / "money.db"
    tables = [accounts, ledger, notifications]
    asyncio.run(prepare_service(f"sqlite:///{path}", None, tables, {"alice": 50, "bob": 20}))
    connection = sqlite3.connect(path)
    connection.executemany("INSERT INTO ledger (transfer, kind, account, delta) VALUES (?, ?, ?, ?)", moves)
    connection.commit()
    connection.close()
    assert SqliteAuditor(path).total() == Books({"alice": 50, "bob": 20}, moves, []).total

"""The runner without a single process: what it accepts, what it calls wrong, and how it draws a crash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import ClassVar

import pytest

from examples.money_transfer.books import Books, Move
from examples.money_transfer.faults import Crash
from examples.money_transfer.layouts import Environment, Layout, Played
from examples.money_transfer.runner import Runner
from examples.money_transfer.scenarios import SCENARIOS, Scenario
from examples.money_transfer.stage import OUTCOME, Outcome
from examples.money_transfer.transfer import Transfer

SUCCESS, REFUSED = SCENARIOS[0], SCENARIOS[1]
CRASH = next(each for each in SCENARIOS if isinstance(each.fault, Crash))
POINTS = ["C5", "C6", "C7", "C5", "C6", "C7", "C8"]

pytestmark = [pytest.mark.feature("I-11"), pytest.mark.stack("pure")]


class Bank:
    """Two accounts that do as they are told, and read their own books."""

    def __init__(self) -> None:
        self.balances = {"alice": 50_000, "bob": 30_000}
        self.moves: list[Move] = []
        self.notified: list[str] = []

    def move(self, transfer: str, kind: str, account: str, delta: int) -> None:
        self.balances[account] += delta
        self.moves.append(Move(transfer, kind, account, delta))

    def read(self) -> Books:
        return Books(dict(self.balances), list(self.moves), list(self.notified))

    def total(self) -> int:
        return self.read().total


class FakeLayout(Layout):
    """Plays a transfer by calling a function; `points` are what a process passes in a dry run."""

    title = "fake"
    services: ClassVar[Sequence[str]] = ()

    def __init__(
        self, play: Callable[[Bank, Transfer], Outcome], directory: Path, *, fires: bool = True
    ) -> None:
        super().__init__()
        self._bank = self.auditor = Bank()
        self._play = play
        self._fires = fires
        self.directory = directory
        self.injected: list[Mapping[str, Environment]] = []

    def play(self, order: Transfer, faults: Mapping[str, Environment]) -> Played:
        self.injected.append(faults)
        deaths: Counter[str] = Counter()
        for name, environment in faults.items():
            if "SAGA_FAIL_LOG" in environment:
                with Path(environment["SAGA_FAIL_LOG"]).open("a") as log:
                    log.writelines(f"{point}\n" for point in POINTS)
            elif self._fires:
                deaths[name] += 1
        return Played(OUTCOME.dump_json(self._play(self._bank, order)).decode(), deaths)

    def _make(self, stack: object) -> None: ...

    def _arguments(self, name: str, order: str) -> Sequence[str]:
        return []

    def home(self, step: str) -> str:
        return "savings"

    def victims(self, random: Random) -> Sequence[str]:
        return ["coordinator", random.choice(["savings", "giro"])]


def good(bank: Bank, order: Transfer) -> Outcome:
    bank.move(order.id, "withdraw", order.source, -order.amount)
    bank.move(order.id, "deposit", order.target, order.amount)
    bank.notified.append(order.id)
    return Outcome("completed")


def run(layout: Layout, *scenarios: Scenario, seed: int = 0) -> tuple[bool, list[str]]:
    told: list[str] = []
    return Runner(layout, seed=seed, tell=told.append).run(scenarios), told


def test_a_transfer_that_goes_as_the_table_says_is_as_expected(tmp_path: Path) -> None:
    as_expected, told = run(FakeLayout(good, tmp_path), SUCCESS)
    assert as_expected
    assert told[-1].strip() == "demo: 1 of 1 scenarios as expected; total before 80000, after 80000"


def _paid_twice(bank: Bank, order: Transfer) -> Outcome:
    bank.move(order.id, "withdraw", order.source, -order.amount)
    return good(bank, order)


def _never_deposited(bank: Bank, order: Transfer) -> Outcome:
    bank.move(order.id, "withdraw", order.source, -order.amount)
    bank.notified.append(order.id)
    return Outcome("completed")


def _not_in_the_ledger(bank: Bank, order: Transfer) -> Outcome:
    bank.balances["bob"] += 1
    bank.balances["alice"] -= 1
    return good(bank, order)


def _told_twice(bank: Bank, order: Transfer) -> Outcome:
    bank.notified.append(order.id)
    return good(bank, order)


def _not_ended(bank: Bank, order: Transfer) -> Outcome:
    return replace(good(bank, order), status="not ended")


@pytest.mark.parametrize(
    ("play", "finding"),
    [
        (_paid_twice, "there were 80000 in all, and now there are 77500"),
        (_never_deposited, "the ledgers say"),
        (_not_in_the_ledger, "by the ledger"),
        (_told_twice, "2 notifications instead of 1"),
        (_not_ended, "it ended not ended"),
    ],
)
def test_whatever_is_not_as_the_table_says_is_found_and_named(
    play: Callable[[Bank, Transfer], Outcome], finding: str, tmp_path: Path
) -> None:
    as_expected, told = run(FakeLayout(play, tmp_path), SUCCESS)
    assert not as_expected
    assert [line for line in told if "NOT AS EXPECTED" in line and finding in line], told


def test_a_refusal_that_moved_money_is_found(tmp_path: Path) -> None:
    as_expected, told = run(FakeLayout(good, tmp_path), REFUSED)
    assert not as_expected
    assert told[-1].strip().startswith("demo: 0 of 1 ")


def test_a_fault_that_never_fired_is_a_failure(tmp_path: Path) -> None:
    as_expected, told = run(FakeLayout(good, tmp_path, fires=False), CRASH)
    assert not as_expected
    assert "   NOT AS EXPECTED: its fault never fired" in told


def test_a_crash_is_drawn_by_the_seed_among_the_points_that_a_dry_run_passed(tmp_path: Path) -> None:
    def drawn(seed: int, name: str) -> list[str]:
        (tmp_path / name).mkdir()
        layout = FakeLayout(good, tmp_path / name)
        assert run(layout, CRASH, seed=seed)[0]
        faults = [environment for each in layout.injected for environment in each.values()]
        return [environment["SAGA_FAIL"] for environment in faults if "SAGA_FAIL" in environment]

    draws = [drawn(seed, f"seed-{seed}") for seed in range(20)]
    assert drawn(7, "again") == draws[7]
    assert all(len(draw) == 2 for draw in draws), "once the coordinator, once a participant"
    points = {draw.partition(":")[0] for pair in draws for draw in pair}
    assert points == set(POINTS)
    passes = Counter(POINTS)
    for point, _, at in (draw.split(":") for pair in draws for draw in pair):
        assert 1 <= int(at.removeprefix("n=")) <= passes[point]


def test_money_on_its_way_counts_once_however_often_it_was_withdrawn() -> None:
    """Otherwise a transfer that is paid twice would look conserved."""
    once = [Move("t", "withdraw", "alice", -5)]
    assert Books({"alice": 45}, once, []).total == 50
    assert Books({"alice": 40}, once * 2, []).total == 45
    assert Books({"alice": 50}, [*once, Move("t", "refund", "alice", 5)], []).total == 50

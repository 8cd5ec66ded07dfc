"""All stacks one after the other: a table tells what came of each scenario, and one that breaks down ends no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from random import Random
from typing import ClassVar

import pytest

from examples.money_transfer import everywhere
from examples.money_transfer.books import Books
from examples.money_transfer.layouts import Environment, Layout, Played
from examples.money_transfer.processes import DemoError
from examples.money_transfer.scenarios import SCENARIOS
from examples.money_transfer.stage import OUTCOME, Outcome
from examples.money_transfer.transfer import Transfer

pytestmark = [pytest.mark.feature("I-11"), pytest.mark.stack("pure")]

REFUSED = SCENARIOS[1]


class Untouched:
    """Books in which nothing ever moves."""

    def read(self) -> Books:
        return Books({"alice": 50_000, "bob": 30_000}, [], [])

    def total(self) -> int:
        return self.read().total


class Refusing(Layout):
    """Every transfer is refused, as the scenario asks."""

    title = "refusing"
    services: ClassVar[Sequence[str]] = ()
    reason = REFUSED.reason

    def _make(self, stack: ExitStack) -> None:
        self.auditor = Untouched()

    def _arguments(self, name: str, order: str) -> Sequence[str]:
        raise NotImplementedError

    def home(self, step: str) -> str:
        raise NotImplementedError

    def victims(self, random: Random) -> Sequence[str]:
        raise NotImplementedError

    def play(self, order: Transfer, faults: Mapping[str, Environment]) -> Played:
        outcome = Outcome("compensated", self.reason)
        return Played(OUTCOME.dump_json(outcome).decode(), self._deaths)


class Wrong(Refusing):
    """For another reason than the scenario says."""

    reason = "no_reason"


class Broken(Refusing):
    """Its server is not there."""

    def _make(self, stack: ExitStack) -> None:
        raise DemoError("nobody answers")


def told(*layouts: type[Layout]) -> tuple[bool, list[str]]:
    lines: list[str] = []
    named = {layout.__name__.lower(): layout for layout in layouts}
    good = everywhere.play(named, [REFUSED], seed=7, tell=lines.append)
    return good, lines


def test_what_went_as_expected_everywhere_is_a_success() -> None:
    good, lines = told(Refusing)
    assert good
    assert lines[-3:-1] == ["                    refusing", "insufficient funds  ok"]
    assert lines[-1] == "\ndemo: 1 of 1 scenarios as expected on 1 stacks, seed 7"


def test_a_stack_that_fails_and_one_that_breaks_down_are_told_of_and_end_no_other() -> None:
    good, lines = told(Wrong, Broken, Refusing)
    assert not good
    assert lines[-2].split("  ") == ["insufficient funds", "FAILED", "not run", "ok"]
    assert "   BROKE DOWN: nobody answers" in lines
    assert lines[-1] == "\ndemo: 1 of 3 scenarios as expected on 3 stacks, seed 7"


def test_every_stack_of_separate_processes_is_played() -> None:
    assert set(everywhere.STACKS) == {
        *("postgres", "mariadb", "sqlite-shared"),
        *(f"{database}-{broker}" for database in ("postgres", "mariadb") for broker in ("rabbitmq", "kafka")),
    }

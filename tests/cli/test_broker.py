"""G-05: `saga broker check` in both forms against its golden files, and what a start makes of the same findings."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Final

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from typer.testing import CliRunner

from saga import App, Inbox
from saga.brokers.base import Channel
from saga.cli import build
from saga.errors import TopologyMismatch
from tests.cli.topology import FOUND, Looking, Order, serving

GOLDEN: Final = Path(__file__).parent / "golden"
CASES: Final = {
    "broker-check": ("app", 1),
    "broker-check-good": ("good", 0),
    "broker-check-note": ("noted", 0),
}

pytestmark = [pytest.mark.feature("G-05"), pytest.mark.stack("pure")]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(build(), list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("name", CASES)
def test_a_check_prints_its_golden_file(name: str, form: str) -> None:
    app, status = CASES[name]
    as_json = ["--json"] if form == "json" else []
    got_status, got = run("broker", "check", "--app", f"tests.cli.topology:{app}", *as_json)
    golden = GOLDEN / f"{name}.{form}"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(got)
    assert (got_status, got) == (status, golden.read_text())
    assert "\x1b" not in got
    if form == "json":
        json.loads(got)


def test_a_broker_that_cannot_look_has_nothing_to_say() -> None:
    assert run("broker", "check", "--app", "tests.cli.topology:silent") == (
        0,
        "nothing to say of saga.default.commands.stock\n",
    )


def test_the_channels_of_an_app_are_what_it_sends_to_and_what_it_consumes(sqlite_url: str) -> None:
    inbox = Inbox()

    @inbox.consumer("orders")
    async def record(event: Order, session: AsyncSession) -> None: ...

    app = App(sqlite_url, inboxes=[inbox], topics=["bills"], broker="memory://")
    assert app.channels() == [Channel("bills"), Channel("orders")]
    assert serving(Looking()).channels() == [
        Channel("saga.default.commands.stock", "saga.default.commands.stock.parked")
    ]


async def test_queues_that_are_tables_have_nothing_to_say(sqlite_url: str) -> None:
    assert await App(sqlite_url, broker="database://").check_broker() == []


async def test_production_mode_does_not_start_with_what_is_to_be_refused() -> None:
    app = serving(Looking(*FOUND), production=True)
    with pytest.raises(TopologyMismatch, match="SG206") as caught:
        await app.start(coordinator=False, participants=True)
    assert "[queue-type]" in caught.value.text
    assert "delete it if it is empty" in caught.value.text
    assert "missing" not in caught.value.text


async def test_else_it_starts_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    broker = Looking(*FOUND)
    app = serving(broker)
    with caplog.at_level(logging.WARNING, "saga.app"):
        await app.start(coordinator=False, participants=True)
    await app.stop()
    assert [record.getMessage().partition(" ")[0] for record in caplog.records] == ["[queue-type]"]
    assert broker.asked == ["saga.default.commands.stock"]


async def test_production_mode_starts_with_what_is_only_noted() -> None:
    app = serving(Looking(FOUND[0]), production=True)
    await app.start(coordinator=False, participants=True)
    await app.stop()

"""Each capability of a broker switched off in turn: the gap is filled from the database, or the app does not start."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from saga import adapters
from saga.app import App
from saga.brokers.base import Capabilities
from saga.brokers.memory import MEMORY, Faults, MemoryBroker, MemoryQueues
from saga.definition.activity import Participant
from saga.definition.builder import Saga
from saga.errors import MissingCapability, RetentionTooShort, SagaCompensated
from saga.outcomes import ActivityContext, Refused
from tests.coordinator.harness import Order, Receipt
from tests.coordinator.sagas import QUICK

pytestmark = pytest.mark.stack("pure")

EVERYTHING = replace(MEMORY, name="everything", durable=True, delay=True, priority=True, packs_commands=True)
FILLED: dict[str, Any] = {
    "durable": False,
    "ordered_per_key": False,
    "delay": False,
    "priority": False,
    "single_ack": False,
    "delivery_count": False,
    "packs_commands": False,
}
REFUSED: dict[str, Any] = {
    "body_bytes_max": 100 * 1024,
    "unacked_seconds_max": 10.0,
    "retention_seconds": 90 * 86400.0,
}
LONG = timedelta(seconds=30)


class Bank:
    """Three activities that count what they did; the third refuses one account."""

    def __init__(self) -> None:
        self.effects: Counter[str] = Counter()
        owner = Participant("bank", start_to_close=LONG)
        self.owner = owner

        @owner.activity(retry=QUICK)
        async def first(order: Order, context: ActivityContext) -> Receipt:
            return self._do(f"{context.saga_id} first", context)

        @first.compensation
        async def undo_first(order: Order, context: ActivityContext) -> None:
            self._do(f"{context.saga_id} undo first", context)

        @owner.activity(retry=QUICK)
        async def second(order: Order, context: ActivityContext) -> Receipt:
            return self._do(f"{context.saga_id} second", context)

        @second.compensation
        async def undo_second(order: Order, context: ActivityContext) -> None:
            self._do(f"{context.saga_id} undo second", context)

        @owner.activity(retry=QUICK, no_compensation="it is the last step")
        async def third(order: Order, context: ActivityContext) -> Receipt:
            if order.account == "closed":
                raise Refused("closed")
            return self._do(f"{context.saga_id} third", context)

        self.saga = Saga("bank", Order).step(first).step(second).step(third)

    def _do(self, effect: str, context: ActivityContext) -> Receipt:
        assert context.operation_key
        self.effects[effect] += 1
        return Receipt()

    def app(self, url: str, broker: MemoryBroker) -> App:
        return App(
            url, broker=broker, sagas=[self.saga], participants=[self.owner], redrive=timedelta(seconds=1)
        )


def test_every_capability_is_in_one_of_the_two_tables() -> None:
    """G-06: a capability that nobody thought of would be the one that is silently wrong."""
    assert {*FILLED, *REFUSED} == {field.name for field in fields(Capabilities)} - {"name"}


def test_the_table_of_the_page_is_what_the_adapters_declare() -> None:
    """Where it is not, print(adapters.capabilities()) between the page's marks."""
    page = (Path(__file__).parents[2] / "docs" / "brokers.md").read_text()
    begin, end = "<!-- capabilities: made from the code -->\n", "<!-- capabilities: end -->"
    assert page.partition(begin)[2].partition(end)[0] == adapters.capabilities()
    after = page.partition(end)[2].partition("\n## ")[0]
    explained = {line.split("`")[1] for line in after.splitlines() if line.startswith("| `")}
    assert explained == {field.name for field in fields(Capabilities)} - {"name"}


@pytest.mark.feature("G-06", acceptance=True)
@pytest.mark.parametrize("capability", FILLED)
async def test_a_gap_that_the_database_fills_changes_no_outcome(sqlite_file: str, capability: str) -> None:
    """G-06: with the order of messages shuffled where order is what is missing."""
    bank = Bank()
    missing = MemoryBroker(capabilities=EVERYTHING).without(**{capability: FILLED[capability]})
    async with bank.app(sqlite_file, missing) as app:
        handles = [
            await app.client.start(bank.saga, Order(account=account), id=f"{account}-{number}")
            for number in range(5)
            for account in ("open", "closed")
        ]
        for handle in handles:
            if handle.id.startswith("open"):
                await handle.result(timeout=timedelta(seconds=20))
            else:
                with pytest.raises(SagaCompensated) as caught:
                    await handle.result(timeout=timedelta(seconds=20))
                assert caught.value.undone == ("second", "first")
    done = {f"open-{number} {step}" for number in range(5) for step in ("first", "second", "third")}
    undone = {
        f"closed-{number} {step}"
        for number in range(5)
        for step in ("first", "second", "undo second", "undo first")
    }
    assert bank.effects == Counter(done | undone)


@pytest.mark.feature("G-06", acceptance=True)
@pytest.mark.parametrize("capability", REFUSED)
async def test_a_gap_that_nothing_fills_is_refused_at_start(sqlite_file: str, capability: str) -> None:
    """G-06, RMQ-16, P12: the error names the adapter and what does not fit; nothing was started."""
    bank = Bank()
    missing = MemoryBroker(capabilities=EVERYTHING).without(**{capability: REFUSED[capability]})
    app = bank.app(sqlite_file, missing)
    with pytest.raises((MissingCapability, RetentionTooShort)) as caught:
        await app.start(coordinator=True, participants=True)
    assert "everything" in caught.value.text
    assert bank.effects == Counter()


@pytest.mark.feature("G-06", acceptance=True)
async def test_what_a_broker_that_is_not_durable_forgot_is_sent_again_at_the_restart(
    sqlite_file: str,
) -> None:
    """G-06, P4: the saga was started, its command lost with the broker's process; it goes on at once."""
    bank = Bank()
    queues = MemoryQueues()
    deaf = MemoryBroker(queues, faults=Faults(lose_message=1.0), capabilities=EVERYTHING)
    async with bank.app(sqlite_file, deaf.without(durable=False)) as app:
        await app.client.start(bank.saga, Order(), id="x")
    assert bank.effects == Counter()
    fresh = MemoryBroker(capabilities=EVERYTHING).without(durable=False)
    async with bank.app(sqlite_file, fresh) as app:
        handle = await app.client.find(bank.saga, "x")
        await handle.result(timeout=timedelta(seconds=20))
    assert bank.effects == Counter({"x first": 1, "x second": 1, "x third": 1})

"""Publishing from memory: at once, bounded, and never in the way of receiving (P33, F-05)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from saga.app import App
from saga.brokers.base import PublishOutcome
from saga.brokers.memory import Faults as BrokerFaults
from saga.brokers.memory import MemoryBroker
from saga.clock import SystemClock
from saga.errors import StorageUnavailable
from saga.outbox.publisher import LEFT_SECONDS
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.outbox import SqlOutboxStore
from tests.client.shop import Order, purchase, shop
from tests.outbox.harness import ManualClock, Outbox, ScriptedBroker, ids
from tests.plugins.features import Faults

pytestmark = pytest.mark.feature("F-05")


async def settled() -> None:
    """Let callbacks of resolved futures run."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_confirmed_row_is_deleted_with_the_next_batch(outbox: Outbox) -> None:
    node = outbox.node(ScriptedBroker(), ManualClock())
    rows = await outbox.add(b"1", b"2")
    node.publisher.publish(rows)
    await settled()
    taken = node.publisher.take_confirmed()
    assert sorted(taken) == [row.id for row in rows]
    assert set(node.publisher.in_flight) == set(taken), "until it is gone, no sweep may send it again"
    node.publisher.untake(taken)  # that batch did not commit
    assert node.publisher.take_confirmed() == taken
    node.publisher.deleted(taken)
    assert not node.publisher.in_flight


async def test_a_confirmed_row_that_no_batch_takes_along_is_deleted_after_a_while(outbox: Outbox) -> None:
    node = outbox.node(ScriptedBroker())
    node.publisher.publish(await outbox.add(b"1"))
    clock = SystemClock()
    until = clock.monotonic() + 10
    while await outbox.left():
        assert clock.monotonic() < until
        await clock.sleep(0.02)


async def test_a_deletion_that_fails_is_tried_again_whatever_it_raised(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, failures = SqlOutboxStore.delete_confirmed, iter([StorageUnavailable(), RuntimeError("a bug")])

    async def delete(self: SqlOutboxStore, numbers: Any) -> None:
        if (failure := next(failures, None)) is not None:
            raise failure
        await whole(self, numbers)

    monkeypatch.setattr(SqlOutboxStore, "delete_confirmed", delete)
    monkeypatch.setattr("saga.outbox.publisher.FLUSH_SECONDS", 0.01)
    node = outbox.node(ScriptedBroker())
    node.publisher.publish(await outbox.add(b"1"))
    clock = SystemClock()
    while next_is_left(failures):
        await clock.sleep(0.01)
    node.publisher.publish(await outbox.add(b"2"))
    until = clock.monotonic() + 10
    while await outbox.left():
        assert clock.monotonic() < until
        await clock.sleep(0.02)


def next_is_left(failures: Any) -> bool:
    return bool(failures.__length_hint__())


async def test_closing_deletes_what_is_confirmed_and_survives_a_database_that_is_away(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = outbox.node(ScriptedBroker())
    node.publisher.publish(await outbox.add(b"1"))
    await settled()
    await node.publisher.close()
    assert await outbox.left() == []

    async def away(self: SqlOutboxStore, numbers: Any) -> None:
        raise StorageUnavailable

    node.publisher.publish(await outbox.add(b"2"))
    await settled()
    monkeypatch.setattr(SqlOutboxStore, "delete_confirmed", away)
    await node.publisher.close()
    assert await outbox.left() == [b"2"]


@pytest.mark.parametrize(
    "answer", [PublishOutcome.UNROUTABLE, PublishOutcome.REFUSED, PublishOutcome.UNKNOWN]
)
async def test_a_row_without_a_confirm_stays_for_the_sweep(outbox: Outbox, answer: PublishOutcome) -> None:
    broker = ScriptedBroker()
    node = outbox.node(broker, ManualClock())
    broker.answers["work"] = answer
    node.publisher.publish(await outbox.add(b"1"))
    await settled()
    assert node.publisher.take_confirmed() == []
    assert not node.publisher.in_flight
    broker.answers.clear()
    await node.sweep()
    assert broker.sent == [b"1", b"1"]
    assert await outbox.left() == []


async def test_a_row_goes_direct_only_if_no_older_unsent_row_of_its_key_is_known(outbox: Outbox) -> None:
    broker, clock, key = ScriptedBroker(), ManualClock(), ids.uuid7()
    node = outbox.node(broker, clock)
    broker.answers["work"] = PublishOutcome.UNKNOWN
    node.publisher.publish(await outbox.add(b"1", key=key))
    await settled()
    broker.answers.clear()
    node.publisher.publish(await outbox.add(b"2", key=key))
    node.publisher.publish(await outbox.add(b"other"))
    assert broker.take_sent() == [b"1", b"other"]
    await node.sweep()
    assert broker.take_sent() == [b"1", b"2"]
    clock.seconds += LEFT_SECONDS + 1
    node.publisher.publish(await outbox.add(b"3", key=key))
    assert broker.take_sent() == [b"3"]


async def test_above_the_bound_rows_are_left_to_the_sweep(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P33: publishing waits for nobody, so what is in flight is bounded by not sending."""
    monkeypatch.setattr("saga.outbox.publisher.IN_FLIGHT_MAX", 3)
    broker = ScriptedBroker()
    node = outbox.node(broker, ManualClock())
    broker.answers["work"] = None
    node.publisher.publish(await outbox.add(*(b"%d" % n for n in range(5))))
    assert broker.take_sent() == [b"0", b"1", b"2"]
    node.publisher.publish(await outbox.add(b"5"))
    assert broker.take_sent() == []
    broker.answers.clear()
    await node.sweep()
    assert broker.take_sent() == [b"3", b"4", b"5"]


@pytest.mark.parametrize("stack", ["sqlite"])
async def test_a_broker_whose_confirms_never_come_does_not_stop_the_coordinator(
    outbox: Outbox, url: str, faults: Faults
) -> None:
    """P33: receiving never waits for publishing; every row stays until it is confirmed."""
    faults.declare("confirm lost")
    broker = LosingConfirms()
    async with App(url, broker=broker, sagas=[purchase], participants=[shop]) as app:
        handles = [await app.client.start(purchase, Order(item=str(n)), id=str(n)) for n in range(20)]
        results = await asyncio.gather(*(handle.result() for handle in handles))
        assert [result.number for result in results] == [f"c-{n}" for n in range(20)]
        assert len(await outbox.rows(t.outbox)) == 40
        faults.fired("confirm lost", broker.fired["lose_confirm"])
        await app.stop()
    assert faults.counts["confirm lost"] >= 40


class LosingConfirms(MemoryBroker):
    """Takes and delivers every command, and never says so; replies are confirmed."""

    def publish(self, messages: Any) -> Any:
        lose = bool(messages) and "commands" in messages[0].channel
        self.faults = BrokerFaults(lose_confirm=1.0 if lose else 0.0)
        return super().publish(messages)

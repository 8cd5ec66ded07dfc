"""From commit to broker: at once and from memory, in the order of each key, with the sweep for all that is left."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pytest

from saga.brokers.base import OutMessage, PublishOutcome
from saga.client import Handle
from saga.outbox import publisher
from saga.storage.base import Changes, StoredRow
from saga.storage.sqlalchemy import tables as t
from tests.coordinator.harness import HELD, PATIENCE, Node, Order, Stack
from tests.coordinator.sagas import sequence
from tests.plugins.features import Faults

THREE = sequence(3)
LEASE_AND_TWO_SECONDS = 7


@pytest.mark.feature("F-03")
@pytest.mark.usefixtures("real_broker")
async def test_an_idle_commit_is_on_the_broker_without_any_waiting(stack: Stack) -> None:
    """F-03: with every local clock standing still a saga runs from start to end; no poll and no debounce takes part."""
    participant = await stack.participant()
    node = await stack.node(THREE)
    stack.clock.freeze()
    handle = await node.client.start(THREE, Order(), id="x")
    await handle.result(timeout=PATIENCE)
    assert participant.effects("x") == ["s1", "s2", "s3"]
    assert len(node.broker.commands()) == 3


@pytest.mark.feature("F-03")
async def test_confirmed_rows_go_with_the_next_batch_and_after_250_ms_when_idle(stack: Stack) -> None:
    """F-03, P34: no statement of its own while there is traffic."""
    participant = await stack.participant({"last: s2": [HELD]})
    node = await stack.node(THREE)
    stack.clock.freeze()
    deleted = count_deletions(node)
    await (await node.client.start(THREE, Order(), id="busy")).result(timeout=PATIENCE)
    await node.client.start(THREE, Order(), id="last")
    await participant.wait_held(1)
    assert deleted == [], "each confirmed row went with a batch"
    [left] = await stack.rows(t.outbox.select())
    assert b'"step":"s2"' in left.body, "no batch came after the confirm of this one"
    stack.clock.jump(0.24)
    await stack.quiet()
    assert await stack.count(t.outbox) == 1
    stack.clock.jump(0.02)
    await stack.empty(t.outbox)
    assert deleted == [1]


def count_deletions(node: Node) -> list[int]:
    """Keep how many rows each deletion outside a batch takes."""
    counts: list[int] = []
    real = node.outbox.delete_confirmed

    async def counted(ids: Collection[int]) -> None:
        counts.append(len(ids))
        await real(ids)

    node.outbox.delete_confirmed = counted  # type: ignore[method-assign]
    return counts


@pytest.mark.feature("F-03")
async def test_a_row_goes_direct_only_if_no_older_unsent_row_of_its_key_is_known(stack: Stack) -> None:
    """F-03: what the broker refused once is the relay's, and so is what follows under its key; others go direct."""
    await stack.participant()
    node = await stack.node(THREE)
    refused: list[OutMessage] = []

    def once(message: OutMessage) -> PublishOutcome | None:
        if refused:
            return None
        refused.append(message)
        return PublishOutcome.REFUSED

    node.broker.refuse = once
    swept = count_swept(node)
    slow = await node.client.start(THREE, Order(), id="slow")
    fast = await node.client.start(THREE, Order(), id="fast")
    assert await stack.ended([fast]) == {"fast": "completed"}
    assert swept == [], "the other key is not held up"
    while not swept:
        await stack.pass_time(0.5)
        await stack.quiet()
    assert await stack.ended([slow], step=0.1) == {"slow": "completed"}
    assert set(swept) == {str(slow.run_id)}
    mine = [command for command in node.broker.commands() if command.runid == str(slow.run_id)]
    assert [command.step for command in mine][:2] == ["s1", "s1"], "once in vain"
    assert list(dict.fromkeys(command.step for command in mine)) == ["s1", "s2", "s3"]
    assert len(swept) >= 2, "s2 followed s1 through the sweep: the key had an unsent row"


def count_swept(node: Node) -> list[str]:
    """Keep the keys of the rows that the relay sends."""
    keys: list[str] = []
    real = node.relay._send

    async def kept(rows: Sequence[StoredRow], now: float) -> list[int]:
        keys.extend(row.ordering_key for row in rows)
        return await real(rows, now)

    node.relay._send = kept  # type: ignore[method-assign]
    return keys


@pytest.mark.feature("F-03")
async def test_above_the_bound_rows_are_left_to_the_sweep(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P33: committing never waits for a broker that does not answer, and memory stays bounded."""
    monkeypatch.setattr(publisher, "IN_FLIGHT_MAX", 5)
    participant = await stack.participant()
    node = await stack.node(THREE)
    node.broker.held = []
    handles = [await node.client.start(THREE, Order(), id=f"x{number}") for number in range(8)]
    assert len(node.broker.held) == 5
    assert len(node.publisher.in_flight) == 5
    node.broker.let_go()
    states = await stack.ended(handles, step=1)
    assert set(states.values()) == {"completed"}
    assert not participant.doubled()


@pytest.mark.feature("F-03", acceptance=True)
@pytest.mark.usefixtures("real_broker")
async def test_after_a_kill_right_after_every_commit_all_rows_are_out_within_the_lease(
    stack: Stack, faults: Faults
) -> None:
    """F-03, I6: idle, a commit is on the broker with the clock standing still; killed, the sweep of another has it."""
    faults.declare("killed after the commit")
    participant = await stack.participant()
    node = await stack.node(THREE)
    stack.clock.freeze()
    await (await node.client.start(THREE, Order(), id="idle")).result(timeout=PATIENCE)

    handle = await kill_after_start(node)
    for step in range(1, 4):
        faults.fired("killed after the commit")
        node = await stack.node(THREE)
        kill_at_next_commit(node)
        seen = len(participant.effects("killed"))
        assert seen == step - 1
        for _ in range(LEASE_AND_TWO_SECONDS * 2):
            if len(participant.effects("killed")) == step:
                break
            await stack.pass_time(0.5)
            await stack.quiet()
        assert participant.effects("killed") == [f"s{number}" for number in range(1, step + 1)]
        await stack.until(node.dead, step=1)
    assert await stack.ended([handle], step=1) == {"killed": "completed"}
    assert not participant.doubled()


async def kill_after_start(node: Node) -> Handle[Any]:
    """Start a saga and kill its process before it publishes anything."""
    node.broker.held = []
    handle = await node.client.start(THREE, Order(), id="killed")
    node.kill()
    return handle


def kill_at_next_commit(node: Node) -> None:
    def after(changes: Changes) -> None:
        if changes.moved:
            node.kill()

    node.store.after = after

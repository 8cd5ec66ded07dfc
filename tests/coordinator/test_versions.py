"""Pinned versions: an instance runs by the rules it was started under, whoever coordinates it."""

from __future__ import annotations

import pytest

from saga.errors import DefinitionChanged
from saga.messages import replies_channel
from saga.storage.sqlalchemy import tables as t
from tests.coordinator.harness import Order, Stack
from tests.coordinator.sagas import sequence
from tests.plugins.features import Faults

V1 = sequence(3)
V2 = sequence(4, version=2, names={2: "inserted", 3: "s2", 4: "s3"})
OLD_WAY = ["s1", "s2", "s3"]
NEW_WAY = ["s1", "inserted", "s2", "s3"]


@pytest.mark.feature("A-13")
async def test_other_content_under_a_known_version_is_refused_at_start(stack: Stack) -> None:
    """A-13, P18: the database knows the fingerprint, so it is another process that finds out."""
    await stack.node(V1)
    await stack.node(sequence(3))  # the same content, written again
    with pytest.raises(DefinitionChanged) as caught:
        await stack.node(sequence(3, names={2: "other"}))
    assert caught.value.saga == "sequence"
    await stack.node(V1, V2)


@pytest.mark.feature("A-13", acceptance=True, scale=0.02)
async def test_open_v1_instances_end_by_v1_rules_while_v2_is_rolled_out(stack: Stack, faults: Faults) -> None:
    """A-13, P18, P29: old processes go one by one while both versions run; none lost, none changed."""
    faults.declare("killed old coordinator")
    participant = await stack.participant()
    olds = [await stack.node(V1) for _ in range(3)]
    handles = [await olds[0].client.start(V1, Order(), id=f"old-{number}") for number in range(10)]
    new = await stack.node(V1, V2)
    for number, old in enumerate(olds):
        before = [await new.client.start(V2, Order(), id=f"new-{number}-{each}") for each in range(4)]
        after = [await old.client.start(V1, Order(), id=f"old-{number}-{each}") for each in range(4)]
        handles += before + after
        old.kill()
        faults.fired("killed old coordinator")
    states = await stack.ended(handles, step=3)

    assert set(states.values()) == {"completed"}
    assert len(states) == 34
    for saga_id in states:
        assert participant.effects(saga_id) == (OLD_WAY if saga_id.startswith("old") else NEW_WAY), saga_id
    versions = await stack.rows(
        t.instance.select().with_only_columns(t.instance.c.saga_id, t.instance.c.saga_version)
    )
    assert {version for saga_id, version in versions if saga_id.startswith("old")} == {1}
    assert not participant.doubled()


@pytest.mark.feature("A-13")
@pytest.mark.parametrize("lacking", ["the new version", "the old version"])
async def test_a_reply_for_a_version_that_a_process_lacks_waits_beside_the_saga(
    stack: Stack, lacking: str
) -> None:
    """P29: stored in the batch's commit, acked, never parked or requeued; applied by the next one that has it."""
    mine, other = (V1, V2) if lacking == "the new version" else (V2, V1)
    participant = await stack.participant()
    await stack.node(mine)
    starter = await stack.node(mine, other, coordinator=False)
    handle = await starter.client.start(other, Order(), id="x")
    await participant.wait_commands(1)

    async def stored() -> int:
        return await stack.count(t.pending_reply)

    await stack.until(stored)
    before = await stack.rows(t.instance.select())
    assert (await starter.broker.status(replies_channel(stack.namespace))).messages == 0
    assert before[0].version == 1
    assert await stack.count(t.parked) == await stack.count(t.stale_reply) == 0

    await stack.node(mine, other)
    assert await stack.ended([handle], step=3) == {"x": "completed"}
    assert participant.effects("x") == (NEW_WAY if other is V2 else OLD_WAY)
    await stack.empty(
        t.pending_reply, step=3
    )  # a copy of a resend may have come to the process that lacks it
    assert await stack.count(t.incident) == 0

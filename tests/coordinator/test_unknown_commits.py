"""A commit whose answer is lost is run again, never guessed; a database that does not answer is waited for, bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from saga import failpoints
from saga.client import Handle
from saga.clock import SystemClock
from saga.errors import StorageUnavailable
from saga.storage.sqlalchemy import database
from saga.storage.sqlalchemy import tables as t
from tests.coordinator.harness import HELD, Order, Stack, refuse
from tests.coordinator.sagas import sequence
from tests.plugins.features import Faults
from tests.proxy import Proxy, ProxyFactory

THREE = sequence(3)
STATE = b'{"f":'
"""Only statements that write an instance carry its state: this finds them, also where their text was sent before."""
ANSWERED = b"Z\x00\x00\x00\x05I"
"""The server's word that it is ready: the answer to COMMIT, or to a statement that is a transaction by itself."""


async def unbroken(stack: Stack, handles: Sequence[Handle[Any]]) -> None:
    """I10: the versions of each instance, and of its history, count up without a gap or a repeat."""
    h, i = t.history.c, t.instance.c
    lines = await stack.rows(
        t.history.select().with_only_columns(h.run_id, h.version).order_by(h.run_id, h.version)
    )
    versions = dict(await stack.rows(t.instance.select().with_only_columns(i.run_id, i.version)))
    for handle in handles:
        mine = [version for run_id, version in lines if run_id == handle.run_id]
        assert mine == list(range(1, versions[handle.run_id] + 1)), handle.id


@pytest.mark.feature("G-10")
@pytest.mark.parametrize("point", ["C3", "C7"])
async def test_a_lost_answer_to_a_commit_is_settled_by_running_it_again(
    stack: Stack, point: str, faults: Faults
) -> None:
    """P3, I10, I11: start (C3) and transition (C7); nothing doubled, nothing missing, the start is the same saga."""
    faults.declare(f"{point} lost")
    participant = await stack.participant({"x1: s3": [refuse()]})
    node = await stack.node(THREE)
    handles = []
    for number in range(3):
        failpoints.arm(f"{point}:raise:n={1 if point == 'C3' else number + 1}")
        handles.append(await node.client.start(THREE, Order(), id=f"x{number}"))
        await stack.ended(handles, step=1)
        assert failpoints.disarm()[point] >= 1
        faults.fired(f"{point} lost")
    states = await stack.ended(handles, step=1)
    assert states == {"x0": "completed", "x1": "compensated", "x2": "completed"}
    assert participant.effects("x0") == ["s1", "s2", "s3"]
    assert participant.effects("x1") == ["s1", "s2", "undo s2", "undo s1"]
    assert not participant.doubled()
    await unbroken(stack, handles)


@pytest.mark.feature("G-10")
async def test_a_start_whose_answer_was_lost_is_this_start(stack: Stack) -> None:
    """P31: the same run id is there already, so the rerun has inserted it; another start of the id finds it."""
    await stack.participant({"s1": [HELD]})
    node = await stack.node(THREE)
    failpoints.arm("C3:raise")
    handle = await node.client.start(THREE, Order(), id="x")
    again = await node.client.start(THREE, Order(), id="x")
    assert again.run_id == handle.run_id
    assert await stack.count(t.instance) == await stack.count(t.history) == await stack.count(t.value) + 1


@pytest.mark.feature("G-10")
async def test_a_verb_whose_answer_was_lost_is_this_verb(stack: Stack) -> None:
    """P31, P16: the audit row knows its request id; the rerun adds none and raises nothing."""
    participant = await stack.participant({"s2": [HELD]})
    node = await stack.node(THREE)
    handle = await node.client.start(THREE, Order(), id="x")
    await participant.wait_held(1)
    failpoints.arm("C7:raise")
    await node.client.cancel(handle.run_id, actor="me", reason="test")
    assert failpoints.disarm()["C7"] >= 2
    [row] = await stack.rows(t.audit.select())
    assert (row.verb, row.actor, row.status_before) == ("cancel", "me", "running")
    participant.release()
    assert await stack.ended([handle]) == {"x": "compensated"}
    assert participant.effects("x") == ["s1", "s2", "undo s2", "undo s1"]
    await unbroken(stack, [handle])


@pytest.mark.feature("G-10", acceptance=True, scale=0.1)
@pytest.mark.parametrize("stack", ["postgres-rabbitmq"], indirect=True)
async def test_every_saga_ends_while_answers_are_cut_and_the_database_is_a_black_hole(
    stack: Stack, proxy: ProxyFactory, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G-10, F6, F8, P3: start, transition and relay lose answers to COMMIT and to statements that are commits."""
    faults.declare("commit cut", "write cut", "answer cut", "black hole")
    monkeypatch.setattr(database, "STATEMENT_SECONDS", 0.5)
    monkeypatch.setattr(database, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(database, "TRANSACTION_SECONDS", 1.0)
    participant = await stack.participant({"x1: s3": [refuse()]})
    link = await proxy(stack.url)
    node = await stack.node(THREE, url=link.url)
    cutting = asyncio.create_task(cut(stack, link, faults))
    handles = [await start(node.client, f"x{number}") for number in range(12)]
    await cutting
    for _ in range(3):
        link.drop()
        faults.fired("black hole")
        since = SystemClock().monotonic()
        with pytest.raises(StorageUnavailable):
            await node.client.start(THREE, Order(), id="never-seen")
        assert SystemClock().monotonic() - since < database.TRANSACTION_SECONDS + 2.0
        link.heal()
        handles.append(await start(node.client, f"after-{len(handles)}"))
    handles.append(await start(node.client, "never-seen"))
    states = await stack.ended(handles, step=2)
    assert states.pop("x1") == "compensated"
    assert set(states.values()) == {"completed"}
    assert all(participant.effects(saga_id) == ["s1", "s2", "s3"] for saga_id in states)
    assert not participant.doubled()
    await unbroken(stack, handles)


async def start(client: Any, saga_id: str) -> Handle[Any]:
    """Start until it is known to be there, with the same id, as the documentation of `start` asks (I11)."""
    for _ in range(5):
        try:
            handle: Handle[Any] = await client.start(THREE, Order(), id=saga_id)
            return handle
        except StorageUnavailable:
            continue
    raise AssertionError("five starts in a row were cut")


async def cut(stack: Stack, link: Proxy, faults: Faults) -> None:
    """Cut at what comes next of each kind, four times."""
    for number in range(12):
        kind = ("commit cut", "write cut", "answer cut")[number % 3]
        if kind == "commit cut":
            link.cut_at_commit()
        elif kind == "write cut":
            link.cut_after(STATE)
        else:
            link.cut_before(ANSWERED)
        fired = link.fired["cut"] + 1
        node = stack.nodes[0]
        if kind == "write cut":
            await start(node.client, f"cut-{number}")
        await stack.until(partial(has_fired, link, fired), step=1)
        faults.fired(kind)


def has_fired(link: Proxy, times: int) -> bool:
    return link.fired["cut"] >= times

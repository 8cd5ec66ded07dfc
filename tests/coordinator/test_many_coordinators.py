"""Any number of coordinators, all active: any may handle any reply, versions decide, recovery is a continuous poll."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
from sqlalchemy import Connection

from saga.brokers.base import OutMessage
from saga.client import Handle
from saga.messages import pack, replies_channel
from saga.storage.base import Changes
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.statements import Fenced
from tests.coordinator.harness import COMMAND_LOST, DONE, HELD, Batch, Node, Order, Scripted, Stack, refuse
from tests.coordinator.sagas import sequence
from tests.plugins.features import Faults

T = TypeVar("T")
FOUR = sequence(4)
SERVERS = ["postgres-rabbitmq", "mariadb-rabbitmq"]
"""On SQLite writers wait for each other before they decide."""


def kill_after(node: Node, commits: int) -> None:
    """Let a process die right after that many of its own commits, before it acks or publishes."""
    left = commits

    def after(changes: Changes) -> None:
        nonlocal left
        left -= len(changes.moved) > 0
        if left == 0:
            node.kill()

    node.store.after = after


class Zombie:
    """Stops a process between deciding and writing, as a frozen one stands, until it is thawed."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.thawed = asyncio.Event()
        self.frozen = asyncio.Event()
        self.lost = 0
        self._run = node.database.run
        node.database.run = self.run  # type: ignore[method-assign]

    async def run(self, function: Callable[[Connection], T], *, lost_commit: str = "", **how: Any) -> T:
        if lost_commit == "C7" and not self.thawed.is_set():
            self.frozen.set()
            await self.thawed.wait()
            try:
                advanced: Any = await self._run(function, lost_commit=lost_commit, **how)
            except Fenced:
                self.lost = 1
                raise
            self.lost = len(advanced.lost)
            return advanced
        return await self._run(function, lost_commit=lost_commit, **how)


@pytest.mark.slow
@pytest.mark.feature("K-04", acceptance=True, scale=0.02)
@pytest.mark.usefixtures("real_broker")
@pytest.mark.parametrize("stack", SERVERS, indirect=True)
async def test_all_sagas_end_while_coordinators_die_and_zombies_wake(stack: Stack, faults: Faults) -> None:
    """K-04, P1, P11, F1, F2: three at a time; one is killed after a commit, another thaws after it was overtaken."""
    faults.declare("kill", "zombie")
    participant = await stack.participant({f"x{number}: s4": [refuse()] for number in range(0, 36, 6)})
    starter = await stack.node(FOUR, coordinator=False)
    handles: list[Handle[Any]] = []
    zombies: list[Zombie] = []
    for turn in range(3):
        stays, dies, freezes = [await stack.node(FOUR) for _ in range(3)]
        zombies.append(Zombie(freezes))
        kill_after(dies, 2)
        mine = [
            await starter.client.start(FOUR, Order(), id=f"x{12 * turn + number}") for number in range(12)
        ]
        handles += mine
        await stack.until(dies.dead, step=2)
        await stack.until(zombies[-1].frozen.is_set, step=2)
        faults.fired("kill")
        # the broker takes back what the frozen one holds, and the others go on
        open_runs = await stuck(stack, mine, step=5)
        assert len(open_runs) <= 12
        zombies[-1].thawed.set()
        await stack.ended(mine, step=5)
        faults.fired("zombie")
        await stays.stop()
        await freezes.stop()
    states = await stack.ended(handles)
    refused = {f"x{number}" for number in range(0, 36, 6)}
    for saga_id, status in states.items():
        if saga_id in refused:
            assert status == "compensated"
            assert participant.effects(saga_id) == ["s1", "s2", "s3", "undo s3", "undo s2", "undo s1"]
        else:
            assert status == "completed"
            assert participant.effects(saga_id) == ["s1", "s2", "s3", "s4"]
    assert not participant.doubled()


async def stuck(stack: Stack, handles: list[Handle[Any]], *, step: float) -> list[str]:
    """Let the others run for a while, and return what is still open."""
    for _ in range(12):
        await stack.pass_time(step)
        await asyncio.sleep(0.02)
    states = await stack.statuses(handles)
    return [saga_id for saga_id, status in states.items() if status not in ("completed", "compensated")]


@pytest.mark.feature("K-04")
@pytest.mark.parametrize("stack", SERVERS, indirect=True)
async def test_a_zombies_stale_write_changes_zero_rows(stack: Stack) -> None:
    """P1, P9, I10: instance, history, values and commands of the loser are not written; it decides again, and acks."""
    participant = await stack.participant({"s1": [HELD]})
    node = await stack.node(FOUR)
    handle = await node.client.start(FOUR, Order(), id="x")
    await participant.wait_held(1)
    zombie = Zombie(node)
    participant.release()
    async with asyncio.timeout(60):
        await zombie.frozen.wait()
    other = await stack.node(FOUR)
    stack.drop(node.broker.broker)  # the broker takes back what a silent process holds
    await stack.ended([handle])
    before = {
        table.name: await stack.rows(table.select()) for table in (t.instance, t.history, t.value, t.outbox)
    }
    zombie.thawed.set()

    async def noted() -> bool:
        return await stack.count(t.stale_reply) >= 1

    await stack.until(noted)
    assert zombie.lost == 1
    after = {
        table.name: await stack.rows(table.select()) for table in (t.instance, t.history, t.value, t.outbox)
    }
    assert after["saga_instance"] == before["saga_instance"]
    assert after["saga_history"] == before["saga_history"]
    assert after["saga_value"] == before["saga_value"]
    assert len(after["saga_outbox"]) <= len(before["saga_outbox"])
    assert other.alive
    assert participant.effects("x") == ["s1", "s2", "s3", "s4"]


@pytest.mark.feature("K-04")
async def test_recovery_finds_every_overdue_open_row_whoever_made_it(stack: Stack) -> None:
    """P11: a process that never saw these sagas, started long after their own one died, moves all of them."""
    participant = await stack.participant({"s2": [COMMAND_LOST, DONE], "waits: s1": [COMMAND_LOST, DONE]})
    first = await stack.node(FOUR)
    ids = ["waits", *(f"x{number}" for number in range(8))]
    handles = [await first.client.start(FOUR, Order(), id=saga_id) for saga_id in ids]
    await participant.wait_commands(2 * len(ids) - 1)
    await stack.quiet()
    first.kill()
    await stack.pass_time(60)
    await stack.node(FOUR)
    states = await stack.ended(handles, step=5)
    assert set(states.values()) == {"completed"}
    assert not participant.doubled()


@pytest.mark.feature("K-04")
async def test_what_became_due_after_the_start_pass_is_found_by_the_poll(stack: Stack) -> None:
    """P11: recovery is no start-up pass: the overdue row belongs to a process that dies while this one runs."""
    participant = await stack.participant({"s1": [COMMAND_LOST, DONE]})
    survivor = await stack.node(FOUR)
    first = await stack.node(FOUR, coordinator=False)
    handle = await first.client.start(FOUR, Order(), id="x")
    await participant.wait_commands(1)
    first.kill()
    assert await stack.ended([handle], step=5) == {"x": "completed"}
    assert {batch.size for batch in survivor.store.batches} == {1}


def statements(batches: Sequence[Batch]) -> list[int]:
    return [len(batch.statements) for batch in batches]


async def behind(stack: Stack, participant: Scripted) -> tuple[Node, Handle[Any], bytes]:
    """Return a process whose guess stands at s1 although s1 is done, as if another one had moved the saga on."""
    node = await stack.node(FOUR)
    handle = await node.client.start(FOUR, Order(), id="x")
    await participant.wait_held(1)
    recent, (_, first) = node.store.recent, participant.held[0]
    guess = recent.take([handle.run_id])
    participant.release()
    await participant.wait_held(1)
    recent.take([handle.run_id])
    recent.keep(guess[handle.run_id])
    node.store.batches.clear()
    return node, handle, first


@pytest.mark.feature("K-04")
@pytest.mark.parametrize("stack", SERVERS, indirect=True)
async def test_a_reply_that_means_nothing_to_a_guess_is_decided_on_what_is_stored(stack: Stack) -> None:
    """P6: a guess that lags behind would call the awaited reply stale, and no version would tell."""
    participant = await stack.participant({"s1": [HELD], "s2": [HELD]})
    node, handle, _ = await behind(stack, participant)
    participant.release()
    await stack.ended([handle])
    costs = {"postgres-rabbitmq": [2, 1, 1], "mariadb-rabbitmq": [7, 6, 5]}
    assert statements(node.store.batches) == costs[stack.name], "loaded once, guessed again"
    assert participant.effects("x") == ["s1", "s2", "s3", "s4"]
    assert await stack.count(t.stale_reply) == 0


@pytest.mark.feature("K-04")
@pytest.mark.parametrize("stack", SERVERS, indirect=True)
async def test_a_move_from_a_wrong_guess_changes_zero_rows_and_ends_the_guessing(stack: Stack) -> None:
    """P1: the version check finds it before anything is written; then everything is loaded for a while."""
    participant = await stack.participant({"s1": [HELD], "s2": [HELD]})
    node, handle, first = await behind(stack, participant)
    participant.broker.publish([OutMessage(replies_channel(stack.namespace), *pack([first]))])

    async def stale() -> bool:
        return await stack.count(t.stale_reply) == 1

    await stack.until(stale)
    participant.release()
    await stack.ended([handle])
    moves = [batch for batch in node.store.batches if batch.changes.moved]
    # PostgreSQL says whose guess was wrong, and the batch ends there; else it is decided again, and moves nothing, but
    # deletes the confirmed row, for which the next one needs no statements
    costs = {"postgres-rabbitmq": [1, 2, 2, 2], "mariadb-rabbitmq": [5, 7, 6]}
    assert statements(moves) == costs[stack.name], "one wrong guess, and no other"
    assert participant.effects("x") == ["s1", "s2", "s3", "s4"]
    assert not participant.doubled()


@pytest.mark.parametrize("stack", SERVERS, indirect=True)
async def test_the_time_that_is_guessed_is_never_behind_the_databases(stack: Stack) -> None:
    """P10: a slow answer to COMMIT is time that the instance has lived: else its first retry came too early."""
    await stack.participant({"s1": [HELD]})
    node = await stack.node(FOUR)
    run = node.database.run

    async def slow(function: Callable[[Connection], T], **how: Any) -> T:
        answer = await run(function, **how)
        await asyncio.sleep(0.3)
        return answer

    node.database.run = slow  # type: ignore[method-assign]
    handle = await node.client.start(FOUR, Order(), id="x")
    assert node.store.recent.take([handle.run_id])[handle.run_id].row.now_ms >= 300

"""A saga that cannot be advanced is set apart with its own incident; the others of its batch commit."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel, Field
from sqlalchemy import Connection, text

from saga.brokers.base import OutMessage
from saga.client import Handle
from saga.coordinator import service
from saga.definition.builder import Saga
from saga.definition.refs import make
from saga.messages import pack
from saga.storage.base import Changes, Loaded, ValueKey
from saga.storage.sqlalchemy import tables as t
from tests.coordinator.harness import HELD, Act, Node, Order, Receipt, Scripted, Stack, refuse
from tests.coordinator.sagas import QUICK, sequence, work

TWO = sequence(2)
COUNT = 8
UNREADABLE = '{"f":99}'
"""A state as a newer release writes it."""


class Strict(BaseModel):
    reference: str = Field(min_length=1)


def strict() -> Saga[Order, None]:
    """The second step wants a reference that is not empty; the first one's contract promises no such thing."""
    owner = work()
    first = owner.contract("s1", Order, Receipt, compensated=True, retry=QUICK)
    second = owner.contract("s2", Strict, Receipt, compensated=True, retry=QUICK)
    saga = Saga("strict", Order).step(first)
    return saga.step(second, make(Strict, reference=first.out.reference))


async def one_batch(
    stack: Stack, saga: Saga[Order, None], script: dict[str, Any]
) -> tuple[Node, Scripted, list[Handle[Any]]]:
    """Start the sagas x0 to x7 and hold back the replies of their first step."""
    participant = await stack.participant({"s1": [HELD], **script})
    node = await stack.node(saga)
    handles = [await node.client.start(saga, Order(), id=f"x{number}") for number in range(COUNT)]
    await participant.wait_held(COUNT)
    return node, participant, handles


async def set_apart(stack: Stack, handle: Handle[Any], error: str) -> None:
    """Check that exactly this saga has an incident and asks for a person, and that its reply is kept beside it (I3)."""
    n = t.incident.c
    incidents = await stack.rows(t.incident.select().with_only_columns(n.run_id, n.kind, n.error))
    assert [tuple(row) for row in incidents] == [(handle.run_id, "poison", error)]
    pending = await stack.rows(t.pending_reply.select())
    assert [row.run_id for row in pending] == [handle.run_id]
    assert await stack.statuses([handle]) == {handle.id: "needs_attention"}


@pytest.mark.feature("K-05")
async def test_a_saga_whose_input_mapping_raises_is_set_apart_in_the_same_commit(stack: Stack) -> None:
    """P9: pure work in memory is caught per saga, so the batch is written once and whole but for this one."""
    empty = Act(data={"output": {"reference": ""}, "undo": None}, held=True)
    node, participant, handles = await one_batch(stack, strict(), {"x3: s1": [empty]})
    participant.release(packed=True)
    await stack.ended([handle for handle in handles if handle.id != "x3"])
    assert node.store.batches[0].size == COUNT
    await set_apart(stack, handles[3], "PayloadInvalid")


@pytest.mark.feature("K-05")
async def test_a_saga_that_cannot_be_decided_is_set_apart_and_goes_on_when_it_is_mended(stack: Stack) -> None:
    """P9, P29: its state is of a newer release; the reply waits beside it and is applied once it can be read."""
    _, participant, handles = await one_batch(stack, TWO, {})
    state = await read_state(stack, handles[5])
    await write(stack, handles[5], UNREADABLE)
    participant.release(packed=True)
    assert set((await stack.ended([handle for handle in handles if handle.id != "x5"])).values()) == {
        "completed"
    }
    await set_apart(stack, handles[5], "ValueError")

    await write(stack, handles[5], state)
    assert await stack.ended([handles[5]], step=20) == {"x5": "completed"}
    assert participant.effects("x5") == ["s1", "s2"]
    await stack.empty(t.pending_reply, step=5)
    [incident] = await stack.rows(t.incident.select())
    assert incident.resolved_at is not None, "what healed is closed"


@pytest.mark.feature("K-05")
async def test_a_saga_that_a_timer_finds_unreadable_asks_for_a_person_until_it_moves_again(
    stack: Stack,
) -> None:
    """I3, I10: the row alone says so; the next transition writes the state's own status and closes the incident."""
    _, participant, handles = await one_batch(stack, TWO, {"s2": [HELD]})
    x4 = handles[4]
    state = await read_state(stack, x4)
    await write(stack, x4, UNREADABLE)

    async def incidents() -> list[tuple[UUID, str, str]]:
        n = t.incident.c
        rows = await stack.rows(
            t.incident.select().with_only_columns(n.run_id, n.kind, n.step).where(n.resolved_at.is_(None))
        )
        return [(row.run_id, row.kind, row.step) for row in rows]

    await stack.until(incidents, step=10)
    assert await incidents() == [(x4.run_id, "poison", "")]
    assert await stack.statuses([x4]) == {"x4": "needs_attention"}
    assert await read_state(stack, x4) == UNREADABLE, "whatever is wrong with it is left as it was found"

    await write(stack, x4, state)
    participant.release()

    async def moved() -> bool:
        return (await stack.statuses([x4])) == {"x4": "running"}

    await stack.until(moved, step=1)
    assert await incidents() == []
    while (await stack.statuses(handles)) != dict.fromkeys([each.id for each in handles], "completed"):
        await participant.wait_held(1)
        participant.release()
        await stack.quiet()
    h = t.history.c
    versions = await stack.rows(
        t.history.select().with_only_columns(h.version).where(h.run_id == x4.run_id).order_by(h.version)
    )
    assert [row.version for row in versions] == list(range(1, len(versions) + 1)), (
        "no line for what never happened"
    )


class Says:
    """Work that writes what it is told to."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes

    def decide(self, loaded: Mapping[UUID, Loaded]) -> Collection[ValueKey]:
        return ()

    def changes(self, values: Mapping[ValueKey, bytes]) -> Changes:
        return self._changes


async def test_what_another_process_moved_or_closed_meanwhile_is_not_marked_as_set_apart(
    stack: Stack,
) -> None:
    """P1: the mark is for the version that could not be advanced."""
    participant = await stack.participant({"open: s2": [HELD]})
    node = await stack.node(TWO)
    closed = await node.client.start(TWO, Order(), id="closed")
    await stack.ended([closed])
    open_ = await node.client.start(TWO, Order(), id="open")
    await participant.wait_held(1)
    for flagged, status in (((open_.run_id, 1), "running"), ((open_.run_id, 2), "needs_attention")):
        changes = Changes(flagged=[flagged, (closed.run_id, 3)])
        await node.store.advance([open_.run_id, closed.run_id], Says(changes), ())
        assert await stack.statuses([open_, closed]) == {"open": status, "closed": "completed"}


@pytest.mark.feature("A-13")
async def test_replies_that_cannot_be_applied_hide_none_behind_them(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P29: the stored replies are gone through page by page, so a first page that stays is no end."""
    monkeypatch.setattr(service, "DUE_BATCH", 2)
    _, participant, handles = await one_batch(stack, TWO, {})
    states = [await read_state(stack, handle) for handle in handles]
    for handle in handles:
        await write(stack, handle, UNREADABLE)
    participant.release()

    async def kept() -> bool:
        return await stack.count(t.pending_reply) == COUNT

    await stack.until(kept)
    p = t.pending_reply.c
    [last] = await stack.rows(t.pending_reply.select().order_by(p.id.desc()).limit(1))
    place = [handle.run_id for handle in handles].index(last.run_id)
    await write(stack, handles[place], states[place])
    assert await stack.ended([handles[place]], step=10) == {handles[place].id: "completed"}
    assert participant.effects(handles[place].id) == ["s1", "s2"]


async def read_state(stack: Stack, handle: Handle[Any]) -> str:
    i = t.instance.c
    [(state,)] = await stack.rows(
        t.instance.select().with_only_columns(i.state).where(i.run_id == handle.run_id)
    )
    return str(state)


async def write(stack: Stack, handle: Handle[Any], state: str) -> None:
    stack.forget()
    table = t.instance
    await stack.run(
        lambda connection: (
            connection.execute(
                table.update().where(table.c.run_id == handle.run_id).values(state=state)
            ).rowcount
        )
    )


@pytest.mark.feature("K-05")
async def test_a_row_that_the_database_refuses_is_found_by_halving_and_set_apart(stack: Stack) -> None:
    """P9: the whole batch fails; halved until the one stands alone, everybody else commits and each acks its own."""
    node, participant, handles = await one_batch(stack, TWO, {})
    await stack.run(forbid)
    participant.release(packed=True)
    states = await stack.ended([handle for handle in handles if handle.id != "x2"])
    assert set(states.values()) == {"completed"}
    assert len(states) == COUNT - 1
    await stack.until(lambda: node.coordinator._arrivals.idle)
    [incident] = await stack.rows(t.incident.select())
    assert (incident.run_id, incident.kind) == (handles[2].run_id, "poison")

    await stack.run(allow)
    assert await stack.ended([handles[2]], step=20) == {"x2": "completed"}
    assert not participant.doubled()


def forbid(connection: Connection) -> None:
    """Let the database refuse every transition of x2."""
    if connection.dialect.name == "sqlite":
        connection.execute(
            text(
                "CREATE TRIGGER forbidden BEFORE UPDATE ON saga_instance WHEN NEW.saga_id = 'x2' AND NEW.version > 1 "
                "BEGIN SELECT RAISE(ABORT, 'forbidden'); END"
            )
        )
    elif connection.dialect.name == "mysql":  # MySQL before 8.0.16 forgets what is to be checked
        connection.execute(
            text(
                "CREATE TRIGGER forbidden BEFORE UPDATE ON saga_instance FOR EACH ROW BEGIN "
                "IF NEW.saga_id = 'x2' AND NEW.version > 1 THEN "
                "SIGNAL SQLSTATE '23000' SET MESSAGE_TEXT = 'forbidden'; END IF; END"
            )
        )
    else:
        connection.execute(
            text("ALTER TABLE saga_instance ADD CONSTRAINT forbidden CHECK (saga_id <> 'x2' OR version = 1)")
        )


def allow(connection: Connection) -> None:
    if connection.dialect.name in ("sqlite", "mysql"):
        connection.execute(text("DROP TRIGGER forbidden"))
    else:
        connection.execute(text("ALTER TABLE saga_instance DROP CONSTRAINT forbidden"))


@pytest.mark.feature("K-05")
async def test_a_nul_byte_in_what_a_participant_says_stops_nobody(stack: Stack) -> None:
    """P9, PG-9: PostgreSQL takes no NUL in text: the refusal's code is data of its own saga only."""
    nul = "no\0way"
    _, participant, handles = await one_batch(
        stack, TWO, {"x1: s2": [refuse(nul)], "x1: undo s1": [refuse(nul), Act()]}
    )
    participant.release(packed=True)
    states = await stack.ended([handle for handle in handles if handle.id != "x1"])
    assert set(states.values()) == {"completed"}
    assert await stack.ended([handles[1]], step=20) == {"x1": "compensated"}
    assert participant.effects("x1") == ["s1", "undo s1"]


@pytest.mark.feature("K-05")
@pytest.mark.parametrize("forged", ["step", "attempt"])
async def test_a_reply_that_no_database_can_keep_is_parked_and_hurts_no_saga(
    stack: Stack, forged: str
) -> None:
    """P9, P14: as a stale reply its row would be refused, and a healthy saga set apart in its place."""
    node, participant, handles = await one_batch(stack, TWO, {})
    command = participant.commands[0]
    wrong = (
        dataclasses.replace(command, step="a\0b")
        if forged == "step"
        else dataclasses.replace(command, attempt=2**40)
    )
    good = participant.reply(participant.commands[1], "done", {"output": {"reference": "r"}, "undo": None})
    body, kind = pack([participant.reply(wrong, "failed", {"error": "E"}), good])
    participant.broker.publish([OutMessage(command.replyto, body, kind)])

    async def parked() -> int:
        return await stack.count(t.parked)

    await stack.until(parked)
    participant.release()
    states = await stack.ended(handles)
    assert set(states.values()) == {"completed"}
    [row] = await stack.rows(t.parked.select())
    assert row.reason == "message_invalid"
    assert await stack.count(t.incident) == 0
    assert node.alive


@pytest.mark.feature("K-05")
async def test_all_that_came_for_a_saga_that_is_set_apart_is_kept_beside_it(stack: Stack) -> None:
    """P9, P29: of two replies in one batch the first could be applied: with the second it is set apart, not lost."""
    held = Act(held=True, data={"output": {"reference": ""}, "undo": None})
    node, participant, handles = await one_batch(stack, strict(), {"x0: s1": [held]})
    participant.held += participant.held[:1]
    participant.release(packed=True)
    await stack.ended(handles[1:])
    pending = await stack.rows(t.pending_reply.select())
    assert [row.run_id for row in pending] == [handles[0].run_id] * 2
    assert [batch.commits for batch in node.store.batches] == [1] * len(node.store.batches)


@pytest.mark.feature("K-05")
async def test_trouble_after_the_commit_sets_nothing_apart(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C8: what is committed stays so; the commands that could not be handed over are in the outbox for the relay."""
    node, participant, handles = await one_batch(stack, TWO, {})
    publish = node.publisher.publish
    failed: list[int] = []

    def fails_once(rows: Any) -> None:
        if not failed:
            failed.append(len(rows))
            raise RuntimeError("after the commit")
        publish(rows)

    monkeypatch.setattr(node.publisher, "publish", fails_once)
    participant.release(packed=True)
    await stack.ended(handles)
    assert failed == [COUNT]
    assert await stack.rows(t.incident.select()) == []
    assert not participant.doubled()

"""Batch handlers: one transaction, one barrier statement, halves after errors (P24, K-05)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from saga.definition.activity import Participant
from saga.outcomes import Refused
from tests.participant.harness import (
    Gate,
    Receipt,
    Rig,
    Statements,
    Transfer,
    like,
    limited,
    make_command,
    move,
    undo_of,
    until,
)


def batched(sizes: list[int], *, undo_sizes: list[int] | None = None) -> Participant:
    """withdraw for many at once: one update and one ledger row for the whole batch; amount 13 is refused."""
    participant = limited()

    @participant.activity(batch=100)
    async def withdraw(transfers: list[Transfer], session: AsyncSession) -> list[Receipt | Refused]:
        sizes.append(len(transfers))
        await move(session, "alice", -sum(each.amount for each in transfers if each.amount != 13))
        return [
            Refused("unlucky") if each.amount == 13 else Receipt(reference=str(each.amount))
            for each in transfers
        ]

    @withdraw.compensation(batch=100)
    async def refund(transfers: list[Transfer], receipts: list[Receipt], session: AsyncSession) -> None:
        (undo_sizes if undo_sizes is not None else []).append(len(transfers))
        assert [receipt.reference for receipt in receipts] == [str(each.amount) for each in transfers]
        await move(session, "alice", sum(each.amount for each in transfers))

    return participant


def of_amount(amount: int) -> bytes:
    return b'{"account":"alice","amount":%d}' % amount


async def test_k05_a_batch_is_one_transaction_and_its_statements_do_not_grow(rig: Rig) -> None:
    """K-05, P24: look, handler, one barrier insert, one COMMIT, for 2 as for 90."""
    sizes: list[int] = []
    await rig.start(batched(sizes))
    assert rig.database is not None
    seen = []
    statements = Statements(rig.database)
    for count in (2, 60):
        await rig.ask(*(make_command(data=of_amount(1)) for _ in range(count)), together=True)
        await rig.settled()
        seen.append([each for each in statements.taken() if each != "BEGIN"])
    assert sizes == [2, 60]
    # a row count does not tell which of several rows went in, and MySQL returns none of them
    savepoint = ["SAVEPOINT"] if rig.database.dialect == "mysql" else []
    assert seen[0] == seen[1] == ["SELECT", "UPDATE", "INSERT", *savepoint, "INSERT", "COMMIT"]
    assert await rig.balance() == 100 - 62


async def test_k05_a_batch_of_undos_does_not_grow_either(rig: Rig) -> None:
    """K-05: forward keys, their rows, the handler, compensate rows: one statement each."""
    undone: list[int] = []
    await rig.start(batched([], undo_sizes=undone))
    assert rig.database is not None
    seen = []
    for count in (2, 40):
        forwards = [make_command(data=of_amount(20 + n)) for n in range(count)]
        await rig.ask(*forwards, together=True)
        await rig.settled()
        statements = Statements(rig.database)
        replies = await rig.ask(*(undo_of(each) for each in forwards), together=True)
        await rig.settled()
        seen.append([each for each in statements.taken() if each != "BEGIN"])
        assert {reply.outcome for reply in replies} == {"done"}
    assert undone == [2, 40]
    savepoints = ["SAVEPOINT"] * 2 if rig.database.dialect == "mysql" else []
    expected = ["INSERT", "SELECT", "UPDATE", "INSERT", "INSERT", "COMMIT", *savepoints]
    assert Counter(seen[0]) == Counter(expected)
    assert set(seen[1]) == set(seen[0])
    assert await rig.balance() == 100


async def test_a_batch_of_undos_tells_the_empty_ones_apart(rig: Rig) -> None:
    """P24, P25: what never ran is empty, what ran is undone, in one transaction."""
    undone: list[int] = []
    service = await rig.start(batched([], undo_sizes=undone))
    ran, never = make_command(data=of_amount(3)), make_command(data=of_amount(4))
    refused = make_command(data=of_amount(13))
    await rig.ask(ran, refused, together=True)
    replies = await rig.ask(undo_of(ran), undo_of(never), undo_of(refused), together=True)
    outcomes = {reply.runid: reply.outcome for reply in replies}
    assert outcomes == {
        ran[0].runid: "done",
        never[0].runid: "nothing_to_undo",
        refused[0].runid: "nothing_to_undo",
    }
    assert undone == [1]
    assert service.counts["empty"] == 2
    (late,) = await rig.ask(like(never))
    assert late.outcome == "refused"
    assert await rig.balance() == 100


async def test_p24_refused_items_have_their_row_in_the_same_transaction(rig: Rig) -> None:
    """P24, P20."""
    sizes: list[int] = []
    await rig.start(batched(sizes))
    good, bad = make_command(data=of_amount(2)), make_command(data=of_amount(13))
    first, second = await rig.ask(good, bad, together=True)
    assert {first.outcome, second.outcome} == {"done", "refused"}
    assert await rig.decisions() == [("forward", "done"), ("forward", "refused")]
    (again,) = await rig.ask(like(bad, resend=True))
    assert again.data == {"code": "unlucky", "details": None}
    assert sizes == [2]


async def test_p24_what_is_there_is_answered_before_the_handler_is_called(rig: Rig) -> None:
    """P22, P24: the keys are looked up once, and only the others are run."""
    sizes: list[int] = []
    await rig.start(batched(sizes))
    known = [make_command(data=of_amount(1)) for _ in range(3)]
    await rig.ask(*known, together=True)
    await rig.settled()
    fresh = [make_command(data=of_amount(2)) for _ in range(2)]
    replies = await rig.ask(*(like(each) for each in known), *fresh, together=True)
    assert {reply.outcome for reply in replies} == {"done"}
    assert sizes == [3, 2]
    assert await rig.balance() == 100 - 3 - 4


async def test_p24_shown_with_two_participants(rig: Rig) -> None:
    """P24: both batches hold the shared command in their handlers; the loser is rolled back and runs without it."""
    participant, gate, sizes = limited(), Gate(), list[int]()

    @participant.activity(batch=10, no_compensation="test")
    async def withdraw(transfers: list[Transfer], session: AsyncSession) -> list[Receipt]:
        await gate()
        sizes.append(len(transfers))
        for each in transfers:
            await move(session, "alice", -each.amount)
        return [Receipt(reference="x") for _ in transfers]

    if rig.database is not None and rig.database.dialect == "sqlite":
        pytest.skip(
            "SQLite's one writer serialises the batches: each looks before its handler, and none can race"
        )
    await rig.start(participant, prefetch=1)
    await rig.start(participant, prefetch=1)
    shared = make_command(data=of_amount(5))
    rig.send(make_command(data=of_amount(1)), shared, together=True)
    rig.send(make_command(data=of_amount(1)), like(shared), make_command(data=of_amount(1)), together=True)
    await gate.reached(2)
    gate.open()
    replies = await rig.receive(5)
    assert {reply.outcome for reply in replies} == {"done"}
    assert await rig.balance() == 100 - 5 - 3
    assert sorted(sizes) in ([1, 2, 3], [2, 2, 3])


@pytest.mark.parametrize("how", ["raise", "short", "no list", "timeout"])
async def test_p24_a_bad_call_is_halved_down_to_the_one_that_is_bad(rig: Rig, how: str) -> None:
    """P24: exception, wrong length and timeout alike; the neighbours commit."""
    participant, sizes = limited(1.0 if how == "timeout" else 30), list[int]()

    @participant.activity(batch=10, no_compensation="test")
    async def withdraw(transfers: list[Transfer], session: AsyncSession) -> list[Receipt]:
        sizes.append(len(transfers))
        for each in transfers:
            await move(session, "alice", -each.amount)
        if any(each.amount == 13 for each in transfers):
            if how == "raise":
                raise ValueError
            if how == "timeout":
                await asyncio.Event().wait()
            return [] if how == "short" else None  # type: ignore[return-value]
        return [Receipt(reference="x") for _ in transfers]

    await rig.start(participant)
    amounts = [1, 1, 13, 1, 1, 1, 1, 1]
    replies = await rig.ask(*(make_command(data=of_amount(each)) for each in amounts), together=True)
    assert sorted(reply.outcome for reply in replies) == ["done"] * 7 + ["failed"]
    assert sizes == [8, 4, 2, 2, 1, 1, 4]
    assert await rig.balance() == 100 - 7


async def test_p24_copies_in_one_batch_are_joined_before_the_handler(rig: Rig) -> None:
    """P24, P30."""
    sizes: list[int] = []
    await rig.start(batched(sizes))
    forward = make_command(data=of_amount(2))
    rig.send(forward, like(forward), like(forward, resend=True), together=True)
    (reply,) = await rig.receive()
    assert reply.outcome == "done"
    assert await rig.no_reply()
    assert sizes == [1]
    assert rig.unacked() == 0


async def test_batches_form_from_what_is_there_and_wait_for_no_company(rig: Rig) -> None:
    """K-05: the first runs alone at once; what arrives meanwhile makes the next batch."""
    participant, gate, sizes = limited(), Gate(), list[int]()

    @participant.activity(batch=50, no_compensation="test")
    async def withdraw(transfers: list[Transfer]) -> list[Receipt]:
        sizes.append(len(transfers))
        await gate()
        return [Receipt(reference="x") for _ in transfers]

    await rig.start(participant)
    for reached in (1, 2):
        rig.send(make_command())
        await gate.reached(reached)
    rig.send(*(make_command() for _ in range(30)))
    await until(lambda: rig.services[0]._scheduler.waiting == 30)
    gate.open()
    await rig.receive(32)
    assert sizes == [1, 1, 30]


async def test_a_batch_handler_works_without_a_database(stateless: Rig) -> None:
    """The same call, halved the same way."""
    participant, sizes = limited(), list[int]()

    @participant.activity(batch=10, no_compensation="test")
    async def notify(transfers: Sequence[Transfer]) -> list[Receipt | Refused]:
        sizes.append(len(transfers))
        if any(each.amount == 7 for each in transfers):
            raise ValueError
        return [Refused("x") if each.amount == 13 else Receipt(reference="x") for each in transfers]

    await stateless.start(participant)
    amounts = [1, 13, 7, 1]
    replies = await stateless.ask(
        *(make_command("notify", data=of_amount(each)) for each in amounts), together=True
    )
    assert sorted(reply.outcome for reply in replies) == ["done", "done", "failed", "refused"]
    assert sizes == [4, 2, 2, 1, 1]

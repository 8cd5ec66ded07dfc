"""The barrier on each database: one effect, stored replies, empty and hanging (D-10, P7, P20 to P22, P25)."""

from __future__ import annotations

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from saga.definition.activity import Participant
from saga.errors import SessionIsManaged
from saga.outcomes import Refused, Result
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


def accounts(calls: list[str] | None = None) -> Participant:
    """withdraw and its undo, as in the money transfer; `calls` notes what ran."""
    participant = limited()
    noted = calls if calls is not None else []

    @participant.activity
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        noted.append("withdraw")
        await move(session, transfer.account, -transfer.amount)
        return Receipt(reference=f"r-{len(noted)}")

    @withdraw.compensation
    async def refund(transfer: Transfer, receipt: Receipt, session: AsyncSession) -> None:
        noted.append(f"refund {receipt.reference}")
        await move(session, transfer.account, transfer.amount)

    return participant


@pytest.mark.feature("D-10", acceptance=True)
async def test_compensate_forward_forward_leaves_the_balance_alone_and_three_copies_have_one_effect(
    rig: Rig,
) -> None:
    """D-10's acceptance check; the three copies are in three processes, where none can join another (P30)."""
    service = await rig.start(accounts())
    forward = make_command()

    (undone,) = await rig.ask(undo_of(forward))
    (first,) = await rig.ask(forward)
    (second,) = await rig.ask(like(forward, resend=True))

    assert undone.outcome == "nothing_to_undo"
    assert [first.outcome, second.outcome] == ["refused", "refused"]
    assert await rig.balance() == 100
    assert (service.counts["empty"], service.counts["hanging"]) == (1, 2)

    await service.stop()
    participant, gate = limited(), Gate()

    @participant.activity(no_compensation="test")
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        await gate()
        await move(session, transfer.account, -transfer.amount)
        return Receipt(reference=f"r-{gate.arrived}")

    for _ in range(3):
        await rig.start(participant, prefetch=1)
    other = make_command()
    rig.send(other, like(other), like(other))
    await gate.reached(3)
    gate.open()
    replies = await rig.receive(3)

    assert [reply.outcome for reply in replies] == ["done"] * 3
    assert len({str(reply.data) for reply in replies}) == 1
    assert await rig.balance() == 90


async def test_a_fresh_command_is_its_statements_one_insert_and_a_commit(rig: Rig) -> None:
    """K-05: nothing between BEGIN and COMMIT but the handler's own and the barrier's insert."""
    await rig.start(accounts())
    await rig.ask(make_command())
    assert rig.database is not None
    statements = Statements(rig.database)
    await rig.ask(make_command())
    await rig.settled()
    assert [each for each in statements.taken() if each != "BEGIN"] == [
        "UPDATE",
        "INSERT",
        "INSERT",
        "COMMIT",
    ]


async def test_a_duplicate_gets_the_stored_reply_and_runs_no_handler(rig: Rig) -> None:
    """D-10."""
    calls: list[str] = []
    service = await rig.start(accounts(calls))
    forward = make_command()
    (first,) = await rig.ask(forward)
    await rig.settled()
    (again,) = await rig.ask(like(forward, resend=True))
    assert again.data == first.data
    assert again.commandid == first.commandid
    assert again.id != first.id
    assert calls == ["withdraw"]
    assert service.counts["duplicates"] == 1


async def test_p22_an_unmarked_copy_runs_and_is_rolled_back_by_the_conflict(rig: Rig) -> None:
    """P22: a fresh-looking copy may run the handler; judged by row count it leaves no effect."""
    calls: list[str] = []
    await rig.start(accounts(calls))
    forward = make_command()
    (first,) = await rig.ask(forward)
    await rig.settled()
    (again,) = await rig.ask(like(forward))
    assert again.data == first.data
    assert calls == ["withdraw", "withdraw"]
    assert await rig.moves() == [-10]


@pytest.mark.parametrize("mark", ["resend", "retry", "redelivered"])
async def test_p22_a_marked_copy_looks_before_it_runs(rig: Rig, mark: str) -> None:
    """P22: a resend, a retry and a redelivery call no handler if the row is there."""
    calls: list[str] = []
    await rig.start(accounts(calls))
    forward = make_command()
    await rig.ask(forward)
    await rig.settled()
    if mark == "redelivered":
        await redeliver(rig, like(forward))
    else:
        rig.send(like(forward, resend=True) if mark == "resend" else like(forward, attempt=2))
    (reply,) = await rig.receive()
    assert reply.outcome == "done"
    assert reply.attempt == (2 if mark == "retry" else 1)
    assert calls == ["withdraw"]


async def redeliver(rig: Rig, command: object, times: int = 1) -> None:
    """Have a command delivered and given back, so that the next delivery is marked by the broker."""
    stopped = rig.services.pop()
    await stopped.stop()
    rig.send(command)  # type: ignore[arg-type]
    for _ in range(times):
        consumer = await rig.broker().consume("saga.default.commands.accounts", prefetch=1)
        await consumer.receive()
        await consumer.close()
    await rig.start(*_participants_of(stopped))


def _participants_of(service: object) -> list[Participant]:
    tables = service._tables  # type: ignore[attr-defined]
    return list(
        {
            id(s.activity.participant): s.activity.participant for t in tables.values() for s in t.values()
        }.values()
    )


async def test_p22_no_failure_is_answered_before_the_look(rig: Rig) -> None:
    """P22: this attempt fails, but the effect is there from another one: its reply is the answer."""
    participant, gate, calls = limited(), Gate(), 0

    @participant.activity(no_compensation="test")
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        nonlocal calls
        calls += 1
        if calls == 1:
            await gate()
            raise ConnectionError("the card service is gone")
        await move(session, transfer.account, -transfer.amount)
        return Receipt(reference="second")

    await rig.start(participant, prefetch=1)
    await rig.start(participant, prefetch=1)
    forward = make_command()
    rig.send(forward)
    await gate.reached()
    (second,) = await rig.ask(like(forward))
    gate.open()
    (first,) = await rig.receive()
    assert [first.outcome, second.outcome] == ["done", "done"]
    assert first.data == second.data


async def test_copies_that_race_in_two_processes_have_one_effect(rig: Rig) -> None:
    """D-10, P22: each service has a copy in its handler when the first commits; the other is rolled back."""
    participant, gate = limited(), Gate()

    @participant.activity(no_compensation="test")
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        await gate()
        await move(session, transfer.account, -transfer.amount)
        return Receipt(reference="one")

    await rig.start(participant, prefetch=1)
    await rig.start(participant, prefetch=1)
    forward = make_command()
    rig.send(forward, like(forward))
    await gate.reached(2)
    gate.open()
    replies = await rig.receive(2)
    assert [reply.outcome for reply in replies] == ["done", "done"]
    assert replies[0].data == replies[1].data
    assert await rig.moves() == [-10]


@pytest.mark.feature("D-10")
async def test_p7_every_late_copy_is_refused(rig: Rig) -> None:
    """P7: not only the first one that comes after the undo."""
    await rig.start(accounts())
    forward = make_command()
    await rig.ask(undo_of(forward))
    for _ in range(3):
        (reply,) = await rig.ask(like(forward))
        assert reply.outcome == "refused"
        assert reply.data == {"code": "cancelled", "details": None}
        await rig.settled()
    assert await rig.moves() == []


async def test_p20_a_final_refusal_keeps_its_row_and_nothing_else(rig: Rig) -> None:
    """P20: the business's last word; what the handler wrote is rolled back, a copy gets the stored refusal."""
    participant, calls = limited(), 0

    @participant.activity
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        nonlocal calls
        calls += 1
        await move(session, transfer.account, -transfer.amount)
        raise Refused("insufficient", {"missing": 5})

    @withdraw.compensation
    async def refund(transfer: Transfer, session: AsyncSession) -> None:
        raise AssertionError("there is nothing to undo")

    service = await rig.start(participant)
    forward = make_command()
    (first,) = await rig.ask(forward)
    (again,) = await rig.ask(like(forward, resend=True))
    (undone,) = await rig.ask(undo_of(forward))
    assert first.data == again.data == {"code": "insufficient", "details": {"missing": 5}}
    assert undone.outcome == "nothing_to_undo"
    assert calls == 1
    assert await rig.moves() == []
    assert await rig.decisions() == [("compensate", "nothing_to_undo"), ("forward", "refused")]
    assert service.counts["empty"] == 1


async def test_p20_a_refusal_that_is_not_final_leaves_no_row(rig: Rig) -> None:
    """P20: a step after the pivot is asked again and may then succeed."""
    participant, answers = limited(), iter([False, True])

    @participant.activity(no_compensation="test")
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        await move(session, transfer.account, -transfer.amount)
        if not next(answers):
            raise Refused("closed")
        return Receipt(reference="open")

    await rig.start(participant)
    forward = make_command(final=False)
    (first,) = await rig.ask(forward)
    assert await rig.decisions() == []
    (second,) = await rig.ask(like(forward, attempt=2))
    assert [first.outcome, second.outcome] == ["refused", "done"]
    assert await rig.moves() == [-10]


async def test_p20_a_refused_undo_leaves_no_row(rig: Rig) -> None:
    """P20: the undo is tried again, not answered from a stored refusal."""
    participant, answers = limited(), iter([False, True])

    @participant.activity
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        await move(session, transfer.account, -transfer.amount)
        return Receipt(reference="r")

    @withdraw.compensation
    async def refund(transfer: Transfer, session: AsyncSession) -> None:
        await move(session, transfer.account, transfer.amount)
        if not next(answers):
            raise Refused("frozen")

    await rig.start(participant)
    forward = make_command()
    await rig.ask(forward)
    (refused,) = await rig.ask(undo_of(forward))
    assert refused.outcome == "refused"
    assert await rig.moves() == [-10]
    (undone,) = await rig.ask(like(undo_of(forward), attempt=2))
    assert undone.outcome == "done"
    assert await rig.moves() == [-10, 10]


async def test_p21_an_undo_reads_its_past_from_the_row_not_from_the_command(rig: Rig) -> None:
    """P21: the command says null, as after a lost reply; the forward row knows better."""
    participant, seen = limited(), list[object]()

    @participant.activity
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Result[Receipt, dict[str, int]]:
        await move(session, transfer.account, -transfer.amount)
        return Result(Receipt(reference="r-7"), {"before": 100})

    @withdraw.compensation
    async def refund(
        transfer: Transfer, receipt: Receipt, before: dict[str, int], session: AsyncSession
    ) -> None:
        seen.append((receipt.reference, before))
        await move(session, transfer.account, transfer.amount)

    await rig.start(participant)
    forward = make_command()
    (done,) = await rig.ask(forward)
    assert done.data == {"output": {"reference": "r-7"}, "undo": {"before": 100}}
    (undone,) = await rig.ask(undo_of(forward))
    assert (undone.outcome, undone.data) == ("done", None)
    assert seen == [("r-7", {"before": 100})]
    assert await rig.balance() == 100


async def test_a_duplicate_undo_gets_the_stored_reply(rig: Rig) -> None:
    """D-10."""
    calls: list[str] = []
    await rig.start(accounts(calls))
    forward = make_command()
    await rig.ask(forward)
    await rig.ask(undo_of(forward))
    await rig.settled()
    (again,) = await rig.ask(like(undo_of(forward)))
    assert again.outcome == "done"
    assert calls == ["withdraw", "refund r-1"]
    assert await rig.balance() == 100


async def test_p25_an_undo_names_its_forward_and_a_cancelled_one_is_empty_on_every_copy(rig: Rig) -> None:
    """P25: a second round of the undo finds the forward key `cancelled` by the first and undoes nothing."""
    calls: list[str] = []
    service = await rig.start(accounts(calls))
    forward = make_command()
    replies = [
        *await rig.ask(undo_of(forward)),
        *await rig.ask(like(undo_of(forward), resend=True)),
        *await rig.ask(undo_of(forward, round=1)),
    ]
    assert [reply.outcome for reply in replies] == ["nothing_to_undo"] * 3
    assert calls == []
    assert service.counts["empty"] == 2
    assert service.counts["duplicates"] == 1
    rounds = make_command(round=3)
    await rig.ask(rounds)
    (undone,) = await rig.ask(undo_of(rounds, round=1))
    assert undone.outcome == "done"


@pytest.mark.parametrize("ran", [True, False])
async def test_a_fence_tells_whether_the_action_had_run_and_closes_it_if_not(rig: Rig, ran: bool) -> None:
    """Point 4 of the pivot in doubt: after the answer it never goes both ways (I5)."""
    await rig.start(accounts())
    forward = make_command()
    if ran:
        await rig.ask(forward)
    fence = make_command(direction="fence", run_id=forward[0].runid, data=b"null", step="withdraw")
    (answer,) = await rig.ask(fence)
    (late,) = await rig.ask(like(forward, resend=True))
    if ran:
        assert (answer.outcome, answer.data) == ("had_run", {"output": {"reference": "r-1"}, "undo": None})
        assert late.outcome == "done"
    else:
        assert (answer.outcome, late.outcome) == ("nothing_to_undo", "refused")
    assert await rig.moves() == ([-10] if ran else [])


@pytest.mark.feature("E-06")
@pytest.mark.parametrize("ran", [True, False])
async def test_p26_an_undo_settled_by_hand_is_closed_or_told_to_have_run(rig: Rig, ran: bool) -> None:
    """P26: an undo jammed on its way and released after it was closed moves nothing."""
    calls: list[str] = []
    await rig.start(accounts(calls))
    forward = make_command()
    await rig.ask(forward)
    if ran:
        await rig.ask(undo_of(forward))
    close = make_command(direction="close", run_id=forward[0].runid, data=b"null", step="withdraw")
    (answer,) = await rig.ask(close)
    (again,) = await rig.ask(like(close, resend=True))
    (late,) = await rig.ask(like(undo_of(forward), resend=True))
    assert answer.outcome == again.outcome == ("had_run" if ran else "nothing_to_undo")
    assert late.outcome == ("done" if ran else "refused")
    assert calls == (["withdraw", "refund r-1"] if ran else ["withdraw"])
    assert await rig.balance() == (100 if ran else 90)


@pytest.mark.parametrize("how", ["commit", "rollback", "close", "begin", "connection", "context"])
async def test_p23_the_session_belongs_to_us(rig: Rig, how: str) -> None:
    """P23: ending the transaction raises and says why; nothing of the attempt stays."""
    participant = limited()

    @participant.activity(no_compensation="test", non_retryable=[SessionIsManaged])
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        await move(session, transfer.account, -transfer.amount)
        if how == "connection":
            await (await session.connection()).commit()
        elif how == "context":
            async with session:
                pass
        elif how == "begin":
            await session.begin()
        else:
            await getattr(session, how)()
        return Receipt(reference="never")

    await rig.start(participant)
    (reply,) = await rig.ask(make_command())
    assert reply.outcome == "failed"
    assert reply.data["error"] == "SessionIsManaged"
    assert "begin_nested" in reply.data["traceback"] or "not for a handler" in reply.data["traceback"]
    assert await rig.moves() == []


async def test_p23_savepoints_are_allowed(rig: Rig) -> None:
    """P23."""
    participant = limited()

    @participant.activity(no_compensation="test")
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        await move(session, transfer.account, -1)
        savepoint = await session.begin_nested()
        await move(session, transfer.account, -transfer.amount)
        await savepoint.rollback()
        return Receipt(reference="part")

    await rig.start(participant)
    (reply,) = await rig.ask(make_command())
    assert reply.outcome == "done"
    assert await rig.moves() == [-1]


async def test_a_handler_without_a_session_still_has_its_row(rig: Rig) -> None:
    """D-10: in an app with a database every activity has a barrier."""
    participant, calls = limited(), list[str]()

    @participant.activity
    async def withdraw(transfer: Transfer) -> Receipt:
        calls.append("forward")
        return Receipt(reference="x")

    @withdraw.compensation
    async def refund(transfer: Transfer) -> None:
        calls.append("undo")

    await rig.start(participant)
    forward = make_command()
    await rig.ask(forward)
    await rig.ask(like(forward, resend=True))
    await rig.ask(undo_of(forward))
    await rig.ask(like(undo_of(forward), resend=True))
    assert calls == ["forward", "undo"]
    assert await rig.decisions() == [("compensate", "done"), ("forward", "done")]


async def test_p30_a_copy_of_a_running_command_joins_it(rig: Rig) -> None:
    """P30, F-07: one handler run, one reply, both deliveries acked."""
    participant, gate = limited(), Gate()

    @participant.activity(no_compensation="test")
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        await gate()
        await move(session, transfer.account, -transfer.amount)
        return Receipt(reference="x")

    service = await rig.start(participant)
    forward = make_command()
    rig.send(forward)
    await gate.reached()
    rig.send(like(forward, resend=True))
    await until(lambda: service.counts["joined"] == 1)
    gate.open()
    (reply,) = await rig.receive()
    assert reply.outcome == "done"
    assert await rig.no_reply()
    assert gate.arrived == 1
    assert rig.unacked() == 0

"""Effects outside the database: the attempted row, the operation key, inquiries, and what comes late (D-11, P27)."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession

from saga.clock import SystemClock
from saga.compensation.kinds import StepKind
from saga.definition.activity import Participant
from saga.definition.builder import Saga
from saga.errors import DefinitionError
from saga.messages import Command, command_id
from saga.outcomes import ActivityContext, Inquiry
from saga.participant.served import context
from tests.participant.harness import (
    Gate,
    Receipt,
    Rig,
    Transfer,
    like,
    limited,
    make_command,
    undo_of,
    until,
)
from tests.participant.provider import LineCut, Provider, payments

pytestmark = pytest.mark.feature("D-11")

Sending = tuple[Command, bytes]


def fence_of(given: Sending, direction: str = "fence") -> Sending:
    """The command that closes `given`, or its undo."""
    forward = given[0]
    return make_command(
        forward.activity,
        direction=direction,
        run_id=forward.runid,
        step=forward.step,
        final=False,
        data=b'{"input":' + given[1] + b"}" if direction == "fence" else b"null",
    )


def again(given: Sending) -> Sending:
    """The next attempt."""
    return like(given, attempt=given[0].attempt + 1)


async def left_in_doubt(rig: Rig, provider: Provider, **options: Any) -> Sending:
    """A charge was made, and the line was cut: the attempt failed, nobody knows of its outcome."""
    await rig.start(payments(provider, **options))
    provider.cuts = 1
    charge = make_command("charge")
    (reply,) = await rig.ask(charge)
    assert (reply.outcome, reply.data["error"]) == ("failed", "LineCut")
    return charge


# --- the action -------------------------------------------------------------------------------


async def test_the_attempt_is_on_record_before_the_call_and_its_outcome_after_it(rig: Rig) -> None:
    provider = Provider()
    provider.gate = Gate()
    await rig.start(payments(provider))
    charge = make_command("charge")
    rig.send(charge)
    await provider.gate.reached()

    assert await rig.decisions() == [("forward", "attempted")]
    provider.gate.open()
    (reply,) = await rig.receive()

    assert reply.data == {"output": {"reference": f"charge of {charge[0].commandid}"}, "undo": None}
    assert await rig.decisions() == [("forward", "done")]
    (copy,) = await rig.ask(like(charge, resend=True))
    assert copy.data == reply.data
    assert provider.calls["charge"] == 1


async def test_what_became_of_a_cut_line_is_inquired_before_anything_is_called_again(rig: Rig) -> None:
    provider = Provider()
    charge = await left_in_doubt(rig, provider)
    assert await rig.decisions() == [("forward", "attempted")]

    (reply,) = await rig.ask(again(charge))

    assert (reply.outcome, provider.calls["inquiry"], provider.calls["charge"]) == ("done", 1, 1)
    assert reply.data["output"] == {"reference": f"charge of {charge[0].commandid}"}
    assert await rig.decisions() == [("forward", "done")]


async def test_what_had_not_been_done_is_called_again_under_the_same_key(rig: Rig) -> None:
    provider = Provider()
    charge = await left_in_doubt(rig, provider)
    provider.charges.clear()

    (reply,) = await rig.ask(again(charge))

    assert (reply.outcome, provider.calls["charge"]) == ("done", 2)
    assert list(provider.charges) == [charge[0].commandid]


async def test_while_nobody_can_tell_nothing_is_called_again(rig: Rig) -> None:
    provider = Provider()
    charge = await left_in_doubt(rig, provider)
    provider.knows = False

    (reply,) = await rig.ask(again(charge))

    assert (reply.outcome, reply.data["error"], reply.data["retryable"]) == (
        "failed",
        "outcome_unknown",
        True,
    )
    assert provider.calls["charge"] == 1
    assert await rig.decisions() == [("forward", "attempted")]


async def test_without_an_inquiry_the_provider_is_called_again_under_the_same_key(rig: Rig) -> None:
    provider = Provider()
    charge = await left_in_doubt(rig, provider, inquires=False)
    (reply,) = await rig.ask(again(charge))
    assert (reply.outcome, provider.calls["charge"], provider.standing) == ("done", 2, 10)


@pytest.mark.parametrize("broken", ["raises", "refuses", "nonsense"])
async def test_an_inquiry_that_gives_no_answer_leaves_the_outcome_unknown(rig: Rig, broken: str) -> None:
    provider = Provider()
    participant = payments(provider, inquires=False)

    @participant.activities["charge"].inquiry
    async def look(transfer: Transfer, context: ActivityContext) -> Receipt | Inquiry:
        if broken == "nonsense":
            return None  # type: ignore[return-value]  # what falls off its end must not count as done
        if broken == "refuses":
            provider.refuses = True
            await provider.charge("other", 1)
        raise LineCut

    await rig.start(participant)
    provider.cuts = 1
    charge = make_command("charge")
    await rig.ask(charge)
    (reply,) = await rig.ask(again(charge))

    assert reply.outcome == "failed"
    assert await rig.decisions() == [("forward", "attempted")]
    assert provider.standing == 10


async def test_a_refusal_of_the_provider_is_final_and_leaves_nothing_to_undo(rig: Rig) -> None:
    provider = Provider()
    provider.refuses = True
    await rig.start(payments(provider))
    charge = make_command("charge")
    (reply,) = await rig.ask(charge)
    assert (reply.outcome, reply.data["code"]) == ("refused", "declined")
    (undone,) = await rig.ask(undo_of(charge))
    assert undone.outcome == "nothing_to_undo"
    assert provider.calls["refund"] == 0


async def test_a_refusal_that_is_not_final_is_asked_for_again(rig: Rig) -> None:
    """P20: past the pivot."""
    provider = Provider()
    provider.refuses = True
    await rig.start(payments(provider, inquires=False))
    charge = make_command("charge", final=False)
    assert (await rig.ask(charge))[0].outcome == "refused"
    provider.refuses = False
    assert (await rig.ask(again(charge)))[0].outcome == "done"


async def test_a_call_whose_time_passed_while_its_row_was_written_is_not_made(rig: Rig) -> None:
    """P27: the deadline is looked at once more, directly before the handler."""

    class Clock(SystemClock):
        late = 0.0

        def monotonic(self) -> float:
            return super().monotonic() + self.late

    clock, provider = Clock(), Provider()
    await rig.start(payments(provider), clock=clock)
    assert rig.database is not None

    @event.listens_for(rig.database.engine.sync_engine, "before_cursor_execute")
    def stop_here(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT") and "INTO saga_barrier" in statement:
            clock.late = 3600.0  # as if the process had been stopped

    charge = make_command("charge", remainingms=60_000)
    (reply,) = await rig.ask(charge)

    assert (reply.outcome, reply.data["error"]) == ("failed", "deadline")
    assert await rig.decisions() == [("forward", "attempted")]
    assert not provider.calls["charge"]


# --- the undo ---------------------------------------------------------------------------------


async def test_the_undo_of_a_call_in_doubt_runs_without_output_and_names_the_actions_key(rig: Rig) -> None:
    provider = Provider()
    charge = await left_in_doubt(rig, provider)

    (undone,) = await rig.ask(undo_of(charge))

    assert undone.outcome == "done"
    assert (provider.calls["refund without"], provider.standing) == (1, 0)
    assert await rig.decisions() == [("compensate", "done"), ("forward", "closed")]
    (copy,) = await rig.ask(again(charge))
    assert (copy.outcome, copy.data["code"]) == ("refused", "cancelled")
    assert provider.calls["charge"] == 1


async def test_the_undo_of_a_finished_call_gets_its_output_and_runs_once(rig: Rig) -> None:
    provider = Provider()
    await rig.start(payments(provider))
    charge = make_command("charge")
    await rig.ask(charge)
    undo = undo_of(charge)
    assert [reply.outcome for reply in await rig.ask(undo)] == ["done"]
    assert [reply.outcome for reply in await rig.ask(like(undo, resend=True))] == ["done"]
    assert (provider.calls["refund with receipt"], provider.calls["refund"]) == (1, 1)


async def test_an_undo_that_comes_first_calls_nothing_and_keeps_the_action_from_running(rig: Rig) -> None:
    provider = Provider()
    await rig.start(payments(provider))
    charge = make_command("charge")
    (undone,) = await rig.ask(undo_of(charge))
    (late,) = await rig.ask(charge)
    assert (undone.outcome, late.outcome) == ("nothing_to_undo", "refused")
    assert not provider.calls


async def test_an_undo_that_failed_is_called_again_under_its_key(rig: Rig) -> None:
    provider = Provider()
    charge = await left_in_doubt(rig, provider)
    undo = undo_of(charge)
    provider.cuts = 1
    assert (await rig.ask(undo))[0].outcome == "failed"
    assert (await rig.ask(again(undo)))[0].outcome == "done"
    assert list(provider.refunds) == [undo[0].commandid]
    assert provider.standing == 0


# --- what comes late --------------------------------------------------------------------------


async def test_a_call_that_ends_after_its_undo_is_told_as_late_and_undone_by_the_next_round(rig: Rig) -> None:
    """P27: the provider knows the first undo as "nothing to refund", so only another key can help."""
    provider = Provider()
    provider.gate = Gate()
    service = await rig.start(payments(provider))
    charge = make_command("charge")
    rig.send(charge)
    await provider.gate.reached()
    first = undo_of(charge)
    (undone,) = await rig.ask(first)
    assert (undone.outcome, provider.refunds) == ("done", {first[0].commandid: "nothing"})

    provider.gate.open()
    (told,) = await rig.receive()

    assert (told.direction, told.outcome) == ("forward", "late_effect")
    assert told.data["output"] == {"reference": f"charge of {charge[0].commandid}"}
    assert service.counts["late_effects"] == 1
    assert [reply.outcome for reply in await rig.ask(like(charge, resend=True))] == ["late_effect"]
    assert provider.standing == 10
    second = undo_of(charge, round=1)
    assert [reply.outcome for reply in await rig.ask(second)] == ["done"]
    assert (provider.calls["refund with receipt"], provider.standing) == (1, 0)
    assert [reply.outcome for reply in await rig.ask(like(second, resend=True))] == ["done"]
    assert provider.calls["charge"] == 1


async def test_a_first_undo_that_finds_the_late_effect_leaves_it_to_the_next_round(rig: Rig) -> None:
    provider = Provider()
    provider.gate = Gate()
    await rig.start(payments(provider))
    charge = make_command("charge")
    rig.send(charge)
    await provider.gate.reached()
    provider.cuts = 1
    undo = undo_of(charge)
    assert [reply.outcome for reply in await rig.ask(undo)] == ["failed"]
    provider.gate.open()
    assert [reply.outcome for reply in await rig.receive()] == ["late_effect"]

    (told,) = await rig.ask(again(undo))

    assert (told.direction, told.outcome) == ("compensate", "late_effect")
    assert [reply.outcome for reply in await rig.ask(undo_of(charge, round=1))] == ["done"]
    assert provider.standing == 0


# --- fences -----------------------------------------------------------------------------------


@pytest.mark.feature("E-05")
@pytest.mark.parametrize(
    ("charged", "outcome", "row"), [(True, "had_run", "done"), (False, "nothing_to_undo", "closed")]
)
async def test_a_fence_asks_the_inquiry_what_became_of_a_call_in_doubt(
    rig: Rig, charged: bool, outcome: str, row: str
) -> None:
    provider = Provider()
    charge = await left_in_doubt(rig, provider)
    if not charged:
        provider.charges.clear()

    (reply,) = await rig.ask(fence_of(charge))

    assert reply.outcome == outcome
    assert await rig.decisions() == [("forward", row)]
    if charged:
        assert reply.data["output"] == {"reference": f"charge of {charge[0].commandid}"}
    (copy,) = await rig.ask(again(charge))
    assert copy.outcome == ("done" if charged else "refused")
    assert provider.calls["charge"] == 1


@pytest.mark.feature("E-05")
@pytest.mark.parametrize("inquires", [True, False])
async def test_a_fence_that_cannot_tell_says_so(rig: Rig, inquires: bool) -> None:
    provider = Provider()
    charge = await left_in_doubt(rig, provider, inquires=inquires)
    provider.knows = False
    (reply,) = await rig.ask(fence_of(charge))
    assert (reply.outcome, reply.data["error"]) == ("failed", "outcome_unknown")
    assert await rig.decisions() == [("forward", "attempted")]


async def test_a_fence_that_comes_first_keeps_the_action_from_running(rig: Rig) -> None:
    provider = Provider()
    await rig.start(payments(provider))
    charge = make_command("charge")
    assert (await rig.ask(fence_of(charge)))[0].outcome == "nothing_to_undo"
    assert (await rig.ask(charge))[0].outcome == "refused"
    assert not provider.calls


async def test_a_pivot_that_lands_after_its_inquiry_said_no_is_told_as_late(rig: Rig) -> None:
    provider = Provider()
    provider.gate = Gate()
    await rig.start(payments(provider))
    charge = make_command("charge")
    rig.send(charge)
    await provider.gate.reached()
    assert (await rig.ask(fence_of(charge)))[0].outcome == "nothing_to_undo"
    provider.gate.open()
    (told,) = await rig.receive()
    assert (told.direction, told.outcome) == ("forward", "late_effect")


async def test_an_undo_in_flight_that_a_person_settled_is_told_as_having_run(rig: Rig) -> None:
    """P26."""
    provider = Provider()
    charge = await left_in_doubt(rig, provider)
    gate = provider.refund_gate = Gate()
    undo = undo_of(charge)
    rig.send(undo)
    await gate.reached()
    (closed,) = await rig.ask(fence_of(charge, "close"))
    assert closed.outcome == "had_run"
    gate.open()
    await rig.receive()
    assert (await rig.ask(like(undo, resend=True)))[0].outcome == "refused"
    await until(lambda: provider.calls["refund"] == 1)


async def test_an_undo_that_was_never_begun_is_closed_for_good(rig: Rig) -> None:
    provider = Provider()
    charge = await left_in_doubt(rig, provider)
    assert (await rig.ask(fence_of(charge, "close")))[0].outcome == "nothing_to_undo"
    assert (await rig.ask(undo_of(charge)))[0].outcome == "refused"
    assert not provider.calls["refund"]


# --- declarations -----------------------------------------------------------------------------


@pytest.mark.stack("pure")
def test_an_activity_outside_the_database_has_no_part_in_its_transaction() -> None:
    participant = limited()
    with pytest.raises(DefinitionError, match="cannot have a session"):

        @participant.activity(at_least_once=True)
        async def charge(transfer: Transfer, session: AsyncSession) -> Receipt:
            raise NotImplementedError


@pytest.mark.stack("pure")
def test_an_undo_outside_the_database_must_do_without_the_output() -> None:
    participant = limited()

    @participant.activity(at_least_once=True)
    async def charge(transfer: Transfer) -> Receipt:
        raise NotImplementedError

    with pytest.raises(DefinitionError, match="must accept None"):

        @charge.compensation
        async def refund(transfer: Transfer, receipt: Receipt) -> None:
            raise NotImplementedError


@pytest.mark.stack("pure")
def test_an_inquiry_belongs_to_an_effect_outside_the_database_and_takes_its_input() -> None:
    participant = limited()

    @participant.activity(no_compensation="test")
    async def inside(transfer: Transfer, session: AsyncSession) -> Receipt:
        raise NotImplementedError

    @participant.activity(at_least_once=True, no_compensation="test")
    async def outside(transfer: Transfer) -> Receipt:
        raise NotImplementedError

    async def look(transfer: Transfer) -> Receipt | Inquiry:
        raise NotImplementedError

    async def look_elsewhere(receipt: Receipt) -> Receipt | Inquiry:
        raise NotImplementedError

    with pytest.raises(DefinitionError, match="nothing to ask"):
        inside.inquiry(look)
    with pytest.raises(DefinitionError, match="takes the activity's input"):
        outside.inquiry(look_elsewhere)
    outside.inquiry(look)


@pytest.mark.stack("pure")
def test_a_pivot_outside_the_database_needs_an_inquiry() -> None:
    participant = Participant("payments", start_to_close=timedelta(seconds=1))

    @participant.activity(at_least_once=True)
    async def pay(transfer: Transfer) -> Receipt:
        raise NotImplementedError

    saga = Saga("order", Transfer).step(pay, kind=StepKind.PIVOT)
    with pytest.raises(DefinitionError, match="only an inquiry can tell"):
        saga.compile()


async def test_an_activity_outside_the_database_needs_one_for_its_rows(stateless: Rig) -> None:
    with pytest.raises(DefinitionError, match="keeps a row for each attempt"):
        await stateless.start(payments(Provider()))


def test_the_key_of_an_action_is_the_one_that_its_undo_is_told() -> None:
    command, _ = undo_of(make_command("charge", run_id="01890a5d-ac96-774b-bcce-b302099a8057"))
    known = context(command)
    assert known.operation_key == command.commandid
    assert known.forward_key == command_id("default", "money", command.runid, "charge", 0, 0, "forward")

"""What a participant refuses before its first message (P21, D-01), and its stateless form."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from saga.brokers.memory import MEMORY, MemoryBroker
from saga.definition.activity import Participant
from saga.errors import DefinitionError, DuplicateActivity, MissingCapability
from saga.outcomes import ActivityContext, Result
from saga.participant.served import idle_in_transaction_seconds, limits, serve
from tests.participant.harness import Gate, Receipt, Rig, Transfer, limited, make_command, undo_of


def undoing(optional: bool) -> Participant:
    participant = limited()

    @participant.activity
    async def notify(transfer: Transfer) -> Result[Receipt, int]:
        return Result(Receipt(reference="x"), 7)

    if optional:

        @notify.compensation
        async def may_lack(transfer: Transfer, receipt: Receipt | None, undo: int | None) -> None:
            seen.append((receipt, undo))

    else:

        @notify.compensation
        async def must_have(transfer: Transfer, undo: int) -> None: ...

    return participant


seen: list[object] = []


def test_p21_a_stateless_undo_that_needs_its_past_must_accept_none() -> None:
    """P21: the reply that would have carried it may be lost."""
    serve([undoing(optional=True)], stateless=True, capabilities=MEMORY)
    serve([undoing(optional=False)], stateless=False, capabilities=MEMORY)
    with pytest.raises(DefinitionError):
        serve([undoing(optional=False)], stateless=True, capabilities=MEMORY)


async def test_p21_a_stateless_undo_reads_the_command(stateless: Rig) -> None:
    """P21: and gets None where the command has null."""
    seen.clear()
    await stateless.start(undoing(optional=True))
    forward = make_command("notify")
    (done,) = await stateless.ask(forward)
    assert done.data == {"output": {"reference": "x"}, "undo": 7}
    full = b'{"input":{"account":"a","amount":1},"output":{"reference":"x"},"undo":7}'
    for data in (full, b'{"input":{"account":"a","amount":1},"output":null,"undo":null}'):
        (reply,) = await stateless.ask(
            make_command(
                "notify", direction="compensate", run_id=forward[0].runid, data=data, round=len(seen)
            )
        )
        assert (reply.outcome, reply.data) == ("done", None)
    assert seen == [(Receipt(reference="x"), 7), (None, None)]


def test_a_session_needs_a_database() -> None:
    participant = limited()

    @participant.activity(no_compensation="test")
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt: ...  # type: ignore[empty-body]

    with pytest.raises(DefinitionError):
        serve([participant], stateless=True, capabilities=MEMORY)


@pytest.mark.feature("D-01")
@pytest.mark.stack("pure")
def test_an_activity_is_served_once_in_a_process() -> None:
    """D-01."""
    with pytest.raises(DuplicateActivity):
        serve([undoing(True), undoing(True)], stateless=True, capabilities=MEMORY)


@pytest.mark.parametrize(("seconds", "fits"), [(10.0, True), (50.0, True), (51.0, False), (None, False)])
def test_a_handler_must_end_before_the_broker_takes_its_delivery_back(
    seconds: float | None, fits: bool
) -> None:
    """RMQ-16: until long activities can ack early, half the consumer timeout is the limit."""
    participant = limited(seconds)

    @participant.activity(no_compensation="test")
    async def notify(transfer: Transfer) -> Receipt: ...  # type: ignore[empty-body]

    capabilities = replace(MEMORY, unacked_seconds_max=100.0)
    if fits:
        serve([participant], stateless=True, capabilities=capabilities)
    else:
        with pytest.raises(MissingCapability):
            serve([participant], stateless=True, capabilities=capabilities)


def test_p28_connections_idle_in_a_transaction_for_the_longest_limit_and_five_seconds() -> None:
    """P28: where all handlers have a limit."""
    short, long, endless = limited(3), limited(20), limited(None)
    for participant in (short, long, endless):

        @participant.activity(no_compensation="test")
        async def notify(transfer: Transfer) -> Receipt: ...  # type: ignore[empty-body]

    assert idle_in_transaction_seconds(limits([short, long])) == 25.0
    assert idle_in_transaction_seconds(limits([short, endless])) is None


async def test_a_handler_gets_what_it_annotates(stateless: Rig) -> None:
    """D-01: several payload arguments are one generated model; the context carries the operation key."""
    participant = limited()
    contexts: list[ActivityContext] = []

    @participant.activity(no_compensation="test")
    async def notify(account: str, amount: int, context: ActivityContext) -> Receipt:
        contexts.append(context)
        return Receipt(reference=f"{account}:{amount}")

    await stateless.start(participant)
    command = make_command("notify")
    (reply,) = await stateless.ask(command)
    assert reply.data["output"] == {"reference": "alice:10"}
    assert contexts[0].operation_key == command[0].commandid
    assert (contexts[0].step, contexts[0].attempt, contexts[0].run_id) == ("notify", 1, command[0].runid)


async def test_handlers_that_wait_run_beside_each_other_up_to_the_bound(stateless: Rig) -> None:
    """The bound counts commands, not messages: here one message holds all."""
    participant, gate = limited(), Gate()

    @participant.activity(no_compensation="test")
    async def notify(transfer: Transfer) -> Receipt:
        await gate()
        return Receipt(reference="x")

    await stateless.start(participant, concurrency=5)
    stateless.send(*(make_command("notify") for _ in range(20)), together=True)
    await gate.reached(5)
    await asyncio.sleep(0.02)
    assert gate.arrived == 5
    gate.open()
    assert len(await stateless.receive(20)) == 20


async def test_handlers_that_never_wait_leave_the_loop_to_others(stateless: Rig) -> None:
    """A burst must not keep replies and receiving from the loop."""
    participant, ticks = limited(), 0

    @participant.activity(no_compensation="test")
    async def notify(transfer: Transfer) -> Receipt:
        return Receipt(reference="x")

    await stateless.start(participant)
    stateless.send(*(make_command("notify") for _ in range(1000)))

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = stateless.spawner.spawn(tick(), name="tick")
    await stateless.receive(1000)
    ticking.cancel()
    assert ticks >= 10


async def test_an_undo_without_a_compensation_here_is_unknown(stateless: Rig) -> None:
    """D-04."""
    participant = limited()

    @participant.activity(no_compensation="test")
    async def notify(transfer: Transfer) -> Receipt:
        return Receipt(reference="x")

    await stateless.start(participant)
    (reply,) = await stateless.ask(undo_of(make_command("notify")))
    assert reply.data["error"] == "unknown_activity"


def test_the_broker_of_these_tests_is_the_one_of_the_product() -> None:
    assert MemoryBroker().capabilities is MEMORY

"""From a delivery to its ack: joining, packing, parking, poison, publishing again, shutting down."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from saga import failpoints
from saga.brokers.base import Channel
from saga.brokers.memory import Faults
from saga.definition.activity import Participant
from saga.messages import Reply, encode_command, encode_reply, pack
from saga.participant.answers import Answer
from saga.participant.attempts import Attempt, Held
from saga.participant.intake import NO_KEY
from saga.participant.replies import _envelope
from saga.participant.served import fence
from tests.participant.harness import (
    REPLIES,
    Gate,
    Receipt,
    Rig,
    Transfer,
    like,
    limited,
    make_command,
    move,
    undo_of,
    until,
)


def accounts(gate: Gate | None = None) -> Participant:
    participant = limited()

    @participant.activity(no_compensation="test")
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        if gate is not None:
            await gate()
        await move(session, transfer.account, -transfer.amount)
        return Receipt(reference="x")

    return participant


def notifier(gate: Gate | None = None) -> Participant:
    participant = limited()

    @participant.activity(no_compensation="test")
    async def notify(transfer: Transfer) -> Receipt:
        if gate is not None:
            await gate()
        return Receipt(reference="x")

    return participant


# --- packs and parking


async def test_replies_are_packed_within_64_where_the_broker_charges_per_message(stateless: Rig) -> None:
    """design.md 6: at most 64 and 256 KiB, and nothing waits for company."""
    service = await stateless.start(notifier())
    await stateless.ask(*(make_command("notify") for _ in range(200)), together=False)
    assert service.counts["handler_calls"] == 200


async def test_one_bad_command_of_a_pack_is_parked_alone(rig: Rig) -> None:
    """F29: bytes, headers and reason; the neighbours go on and the delivery is acked."""
    await rig.start(accounts())
    good = [encode_command(*make_command()) for _ in range(2)]
    rig.send_bodies(pack([good[0], b'{"type":"nonsense"}', good[1]])[0])
    replies = await rig.receive(2)
    assert {reply.outcome for reply in replies} == {"done"}
    await rig.settled()
    (row,) = await rig.parked()
    assert (row.reason, json.loads(row.body)) == ("message_invalid", {"type": "nonsense"})
    headers = json.loads(row.headers)
    assert headers["h"] == "1"
    assert headers["saga-parked-detail"].startswith("id: missing; namespace: missing")


@pytest.mark.parametrize(
    "body", [b"", b"\x00\xff", b"[]", b"7", b'"x"', b"{", b"[" * 5000, b'[{"a":1}]', b"null", b"[1,2]"]
)
async def test_what_is_no_command_is_parked_as_it_came(rig: Rig, body: bytes) -> None:
    """F29: the consumer lives on."""
    await rig.start(accounts())
    rig.send_bodies(body)
    await rig.settled()
    assert {row.reason for row in await rig.parked()} == {"message_invalid"}
    (reply,) = await rig.ask(make_command())
    assert reply.outcome == "done"


@pytest.mark.parametrize("field", ["runid", "iteration", "step"])
async def test_what_no_barrier_row_could_name_is_parked(rig: Rig, field: str) -> None:
    """F29, S12."""
    await rig.start(accounts())
    wrong = {"runid": "no uuid", "iteration": 2**40, "step": "a\x00b"}[field]
    rig.send(like(make_command(), **{field: wrong}))
    await rig.settled()
    assert [row.reason for row in await rig.parked()] == ["message_invalid"]


async def test_a_foreign_namespace_is_parked_and_not_run(rig: Rig) -> None:
    """I14: the namespace comes from the channel and must equal the envelope's."""
    service = await rig.start(accounts())
    rig.send(make_command(namespace="other"))
    await rig.settled()
    assert [row.reason for row in await rig.parked()] == ["foreign_namespace"]
    assert service.counts["handler_calls"] == 0


async def test_an_unknown_activity_is_parked_and_answered(rig: Rig) -> None:
    """D-04: a later delivery may meet a process that has it."""
    await rig.start(accounts())
    (reply,) = await rig.ask(make_command("deposit"))
    assert (reply.data["error"], reply.data["retryable"]) == ("unknown_activity", True)
    (undo,) = await rig.ask(undo_of(make_command("withdraw")))
    assert undo.data["error"] == "unknown_activity"
    await rig.settled()
    assert [row.reason for row in await rig.parked()] == ["unknown_activity"] * 2


async def test_without_a_database_parked_messages_go_to_the_parking_channel(stateless: Rig) -> None:
    """W6: confirmed there before the original is acked."""
    await stateless.start(notifier())
    stateless.send_bodies(b"nonsense")
    await stateless.settled()
    consumer = await stateless.broker().consume("saga.default.commands.accounts.parked", prefetch=1)
    (delivery,) = await consumer.receive()
    assert delivery.body == b"nonsense"
    assert delivery.headers["saga-parked-reason"] == "message_invalid"
    assert delivery.headers["h"] == "1"


async def test_a_fence_needs_a_barrier(stateless: Rig) -> None:
    """I5: without one the pivot stays unknown, visibly."""
    await stateless.start(notifier())
    (reply,) = await stateless.ask(make_command("notify", direction="fence", data=b"null"))
    assert (reply.outcome, reply.data["error"]) == ("failed", "no_barrier")


# --- replies


def test_the_fast_envelope_is_what_encode_reply_makes() -> None:
    """docs/wire.md has one form of a reply."""
    for traceparent in (None, "00-aa-bb-01"):
        command, _ = make_command(traceparent=traceparent)
        attempt = Attempt(command, fence(), Held(None, _Delivery(), 1), 0.0, NO_KEY)  # type: ignore[arg-type]
        reply = Reply(
            id="m-1",
            namespace=command.namespace,
            saga=command.saga,
            sagaid=command.sagaid,
            runid=command.runid,
            step=command.step,
            direction=command.direction,
            commandid=command.commandid,
            attempt=1,
            outcome="done",
            traceparent=traceparent,
        )
        assert _envelope(attempt, "m-1", Answer("done", b'{"a":1}')) == encode_reply(reply, b'{"a":1}')


class _Delivery:
    redelivered = False
    delivery_count = 1


async def test_p33_a_reply_without_a_confirm_is_published_again_and_never_nacked(rig: Rig) -> None:
    """P33: from memory, while its delivery is held; the command is not delivered again."""
    broker = rig.broker(faults=Faults(lose_confirm=1.0), publish_seconds_max=0.05)
    service = await rig.start(accounts(), broker=broker)
    rig.send(*(make_command() for _ in range(5)))
    await until(lambda: service.counts["replies_unconfirmed"] >= 5)
    assert rig.unacked() == 5
    broker.faults = Faults()
    await rig.settled()
    assert broker.fired["lose_confirm"] > 0
    assert service.counts["handler_calls"] == 5
    assert len(await rig.moves()) == 5


async def test_p33_receiving_goes_on_while_no_reply_can_be_published(rig: Rig) -> None:
    """P33: otherwise coordinator and participants wait for each other's full queues."""
    broker = rig.broker()
    service = await rig.start(accounts(), broker=broker)
    rig.queues.delete(REPLIES)
    rig.send(*(make_command() for _ in range(5)))
    await until(lambda: service._replies.pending == 5)
    rig.send(*(make_command() for _ in range(5)))
    await until(lambda: service._replies.pending == 10)
    assert rig.unacked() == 10
    rig.queues.declare(Channel(REPLIES))
    await rig.settled()


async def test_p30_a_copy_joins_while_the_reply_waits_for_its_confirm(rig: Rig) -> None:
    """P30: it is acked with the one reply."""
    service = await rig.start(accounts())
    rig.queues.delete(REPLIES)
    forward = make_command()
    rig.send(forward)
    await until(lambda: service._replies.pending == 1)
    rig.send(like(forward, resend=True))
    await until(lambda: service.counts["joined"] == 1)
    rig.queues.declare(Channel(REPLIES))
    await rig.settled()
    assert service.counts["handler_calls"] == 1


async def test_p06_a_retry_after_a_failure_is_a_run_of_its_own(stateless: Rig) -> None:
    """P6: its number must be answered; it does not join the failure that is still being published."""
    participant, calls = limited(), 0

    @participant.activity(no_compensation="test")
    async def notify(transfer: Transfer) -> Receipt:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ValueError
        return Receipt(reference="x")

    service = await stateless.start(participant)
    stateless.queues.delete(REPLIES)
    forward = make_command("notify")
    stateless.send(forward)
    await until(lambda: service._replies.pending == 1)
    stateless.send(like(forward, attempt=2))
    await until(lambda: service._replies.pending == 2)
    stateless.queues.declare(Channel(REPLIES))
    await stateless.settled()
    assert calls == 2


# --- poison


async def give_back(rig: Rig, times: int) -> None:
    """Deliver what waits and take it back, as a process that dies with it would."""
    for _ in range(times):
        consumer = await rig.broker().consume("saga.default.commands.accounts", prefetch=100)
        await consumer.receive()
        await consumer.close()


async def test_p14_from_the_third_delivery_a_command_runs_alone(rig: Rig) -> None:
    """P14: it waits until nothing else runs, and nothing else starts beside it; an outcome deletes its count."""
    participant, gate, together = limited(), Gate(), list[int]()
    running = 0

    @participant.activity(no_compensation="test")
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        nonlocal running
        running += 1
        if transfer.amount == 1:
            await gate()
        await asyncio.sleep(0)
        together.append(running if transfer.amount == 13 else 0)
        running -= 1
        await move(session, transfer.account, -transfer.amount)
        return Receipt(reference="x")

    service = await rig.start(participant)
    await service.stop()
    rig.send(make_command(data=b'{"account":"alice","amount":13}'))
    await give_back(rig, 2)
    service = await rig.start(participant)
    rig.send(*(make_command(data=b'{"account":"alice","amount":1}') for _ in range(3)))
    gate.open()
    await rig.receive(4)
    await rig.settled()
    assert max(together) == 1
    assert service.counts["lone_runs"] == 1
    assert await rig.lone_runs() == []


async def test_p14_after_five_lone_runs_it_is_parked_and_answered_as_a_failed_attempt(rig: Rig) -> None:
    """P14: each run is counted, durably, before it starts."""
    gate = Gate()
    first = await rig.start(accounts())
    await first.stop()
    poison = make_command()
    rig.send(poison)
    await give_back(rig, 2)
    for run in range(1, 6):
        service = await rig.start(accounts(gate))
        await gate.reached(run)
        assert await rig.lone_runs() == [run]
        await service.stop(timedelta())  # dies in the handler: no outcome
    service = await rig.start(accounts(gate))
    (reply,) = await rig.receive()
    assert (reply.outcome, reply.data["error"], reply.data["retryable"]) == ("failed", "poison", True)
    await rig.settled()
    (row,) = await rig.parked()
    assert (row.reason, row.body) == ("poison", encode_command(*poison))
    await until(lambda: service._scheduler.running == 0)
    assert await rig.lone_runs() == []
    gate.open()
    (again,) = await rig.ask(like(poison, attempt=2))
    assert again.outcome == "done"


async def test_p14_without_a_database_the_brokers_count_decides(stateless: Rig) -> None:
    """P14: delivery 8 is one more than two free ones and five alone."""
    service = await stateless.start(notifier())
    await service.stop()
    stateless.send(make_command("notify"))
    await give_back(stateless, 7)
    service = await stateless.start(notifier())
    (reply,) = await stateless.receive()
    assert reply.data["error"] == "poison"
    assert service.counts["handler_calls"] == 0


async def test_p14_a_lone_command_with_its_row_is_answered_without_a_run(rig: Rig) -> None:
    """P22 before P14: rolling restarts must not count against what is done."""
    service = await rig.start(accounts())
    forward = make_command()
    await rig.ask(forward)
    await service.stop()
    rig.send(like(forward))
    await give_back(rig, 3)
    service = await rig.start(accounts())
    (reply,) = await rig.receive()
    assert reply.outcome == "done"
    assert service.counts["handler_calls"] == 0


# --- shutdown


@pytest.mark.feature("D-16")
async def test_p17_what_runs_ends_within_the_grace_and_the_rest_is_handed_back(rig: Rig) -> None:
    """P17, F3: nothing is lost and nothing done twice."""
    gate = Gate()
    service = await rig.start(accounts(gate), concurrency=2)
    rig.send(*(make_command() for _ in range(6)))
    await gate.reached(2)
    stopping = rig.spawner.spawn(service.stop(), name="stop")
    await asyncio.sleep(0.05)
    gate.open()
    await stopping
    assert len(await rig.receive(2)) == 2
    assert await rig.moves() == [-10, -10]
    assert rig.unacked() == 4
    await rig.start(accounts())
    await rig.receive(4)
    assert len(await rig.moves()) == 6


@pytest.mark.feature("D-16")
async def test_p17_past_the_grace_a_handler_is_rolled_back_and_its_command_comes_again(rig: Rig) -> None:
    """P17, M4: no answer is given for what was abandoned."""
    failpoints.arm("")
    gate = Gate()
    service = await rig.start(accounts(gate))
    rig.send(make_command())
    await gate.reached()
    await service.stop(timedelta(seconds=0.05))
    assert failpoints.disarm()["M4"] == 1
    assert rig.unacked() == 1
    assert await rig.moves() == []
    await rig.start(accounts())
    (reply,) = await rig.receive()
    assert reply.outcome == "done"
    assert await rig.moves() == [-10]


@pytest.mark.feature("D-16", acceptance=True, scale=0.1)
async def test_a_rolling_restart_of_five_participants_under_load_loses_and_doubles_nothing(rig: Rig) -> None:
    """D-16's acceptance check (kill -9 and the redelivery time need real processes and are tested there)."""
    services = [await rig.start(accounts(), prefetch=8) for _ in range(5)]
    sent = [make_command() for _ in range(150)]
    for place, service in enumerate(services):
        rig.send(*sent[place * 30 : place * 30 + 30])
        await asyncio.sleep(0.02)
        await service.stop(timedelta(seconds=5))
        await rig.start(accounts(), prefetch=8)
    replies = await rig.receive(150)
    await rig.settled()
    assert {reply.commandid for reply in replies} == {command.commandid for command, _ in sent}
    assert {reply.outcome for reply in replies} == {"done"}
    assert len(await rig.moves()) == 150


# --- crash points and lost answers


@pytest.mark.parametrize("point", ["W1", "W2", "W3", "W4", "W5", "W6", "W7"])
async def test_an_error_at_a_crash_point_costs_no_effect_and_no_answer(rig: Rig, point: str) -> None:
    """reliability.md 3: one effect, and an answer for this sending or the next one."""
    await rig.start(accounts())
    failpoints.arm(f"{point}:raise")
    forward = make_command()
    rig.send(forward)
    await until(lambda: failpoints._armed is not None and failpoints._armed.hits.get(point, 0) > 0)
    await asyncio.sleep(0.1)
    failpoints.disarm()
    await rig.services[0].stop(timedelta(seconds=0.2))
    await rig.start(accounts())
    rig.send(like(forward, attempt=2))
    while True:
        (reply,) = await rig.receive()
        if reply.outcome == "done":
            break
    await rig.settled()
    assert await rig.moves() == [-10]


async def test_p3_a_lost_answer_to_commit_is_settled_by_a_look(rig: Rig) -> None:
    """P3, W4: committed, and the handler is not called again."""
    service = await rig.start(accounts())
    failpoints.arm("W4:raise")
    (reply,) = await rig.ask(make_command())
    assert reply.outcome == "done"
    assert service.counts["handler_calls"] == 1
    assert await rig.moves() == [-10]


async def test_every_point_of_the_participant_is_passed_in_its_order(rig: Rig) -> None:
    """reliability.md 3: W1, the handler, W3, the row, W2, COMMIT, W4, reply, W5 to W7."""
    await rig.start(accounts())
    failpoints.arm("")
    await rig.ask(make_command())
    await rig.settled()
    hits = failpoints.disarm()
    assert [name for name in hits if name.startswith("W")] == ["W1", "W3", "W2", "W4", "W5", "W6", "W7"]


async def test_p36_a_handler_that_holds_the_writer_is_named(
    stack: str, rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """P36: over one second, from its first statement; and it tells a start inside it which file it writes to."""
    from saga.storage.sqlalchemy.writer import handler_writes_to

    if stack != "sqlite":
        pytest.skip("only SQLite has one writer")
    participant, seen = limited(), list[str | None]()

    @participant.activity(no_compensation="test")
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        seen.append(handler_writes_to.get())
        await session.execute(text("SELECT 1"))
        await asyncio.sleep(1.1)
        return Receipt(reference="slow")

    await rig.start(participant)
    await rig.ask(make_command())
    await rig.settled()
    assert "withdraw" in caplog.text
    assert "held the SQLite writer" in caplog.text
    assert rig.database is not None
    assert seen == [rig.database.url.database]
    assert handler_writes_to.get() is None

"""The inbox on its own (F-08): each event once, in one transaction with what it did; errors retried, then parked."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from functools import partial

import pytest
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from saga import EventContext, Inbox, Refused, RetryAfter, RetryPolicy
from saga.storage.sqlalchemy import tables as t
from tests.inbox.rig import Mailer, OrderPlaced, envelope, mail, until, write
from tests.participant.harness import Statements
from tests.plugins.features import Faults
from tests.plugins.watch import CANARY

QUICK = RetryPolicy(initial=timedelta(milliseconds=1), maximum=timedelta(milliseconds=1), attempts=3)


def recording(mailer: Mailer, inbox: Inbox | None = None) -> Inbox:
    """One mail per event."""
    inbox = inbox or Inbox()

    @inbox.consumer(mailer.topic, retry=QUICK)
    async def record(event: OrderPlaced, session: AsyncSession, context: EventContext) -> None:
        await write(session, event.number, context.attempt, context.id)

    return inbox


@pytest.mark.feature("F-08")
async def test_a_copy_has_no_effect(mailer: Mailer, faults: Faults) -> None:
    """One after the other, at the same time, and again after a restart."""
    faults.declare("copy")
    app = await mailer.start(recording(mailer))
    bodies = [envelope(number) for number in range(20)]
    await mailer.send(*bodies, *bodies)
    await mailer.quiet()
    await mailer.send(*bodies)
    await mailer.quiet()
    assert await mailer.mails() == list(range(20))
    assert await mailer.remembered() == 20
    await app.stop()
    await mailer.start(recording(mailer))
    await mailer.send(*bodies)
    await mailer.quiet()
    faults.fired("copy", 60)
    assert await mailer.mails() == list(range(20))


@pytest.mark.feature("F-08")
async def test_each_event_costs_one_commit(mailer: Mailer) -> None:
    app = await mailer.start(recording(mailer))
    assert app._running is not None
    assert app._running.database is not None
    relay = app._running.relay
    if relay is not None:
        await relay.stop()  # it looks for rows of its own
    statements = Statements(app._running.database)
    if mailer.app is not None and app.broker.capabilities.name == "database":
        pytest.skip("the queue is in the same database, and its commits cannot be told apart")
    await mailer.send(*(envelope(number) for number in range(10)))
    await until(lambda: _count(mailer, 10))
    await mailer.quiet()
    taken = [each for each in statements.taken() if each in ("INSERT", "COMMIT", "ROLLBACK")]
    assert taken.count("COMMIT") == 10
    assert taken.count("INSERT") == 20  # the mail, and the row that remembers the event


async def _count(mailer: Mailer, count: int) -> bool:
    return len(await mailer.mails()) == count


@pytest.mark.feature("F-08")
async def test_effect_memory_and_further_events_are_one_transaction(mailer: Mailer) -> None:
    """The first attempt writes, publishes and raises: nothing of it stays. The second one is the one."""
    inbox, seen = Inbox(), []

    @inbox.consumer(mailer.topic, retry=QUICK)
    async def forward(event: OrderPlaced, session: AsyncSession, context: EventContext) -> None:
        assert mailer.app is not None
        await write(session, event.number, context.attempt, context.id)
        more = OrderPlaced(number=-event.number)
        await mailer.app.outbox.publish(more, topic=mailer.topic, type="Mailed", session=session)
        if context.attempt == 1:
            await session.flush()
            raise ValueError(CANARY)

    @inbox.consumer(mailer.topic, type="Mailed")
    async def mailed(event: OrderPlaced, context: EventContext) -> None:
        seen.append((event.number, context.source))

    await mailer.start(inbox)
    await mailer.send(envelope(7))
    await until(lambda: seen)
    await mailer.quiet()
    assert seen == [(-7, f"/saga/{mailer.namespace}")]
    assert [tuple(row) for row in await mailer.rows(select(mail.c.number, mail.c.attempt))] == [(7, 2)]
    assert await mailer.remembered() == 2


@pytest.mark.feature("F-08")
async def test_an_error_is_tried_again_by_policy_and_then_parked(mailer: Mailer) -> None:
    """Parked as it was sent, with the class of the error and our line, never its text; sent again, it is new."""
    inbox, attempts, broken = Inbox(), [], True

    @inbox.consumer(mailer.topic, retry=QUICK)
    async def fail(event: OrderPlaced, session: AsyncSession, context: EventContext) -> None:
        attempts.append(context.attempt)
        if broken:
            raise LookupError(CANARY)
        await write(session, event.number, context.attempt, context.id)

    app = await mailer.start(inbox)
    body = envelope(3)
    await mailer.send(body)
    await until(lambda: _parked(mailer, 1))
    await mailer.quiet()
    assert attempts == [1, 2, 3]
    ((reason, headers, kept),) = await mailer.parked()
    assert (reason, kept) == ("handler_failed", body)
    assert headers["saga-parked-detail"].startswith("LookupError at ")
    assert CANARY not in str(headers)
    broken = False
    del app
    await mailer.send(kept)  # what a redrive does
    await mailer.quiet()
    assert attempts == [1, 2, 3, 1]
    assert await mailer.mails() == [3]


async def _parked(mailer: Mailer, count: int) -> bool:
    return len(await mailer.parked()) == count


async def test_an_event_that_waits_for_its_next_attempt_holds_nothing(mailer: Mailer) -> None:
    """It waits in the database, its delivery acked, while others go on."""
    inbox = Inbox()

    @inbox.consumer(mailer.topic)
    async def busy(event: OrderPlaced, session: AsyncSession, context: EventContext) -> None:
        if event.number == 0:
            raise RetryAfter(timedelta(hours=1))
        await write(session, event.number, context.attempt, context.id)

    app = await mailer.start(inbox)
    await mailer.send(envelope(0), *(envelope(number) for number in range(1, 4)))
    await until(lambda: _count(mailer, 3))

    async def waits() -> bool:
        delayed = select(t.outbox_delayed.c.due_at).where(t.outbox_delayed.c.namespace == mailer.namespace)
        status = await app.broker.status(mailer.topic)
        return len(await mailer.rows(delayed)) == 1 and status.messages == 0

    await until(waits)
    assert await mailer.remembered() == 3


def _reached(attempts: list[int], count: int) -> bool:
    return len(attempts) == count


async def test_copies_of_a_failed_event_make_one_next_attempt(mailer: Mailer) -> None:
    inbox, attempts = Inbox(), []

    @inbox.consumer(mailer.topic)
    async def fail(event: OrderPlaced, context: EventContext) -> None:
        attempts.append(context.attempt)
        raise RetryAfter(timedelta(hours=1))

    await mailer.start(inbox)
    body = envelope(1)
    for turn in range(1, 4):
        await mailer.send(body)
        await until(partial(_reached, attempts, turn))
        await until(lambda: mailer.held() == 0)  # or the next copy joins this attempt
    delayed = select(t.outbox_delayed.c.message_id).where(t.outbox_delayed.c.namespace == mailer.namespace)
    assert len(await mailer.rows(delayed)) == 1


async def test_a_refusal_and_what_no_retry_can_mend_are_parked_at_once(mailer: Mailer) -> None:
    inbox, attempts = Inbox(), []

    @inbox.consumer(mailer.topic, retry=QUICK, non_retryable=[KeyError])
    async def judge(event: OrderPlaced, session: AsyncSession, context: EventContext) -> None:
        attempts.append(event.number)
        await write(session, event.number, context.attempt, context.id)
        raise Refused("unwanted", CANARY) if event.number == 1 else KeyError(CANARY)

    await mailer.start(inbox)
    await mailer.send(envelope(1), envelope(2))
    await until(lambda: _parked(mailer, 2))
    assert sorted(attempts) == [1, 2]
    assert {reason for reason, _, _ in await mailer.parked()} == {"refused", "handler_failed"}
    assert await mailer.mails() == []
    assert await mailer.remembered() == 0


async def test_what_nobody_consumes_is_parked_or_skipped(mailer: Mailer) -> None:
    await mailer.start(recording(mailer))
    await mailer.send(
        envelope(1, type="Shipped"), b"no event", envelope(2), envelope(3, data={"number": "x"})
    )
    await until(lambda: _parked(mailer, 3))
    await until(lambda: _count(mailer, 1))
    reasons = {reason: headers.get("saga-parked-detail", "") for reason, headers, _ in await mailer.parked()}
    assert set(reasons) == {"unknown_type", "message_invalid", "payload_invalid"}
    assert reasons["payload_invalid"].endswith("number: int_type")
    await mailer.stop()

    app = await mailer.start(recording(mailer, Inbox(skip_others=True)))
    await mailer.send(envelope(4, type="Shipped"), envelope(5))
    await until(lambda: _count(mailer, 2))
    await mailer.quiet()
    assert app._running is not None
    assert app._running.services[0].counts["skipped"] == 1
    assert len(await mailer.parked()) == 3


async def test_two_events_with_one_business_key_are_one(mailer: Mailer) -> None:
    inbox = Inbox()

    def number(event: OrderPlaced) -> str:
        if event.number == 9:
            raise ValueError(CANARY)
        return str(event.number)

    @inbox.consumer(mailer.topic, key=number)
    async def record(event: OrderPlaced, session: AsyncSession, context: EventContext) -> None:
        await write(session, event.number, context.attempt, context.id)

    await mailer.start(inbox)
    await mailer.send(*(envelope(each) for each in (1, 1, 2, 1, 9)))
    await until(lambda: _count(mailer, 2))
    await until(lambda: _parked(mailer, 1))
    await mailer.quiet()
    assert await mailer.mails() == [1, 2]
    ((reason, headers, _),) = await mailer.parked()
    assert (reason, headers["saga-parked-detail"]) == ("key_failed", "ValueError")


async def test_a_newer_publishers_fields_are_no_error_and_a_batch_is_its_events(mailer: Mailer) -> None:
    await mailer.start(recording(mailer))
    newer = envelope(1, data={"number": 1, "note": CANARY, "added": {"since": "then"}})
    await mailer.send(newer, b"[" + envelope(2) + b", " + envelope(3) + b", 7]")
    await until(lambda: _count(mailer, 3))
    await until(lambda: _parked(mailer, 1))
    assert await mailer.mails() == [1, 2, 3]


async def test_a_plain_function_consumes_in_a_thread(mailer: Mailer) -> None:
    inbox = Inbox()

    @inbox.consumer(mailer.topic)
    def record(event: OrderPlaced, session: Session, context: EventContext) -> None:
        session.execute(insert(mail).values(number=event.number, attempt=1, event=context.id))

    await mailer.start(inbox)
    bodies = [envelope(number) for number in range(5)]
    await mailer.send(*bodies, *bodies)
    await until(lambda: _count(mailer, 5))
    await mailer.quiet()
    assert await mailer.mails() == list(range(5))


async def test_an_attempt_that_takes_too_long_is_rolled_back_and_tried_again(mailer: Mailer) -> None:
    inbox = Inbox()

    @inbox.consumer(mailer.topic, retry=QUICK, start_to_close=timedelta(seconds=0.2))
    async def slow(event: OrderPlaced, session: AsyncSession, context: EventContext) -> None:
        await write(session, event.number, context.attempt, context.id)
        if context.attempt == 1:
            await asyncio.Event().wait()

    await mailer.start(inbox)
    await mailer.send(envelope(1))
    await until(lambda: _count(mailer, 1))
    assert [tuple(row) for row in await mailer.rows(select(mail.c.number, mail.c.attempt))] == [(1, 2)]

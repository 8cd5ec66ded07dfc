"""What is answered when a handler does not end well: the table of D-04, the limits of D-05, the switch of P28."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from saga.errors import PayloadInvalid, SagaError
from saga.outcomes import Refused, RetryAfter
from tests.participant.harness import Gate, Receipt, Rig, Transfer, like, limited, make_command, move, until


class Final(Exception):
    """Named in non_retryable."""


class FinalChild(Final):
    """A subclass of it."""


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def recurse(depth: int = 0) -> int:
    return recurse(depth + 1) + 1


def chained() -> None:
    try:
        raise ValueError("inner")
    except ValueError as inner:
        raise KeyError("outer") from inner


def raise_(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


# exception shape -> outcome, and for `failed` the error's name and whether it is retried
SHAPES: dict[str, tuple[Callable[[], Any], str, str | None, bool | None]] = {
    "refused": (raise_(Refused("no", {"a": 1})), "refused", None, None),
    "refused without details": (raise_(Refused("no")), "refused", None, None),
    "refused with details that are no JSON": (raise_(Refused("no", object())), "refused", None, None),
    "retry after": (raise_(RetryAfter(timedelta(seconds=7))), "failed", "RetryAfter", True),
    "named non-retryable": (raise_(Final("x")), "failed", "Final", False),
    "subclass of a named one": (raise_(FinalChild("x")), "failed", "FinalChild", False),
    "plain": (raise_(ValueError("x")), "failed", "ValueError", True),
    "chained": (chained, "failed", "KeyError", True),
    "group": (
        raise_(ExceptionGroup("g", [ValueError("a"), TypeError("b")])),
        "failed",
        "ExceptionGroup",
        True,
    ),
    "recursion": (recurse, "failed", "RecursionError", True),
    "memory": (raise_(MemoryError()), "failed", "MemoryError", True),
    "keyboard interrupt": (raise_(KeyboardInterrupt()), "failed", "KeyboardInterrupt", True),
    "system exit": (raise_(SystemExit(3)), "failed", "SystemExit", True),
    "generator exit": (raise_(GeneratorExit()), "failed", "GeneratorExit", True),
    "cancelled by itself": (raise_(asyncio.CancelledError()), "failed", "CancelledError", True),
    "stop iteration": (raise_(StopIteration()), "failed", "RuntimeError", True),
    "timeout of its own": (raise_(TimeoutError("http")), "failed", "TimeoutError", True),
    "connection of its own": (raise_(ConnectionResetError("http")), "failed", "ConnectionResetError", True),
    "one of our errors": (raise_(SagaError("x")), "failed", "SagaError", True),
    "invalid payload": (raise_(PayloadInvalid("x")), "failed", "PayloadInvalid", False),
    "text that cannot be had": (raise_(Silent()), "failed", "Silent", True),
    "text with half a character": (raise_(ValueError("\ud800")), "failed", "ValueError", True),
    "another type returned": (lambda: {"reference": 1}, "failed", "output_invalid", False),
    "too much returned": (lambda: Receipt(reference="x" * 300_000), "failed", "payload_too_large", False),
}


def acting(act: Callable[[], Any], *, stateless: bool = False) -> Any:
    participant = limited()

    if stateless:

        @participant.activity(no_compensation="test", non_retryable=[Final])
        async def act_alone(transfer: Transfer) -> Receipt:
            return act()

    else:

        @participant.activity(name="act_alone", no_compensation="test", non_retryable=[Final])
        async def act_in_session(transfer: Transfer, session: AsyncSession) -> Receipt:
            await move(session, transfer.account, -transfer.amount)
            return act()

    return participant


@pytest.mark.feature("D-04", acceptance=True)
async def test_the_table_of_exception_shapes_gives_the_documented_outcome(rig: Rig) -> None:
    """D-04, F30: every shape is answered, nothing of its effect stays, and the service goes on."""
    assert len(SHAPES) >= 20
    for name, (act, outcome, error, retryable) in SHAPES.items():
        service = await rig.start(acting(act))
        (reply,) = await rig.ask(make_command("act_alone"))
        _check(name, reply, outcome, error, retryable)
        await service.stop()
    assert await rig.moves() == []


@pytest.mark.feature("D-04")
async def test_the_same_table_without_a_database(stateless: Rig) -> None:
    """D-04, F30."""
    for name, (act, outcome, error, retryable) in SHAPES.items():
        service = await stateless.start(acting(act, stateless=True))
        (reply,) = await stateless.ask(make_command("act_alone"))
        _check(name, reply, outcome, error, retryable)
        await service.stop()


def _check(name: str, reply: Any, outcome: str, error: str | None, retryable: bool | None) -> None:
    assert reply.outcome == outcome, name
    if outcome == "refused":
        assert reply.data["code"] == "no", name
        return
    assert (reply.data["error"], reply.data["retryable"]) == (error, retryable), name
    assert len(reply.data.get("message", "").encode()) <= 4096, name
    assert len(reply.data.get("traceback", "").encode()) <= 4096, name
    if name == "retry after":
        assert reply.data["retry_after_ms"] == 7000
    if name == "chained":
        assert "KeyError: 'outer' <- ValueError: inner" in reply.data["message"]
        assert "recurse" in reply.data["traceback"] or "chained" in reply.data["traceback"]


async def test_no_text_of_an_exception_is_logged(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """S20, SQL-9."""
    caplog.set_level(logging.DEBUG, logger="saga")
    await rig.start(acting(raise_(ValueError("canary-4711"))))
    (reply,) = await rig.ask(make_command("act_alone", data=b'{"account":"canary-4712","amount":1}'))
    assert "canary-4711" in reply.data["message"]
    assert "canary" not in caplog.text


async def test_an_input_of_another_type_is_final_and_calls_no_handler(rig: Rig) -> None:
    """D-04, D-02: strict, unknown fields refused."""
    service = await rig.start(acting(lambda: Receipt(reference="x")))
    for data in (b'{"account":"a","amount":"10"}', b'{"account":"a","amount":1,"x":2}', b"null"):
        (reply,) = await rig.ask(make_command("act_alone", data=data))
        assert (reply.data["error"], reply.data["retryable"]) == ("payload_invalid", False)
    assert service.counts["handler_calls"] == 0


async def test_start_to_close_cancels_rolls_back_and_answers_timeout(rig: Rig) -> None:
    """D-05: enforced from the start of the handler."""
    participant, cancelled = limited(0.2), list[bool]()

    @participant.activity(no_compensation="test")
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        try:
            await move(session, transfer.account, -transfer.amount)
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return Receipt(reference="never")

    await rig.start(participant)
    (reply,) = await rig.ask(make_command())
    assert (reply.outcome, reply.data["error"], reply.data["retryable"]) == ("failed", "timeout", True)
    assert cancelled == [True]
    assert await rig.moves() == []


async def test_start_to_close_holds_without_a_database_too(stateless: Rig) -> None:
    """D-05; and a handler that ends in time is not touched by its neighbour's limit."""
    participant = limited(0.5)

    @participant.activity(no_compensation="test")
    async def slow(transfer: Transfer) -> Receipt:
        await asyncio.Event().wait()
        return Receipt(reference="never")

    @participant.activity(no_compensation="test")
    async def quick(transfer: Transfer) -> Receipt:
        await asyncio.sleep(0.01)
        return Receipt(reference="quick")

    await stateless.start(participant)
    replies = await stateless.ask(make_command("slow"), *(make_command("quick") for _ in range(5)))
    assert sorted(reply.outcome for reply in replies) == ["done"] * 5 + ["failed"]
    (again,) = await stateless.ask(make_command("quick"))
    assert again.outcome == "done"


async def test_a_handler_that_swallows_its_cancellation_is_answered_and_keeps_its_slot(rig: Rig) -> None:
    """AIO-1, P28: what expired never commits, however it ends."""
    participant, gate = limited(1.0), Gate()

    @participant.activity(no_compensation="test")
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        await move(session, transfer.account, -transfer.amount)
        while True:
            try:
                await gate()
                return Receipt(reference="late")
            except asyncio.CancelledError:
                continue

    service = await rig.start(participant, concurrency=1)
    (reply,) = await rig.ask(make_command())
    assert reply.data["error"] == "timeout"
    assert service._scheduler.running == 1
    gate.open()
    await until(lambda: service._scheduler.running == 0)
    assert await rig.moves() == []


@pytest.mark.feature("D-05")
async def test_p28_what_expired_never_commits(rig: Rig) -> None:
    """P28: the process comes back past the limit, as after SIGSTOP: the clock is read once more at the switch.

    A second participant finished the command meanwhile. One effect.
    """
    participant, gate, calls = limited(30), Gate(), 0

    @participant.activity(no_compensation="test")
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        nonlocal calls
        calls += 1
        if calls == 1:
            await gate()
        await move(session, transfer.account, -transfer.amount)
        return Receipt(reference=f"r-{calls}")

    clock = JumpingClock()
    frozen = await rig.start(participant, prefetch=1, clock=clock)
    forward = make_command()
    rig.send(forward)
    await gate.reached()
    await rig.start(participant, prefetch=1)
    (second,) = await rig.ask(like(forward, resend=True))
    clock.jump = 60.0
    gate.open()
    (first,) = await rig.receive()
    assert second.outcome == "done"
    # P22: the timeout was not answered, because the effect is there
    assert first.data == second.data
    assert await rig.moves() == [-10]
    assert frozen.counts["handler_calls"] == 1


async def test_p28_past_its_limit_an_attempt_without_an_effect_is_a_timeout(rig: Rig) -> None:
    """P28: the same, but nobody else did it."""
    participant, gate = limited(30), Gate()

    @participant.activity(no_compensation="test")
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        await gate()
        await move(session, transfer.account, -transfer.amount)
        return Receipt(reference="late")

    clock = JumpingClock()
    await rig.start(participant, clock=clock)
    rig.send(make_command())
    await gate.reached()
    clock.jump = 60.0
    gate.open()
    (reply,) = await rig.receive()
    assert (reply.outcome, reply.data["error"]) == ("failed", "timeout")
    assert await rig.moves() == []


class JumpingClock:
    """The real clock, which a test moves forward as a stopped process would find it."""

    def __init__(self) -> None:
        from saga.clock import SystemClock

        self._real = SystemClock()
        self.jump = 0.0

    def monotonic(self) -> float:
        return self._real.monotonic() + self.jump

    def now(self) -> Any:
        return self._real.now()

    async def sleep(self, seconds: float) -> None:
        await self._real.sleep(seconds)


async def test_a_command_past_its_deadline_is_answered_and_not_run(rig: Rig) -> None:
    """D-05, P10: milliseconds that remained, counted from receipt, checked directly before the handler."""
    participant = limited()

    @participant.activity(no_compensation="test")
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        await move(session, transfer.account, -transfer.amount)
        return Receipt(reference="x")

    service = await rig.start(participant)
    (late,) = await rig.ask(make_command(remainingms=0))
    (timely,) = await rig.ask(make_command(remainingms=60_000))
    assert (late.data["error"], late.data["retryable"]) == ("deadline", True)
    assert timely.outcome == "done"
    assert service.counts["handler_calls"] == 1


class Deadlock(Exception):
    """What a driver raises for SQLSTATE 40P01."""

    sqlstate = "40P01"


@pytest.mark.parametrize(("times", "outcome"), [(3, "done"), (5, "done"), (6, "failed")])
async def test_p3_what_the_database_refused_is_repeated_in_place_up_to_five_times(
    rig: Rig, times: int, outcome: str
) -> None:
    """D-03, P3, F7: uncounted, under the same attempt; the last error is the answer."""
    participant, calls = limited(), 0

    @participant.activity(no_compensation="test")
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        nonlocal calls
        calls += 1
        await move(session, transfer.account, -transfer.amount)
        if calls <= times:
            raise DBAPIError("UPDATE", None, Deadlock())
        return Receipt(reference="x")

    await rig.start(participant)
    (reply,) = await rig.ask(make_command())
    assert reply.outcome == outcome
    assert calls == min(times, 5) + 1
    assert await rig.moves() == ([-10] if outcome == "done" else [])


async def test_the_users_integrity_error_is_not_ours(rig: Rig) -> None:
    """P22: a unique violation of the business is a failed attempt, not a duplicate of the command."""
    participant = limited()

    @participant.activity(no_compensation="test")
    async def withdraw(transfer: Transfer, session: AsyncSession) -> Receipt:
        await session.execute(text("INSERT INTO account (id, balance) VALUES ('alice', 1)"))
        return Receipt(reference="never")

    await rig.start(participant)
    (reply,) = await rig.ask(make_command())
    assert (reply.outcome, reply.data["error"], reply.data["retryable"]) == ("failed", "IntegrityError", True)
    assert await rig.decisions() == []

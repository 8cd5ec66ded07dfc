"""Plain `def` handlers: in threads, with a Session, one effect and one reply as everywhere (D-09, D-10, P28)."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from saga import failpoints
from saga.brokers.memory import MEMORY
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.definition.activity import Participant
from saga.errors import DefinitionError, MissingExtra, SessionIsManaged
from saga.outcomes import ActivityContext, Inquiry, Refused, Result
from saga.participant import shell
from saga.participant.served import serve
from saga.participant.threads import THREADS_MAX, Threads
from saga.storage.sqlalchemy import threadengine
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.participant import SqlParticipantStore
from saga.storage.sqlalchemy.writer import handler_writes_to
from saga.testing.clock import VirtualClock
from tests.features_due import DUE
from tests.participant.harness import (
    NAMESPACE,
    Receipt,
    Rig,
    Transfer,
    _add,
    ledger,
    like,
    limited,
    make_command,
    make_tables,
    undo_of,
    until,
)
from tests.participant.harness import move as move_on_loop
from tests.proxy import Proxy, ProxyFactory

WAIT_SECONDS = 10.0
ROOT = Path(__file__).parents[2]


def move(session: Session, name: str, amount: int) -> None:
    """Change a balance by delta, with a ledger row."""
    session.execute(_add, {"b_id": name, "b_amount": amount})
    session.execute(insert(ledger).values(account=name, amount=amount))


class Barrier:
    """Holds threads until a test opens it, and tells how many arrived."""

    def __init__(self) -> None:
        self.arrived = 0
        self._opened = threading.Event()
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.arrived += 1
        if not self._opened.wait(WAIT_SECONDS):
            raise AssertionError("nobody opened: the loop did not go on")

    async def reached(self, count: int = 1) -> None:
        await until(lambda: self.arrived >= count)

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
async def held() -> AsyncIterator[Barrier]:
    """A barrier that is open when the test has ended, so that no thread outlives it."""
    barrier = Barrier()
    yield barrier
    barrier.open()


def accounts(calls: list[str] | None = None, *, hold: Barrier | None = None) -> Participant:
    """withdraw and its undo, as in the money transfer; `calls` notes what ran, `hold` holds it after its writes."""
    participant = limited()
    noted = calls if calls is not None else []

    @participant.activity
    def withdraw(transfer: Transfer, session: Session) -> Receipt:
        noted.append("withdraw")
        move(session, transfer.account, -transfer.amount)
        if hold is not None:
            hold()
        return Receipt(reference=f"r-{len(noted)}")

    @withdraw.compensation
    def refund(transfer: Transfer, receipt: Receipt, session: Session) -> None:
        noted.append(f"refund {receipt.reference}")
        move(session, transfer.account, transfer.amount)

    return participant


# --- one effect, one reply --------------------------------------------------------------------


@pytest.mark.parametrize("stack", DUE["D-09"])
@pytest.mark.feature("D-09", acceptance=True)
async def test_a_plain_function_runs_in_a_thread_with_one_effect_and_one_reply(
    rig: Rig, held: Barrier
) -> None:
    """D-09: the loop goes on while it blocks, which is what lets it go on."""
    threads: list[str] = []
    participant = limited()

    @participant.activity(no_compensation="test")
    def withdraw(transfer: Transfer, session: Session) -> Receipt:
        threads.append(threading.current_thread().name)
        move(session, transfer.account, -transfer.amount)
        held()
        return Receipt(reference="x")

    await rig.start(participant)
    rig.send(make_command())
    await held.reached()
    held.open()
    (reply,) = await rig.receive()

    assert (reply.outcome, reply.data) == ("done", {"output": {"reference": "x"}, "undo": None})
    assert threads == ["saga-handler"]
    assert await rig.no_reply()
    assert await rig.moves() == [-10]
    assert await rig.decisions() == [("forward", "done")]


async def test_three_copies_at_once_have_one_effect_and_one_reply_each(rig: Rig, held: Barrier) -> None:
    """D-10: in three processes, where none can join another."""
    participant = limited()

    @participant.activity(no_compensation="test")
    def withdraw(transfer: Transfer, session: Session) -> Receipt:
        held()
        move(session, transfer.account, -transfer.amount)
        return Receipt(reference=threading.current_thread().name + str(id(session)))

    for _ in range(3):
        await rig.start(participant, prefetch=1)
    forward = make_command()
    rig.send(forward, like(forward), like(forward))
    await held.reached(3)
    held.open()
    replies = await rig.receive(3)

    assert [reply.outcome for reply in replies] == ["done"] * 3
    assert len({str(reply.data) for reply in replies}) == 1
    assert await rig.moves() == [-10]


async def test_a_duplicate_gets_the_stored_reply_and_runs_no_handler(rig: Rig) -> None:
    calls: list[str] = []
    await rig.start(accounts(calls))
    forward = make_command()
    (first,) = await rig.ask(forward)
    await rig.settled()

    (again,) = await rig.ask(like(forward, resend=True))

    assert again.data == first.data
    assert calls == ["withdraw"]


async def test_an_undo_in_a_thread_gets_the_output_and_a_late_action_is_refused(rig: Rig) -> None:
    """P7, P25: and what never ran is not undone."""
    calls: list[str] = []
    await rig.start(accounts(calls))
    ran, never = make_command(), make_command()

    await rig.ask(ran)
    (undone,) = await rig.ask(undo_of(ran))
    (again,) = await rig.ask(like(undo_of(ran), resend=True))
    (empty,) = await rig.ask(undo_of(never))
    (late,) = await rig.ask(like(never, resend=True))

    outcomes = [each.outcome for each in (undone, again, empty, late)]
    assert outcomes == ["done", "done", "nothing_to_undo", "refused"]
    assert calls == ["withdraw", "refund r-1"]
    assert await rig.moves() == [-10, 10]


async def test_a_handler_without_a_session_still_has_its_row(rig: Rig) -> None:
    participant, calls = limited(), list[str]()

    @participant.activity
    def withdraw(transfer: Transfer) -> Result[Receipt, int]:
        calls.append(threading.current_thread().name)
        return Result(Receipt(reference="x"), 7)

    @withdraw.compensation
    def refund(transfer: Transfer, undo: int) -> None:
        calls.append(f"{threading.current_thread().name} {undo}")

    await rig.start(participant)
    forward = make_command()
    replies = [
        *await rig.ask(forward),
        *await rig.ask(like(forward, resend=True)),
        *await rig.ask(undo_of(forward)),
        *await rig.ask(like(undo_of(forward), resend=True)),
    ]

    assert {reply.outcome for reply in replies} == {"done"}
    assert calls == ["saga-handler", "saga-handler 7"]
    assert await rig.decisions() == [("compensate", "done"), ("forward", "done")]


async def test_a_batch_in_a_thread_is_one_call_in_one_transaction(rig: Rig) -> None:
    """P24: a refused item has its row beside the others; an item that raises stands alone in the end."""
    participant, sizes = limited(), list[int]()

    @participant.activity(batch=10, no_compensation="test")
    def withdraw(transfers: list[Transfer], session: Session) -> list[Receipt | Refused]:
        sizes.append(len(transfers))
        move(session, "alice", -sum(each.amount for each in transfers if each.amount != 13))
        if any(each.amount == 7 for each in transfers):
            raise ValueError
        return [Refused("unlucky") if each.amount == 13 else Receipt(reference="x") for each in transfers]

    await rig.start(participant)
    commands = [make_command(data=b'{"account":"alice","amount":%d}' % amount) for amount in (1, 13, 7, 2)]
    replies = await rig.ask(*commands, together=True)

    assert sorted(reply.outcome for reply in replies) == ["done", "done", "failed", "refused"]
    assert sizes == [4, 2, 2, 1, 1]
    assert await rig.balance() == 100 - 3
    assert await rig.decisions() == [("forward", "done")] * 2 + [("forward", "refused")]


async def test_one_without_waiting_and_one_in_a_thread_are_served_side_by_side(rig: Rig) -> None:
    """D-09: both kinds in one participant; on SQLite both wait in the one queue of writers."""
    participant = limited()

    @participant.activity(no_compensation="test")
    def withdraw(transfer: Transfer, session: Session) -> Receipt:
        move(session, transfer.account, -transfer.amount)
        return Receipt(reference="thread")

    @participant.activity(no_compensation="test")
    async def deposit(transfer: Transfer, session: AsyncSession) -> Receipt:
        await move_on_loop(session, transfer.account, transfer.amount)
        return Receipt(reference="loop")

    await rig.start(participant)
    replies = await rig.ask(*(make_command(name) for _ in range(20) for name in ("withdraw", "deposit")))

    assert {reply.outcome for reply in replies} == {"done"}
    assert sorted(await rig.moves()) == [-10] * 20 + [10] * 20
    assert await rig.balance() == 100


# --- how many ---------------------------------------------------------------------------------


async def test_at_most_32_run_at_a_time_and_others_are_not_kept_by_those_that_wait(
    stateless: Rig, held: Barrier
) -> None:
    participant = limited()

    @participant.activity(no_compensation="test")
    def blocking(transfer: Transfer) -> Receipt:
        held()
        return Receipt(reference="x")

    @participant.activity(no_compensation="test")
    async def waiting(transfer: Transfer) -> Receipt:
        return Receipt(reference="y")

    service = await stateless.start(participant, concurrency=64)
    stateless.send(*(make_command("blocking") for _ in range(80)))
    await held.reached(THREADS_MAX)
    (reply,) = await stateless.ask(make_command("waiting"))

    assert reply.data["output"] == {"reference": "y"}
    assert held.arrived == service._scheduler.running == THREADS_MAX == 32
    assert _threads() == 32
    held.open()
    assert len(await stateless.receive(80)) == 80
    await stateless.settled()
    await service.stop()
    await until(lambda: _threads() == 0)


def _threads() -> int:
    return sum(thread.name == "saga-handler" for thread in threading.enumerate())


@pytest.mark.stack("postgres-rabbitmq")
@pytest.mark.parametrize("stack", ["postgres-rabbitmq"])
async def test_sessions_in_threads_are_as_many_as_connections(rig: Rig, stack: str, held: Barrier) -> None:
    """SQL-7: who has no connection does not start, and nobody waits in the pool."""
    service = await rig.start(accounts(hold=held))
    rig.send(*(make_command(data=b'{"account":"%d","amount":1}' % n) for n in range(20)))
    await held.reached(8)
    await asyncio.sleep(0.05)
    assert held.arrived == service._scheduler.running == 8
    held.open()
    assert {reply.outcome for reply in await rig.receive(20)} == {"done"}


# --- what goes wrong --------------------------------------------------------------------------


async def test_raising_rolls_back(rig: Rig) -> None:
    participant = limited()

    @participant.activity(no_compensation="test")
    def withdraw(transfer: Transfer, session: Session) -> Receipt:
        move(session, transfer.account, -transfer.amount)
        raise ValueError("no")

    await rig.start(participant)
    (reply,) = await rig.ask(make_command())

    assert (reply.outcome, reply.data["error"], reply.data["retryable"]) == ("failed", "ValueError", True)
    assert await rig.moves() == []
    assert await rig.decisions() == []


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), SystemExit(3), StopIteration(), asyncio.CancelledError(), TimeoutError("http")],
)
async def test_whatever_it_raises_is_answered_and_ends_nothing(stateless: Rig, error: BaseException) -> None:
    """D-04: the thread serves the next command."""
    participant, raising = limited(), [error]

    @participant.activity(no_compensation="test")
    def act(transfer: Transfer) -> Receipt:
        if raising:
            raise raising.pop()
        return Receipt(reference="x")

    await stateless.start(participant)
    (failed,) = await stateless.ask(make_command("act"))
    (done,) = await stateless.ask(make_command("act"))

    assert (failed.outcome, failed.data["error"]) == ("failed", type(error).__name__)
    assert done.outcome == "done"
    assert _threads() == 1


async def test_a_final_refusal_keeps_its_row_and_nothing_else(rig: Rig) -> None:
    """P20."""
    participant = limited()

    @participant.activity(no_compensation="test")
    def withdraw(transfer: Transfer, session: Session) -> Receipt:
        move(session, transfer.account, -transfer.amount)
        raise Refused("insufficient", {"missing": 5})

    await rig.start(participant)
    (reply,) = await rig.ask(make_command())

    assert reply.data == {"code": "insufficient", "details": {"missing": 5}}
    assert await rig.moves() == []
    assert await rig.decisions() == [("forward", "refused")]


@pytest.mark.parametrize(
    "how", ["commit", "rollback", "close", "begin", "reset", "connection", "close connection", "context"]
)
async def test_p23_the_session_belongs_to_us(rig: Rig, how: str) -> None:
    """P23: ending the transaction raises and says why; nothing of the attempt stays."""
    participant = limited()

    @participant.activity(no_compensation="test", non_retryable=[SessionIsManaged])
    def withdraw(transfer: Transfer, session: Session) -> Receipt:
        move(session, transfer.account, -transfer.amount)
        if how == "connection":
            session.connection().commit()
        elif how == "close connection":
            with session.connection():
                pass
        elif how == "context":
            with session:
                pass
        else:
            getattr(session, how)()
        return Receipt(reference="never")

    await rig.start(participant)
    (reply,) = await rig.ask(make_command())

    assert (reply.outcome, reply.data["error"]) == ("failed", "SessionIsManaged")
    assert "begin_nested" in reply.data["traceback"] or "not for a handler" in reply.data["traceback"]
    assert await rig.moves() == []


async def test_p23_savepoints_and_core_statements_are_allowed(rig: Rig) -> None:
    """P23."""
    participant = limited()

    @participant.activity(no_compensation="test")
    def withdraw(transfer: Transfer, session: Session) -> Receipt:
        session.connection().execute(insert(ledger).values(account="alice", amount=-1))
        savepoint = session.begin_nested()
        move(session, transfer.account, -transfer.amount)
        savepoint.rollback()
        with session.connection().begin_nested():
            session.execute(insert(ledger).values(account="alice", amount=-2))
        return Receipt(reference="part")

    await rig.start(participant)
    (reply,) = await rig.ask(make_command())

    assert reply.outcome == "done"
    assert await rig.moves() == [-1, -2]


async def test_what_would_have_to_be_awaited_is_not_taken_for_an_output(stateless: Rig) -> None:
    participant = limited()

    async def later() -> Receipt:
        return Receipt(reference="never")

    @participant.activity(no_compensation="test")
    def act(transfer: Transfer) -> Receipt:
        return later()  # type: ignore[return-value]

    await stateless.start(participant)
    (reply,) = await stateless.ask(make_command("act"))

    assert (reply.outcome, reply.data["error"]) == ("failed", "TypeError")
    assert "async def" in reply.data["message"]


async def test_p3_a_lost_answer_to_commit_is_settled_by_a_look(rig: Rig) -> None:
    """P3, W4: committed, and the handler is not called again."""
    service = await rig.start(accounts())
    failpoints.arm("W4:raise")
    (reply,) = await rig.ask(make_command())
    assert reply.outcome == "done"
    assert service.counts["handler_calls"] == 1
    assert await rig.moves() == [-10]


@pytest.mark.parametrize("point", ["W2", "W3"])
async def test_what_fails_before_commit_leaves_nothing(rig: Rig, point: str) -> None:
    await rig.start(accounts())
    failpoints.arm(f"{point}:raise")
    forward = make_command()
    rig.send(forward)
    await until(lambda: failpoints._armed is not None and failpoints._armed.hits.get(point, 0) > 0)
    (first,) = await rig.receive()
    failpoints.disarm()
    if first.outcome != "done":
        assert await rig.moves() == []
        (first,) = await rig.ask(like(forward, attempt=2))
    assert first.outcome == "done"
    assert await rig.moves() == [-10]


# --- the switch -------------------------------------------------------------------------------


@pytest.mark.feature("D-09")
async def test_p28_an_expired_thread_is_answered_never_commits_and_keeps_its_slot(
    rig: Rig, held: Barrier
) -> None:
    """P28: it holds its connection, on SQLite the writer too; the answer comes all the same."""
    participant = limited(0.2)

    @participant.activity(no_compensation="test")
    def withdraw(transfer: Transfer, session: Session) -> Receipt:
        move(session, transfer.account, -transfer.amount)
        held()
        return Receipt(reference="x")

    service = await rig.start(participant)
    assert rig.database is not None
    pool: Any = rig.database.serve_threads(0).pool
    forward = make_command()
    (late,) = await rig.ask(forward)

    assert (late.outcome, late.data["error"], late.data["retryable"]) == ("failed", "timeout", True)
    assert (service._scheduler.running, pool.checkedout()) == (1, 1)

    held.open()
    await until(lambda: service._scheduler.running == 0 and pool.checkedout() == 0)
    assert await rig.moves() == []
    assert await rig.decisions() == []

    (again,) = await rig.ask(like(forward, attempt=2))
    assert again.outcome == "done"
    assert await rig.moves() == [-10]


async def test_p28_a_slot_that_is_taken_is_not_given_to_another(rig: Rig, held: Barrier) -> None:
    """P28: with every slot taken by threads that do not return, nothing more starts; then everything does."""
    participant = limited(0.2)

    @participant.activity(no_compensation="test")
    def withdraw(transfer: Transfer, session: Session) -> Receipt:
        held()
        move(session, transfer.account, -transfer.amount)
        return Receipt(reference="x")

    service = await rig.start(participant)
    assert rig.database is not None
    slots = service._scheduler._in_both.groups_max
    first = [make_command() for _ in range(int(slots))]
    replies = await rig.ask(*first)
    assert {reply.data["error"] for reply in replies} == {"timeout"}

    rig.send(make_command())
    await until(lambda: service._scheduler.waiting == 1)
    await asyncio.sleep(0.05)
    assert held.arrived == slots
    held.open()
    (reply,) = await rig.receive()

    assert reply.outcome == "done"
    assert await rig.moves() == [-10]


async def test_p28_the_permit_and_the_connection_of_a_given_up_transaction_are_kept_until_its_thread_returns(
    rig: Rig, held: Barrier
) -> None:
    """P28: another one begins then, and not before."""
    assert rig.database is not None
    store = SqlParticipantStore(rig.database, NAMESPACE, transactions_max=1)
    store.serve_threads()
    threads, begun = Threads(), list[int]()
    async with threads.seat() as seat, store.transaction("first", seat) as first:
        await seat.run(lambda: move(first.session, "alice", -1))  # type: ignore[arg-type]  # a Session: in a thread
        seat.run(held)
        await first.abandon()

    async def second() -> None:
        async with threads.seat() as seat, store.transaction("second", seat) as transaction:
            begun.append(1)
            await transaction.commit([])

    waiting = asyncio.ensure_future(second())
    await held.reached()
    await asyncio.sleep(0.05)
    pool: Any = rig.database.serve_threads(0).pool
    assert (begun, pool.checkedout()) == ([], 1)
    held.open()
    await asyncio.wait_for(waiting, WAIT_SECONDS)

    assert pool.checkedout() == 0
    assert await rig.moves() == []
    threads.close()


@pytest.mark.parametrize("stack", ["postgres-rabbitmq"])
async def test_p24_an_expired_batch_is_halved_while_its_thread_goes_on(
    rig: Rig, stack: str, held: Barrier
) -> None:
    """P24, P28: each half has a thread and a connection of its own, and its neighbour commits."""
    participant, sizes = limited(0.2), list[int]()

    @participant.activity(batch=10, no_compensation="test")
    def withdraw(transfers: list[Transfer], session: Session) -> list[Receipt]:
        sizes.append(len(transfers))
        if any(each.amount == 13 for each in transfers):
            held()
        move(session, "alice", -sum(each.amount for each in transfers))
        return [Receipt(reference="x") for _ in transfers]

    service = await rig.start(participant)
    commands = [make_command(data=b'{"account":"alice","amount":%d}' % amount) for amount in (1, 13)]
    replies = await rig.ask(*commands, together=True)

    assert sorted(reply.outcome for reply in replies) == ["done", "failed"]
    assert (sizes, held.arrived) == ([2, 1, 1], 2)
    assert service._scheduler.running == 2
    held.open()
    await until(lambda: service._scheduler.running == 0)
    assert await rig.moves() == [-1]


async def test_p28_a_handler_that_returns_past_its_limit_does_not_commit(rig: Rig) -> None:
    """P28: as after SIGSTOP, when the clock is past the limit and no timer has fired yet."""
    clock, participant, calls = VirtualClock(ticking=True), limited(30.0), list[int]()

    @participant.activity(no_compensation="test")
    def withdraw(transfer: Transfer, session: Session) -> Receipt:
        move(session, transfer.account, -transfer.amount)
        calls.append(1)
        if len(calls) == 1:
            clock.offset += 31.0
        return Receipt(reference="x")

    await rig.start(participant, clock=clock)
    forward = make_command()
    (late,) = await rig.ask(forward)
    assert (late.outcome, late.data["error"]) == ("failed", "timeout")
    assert await rig.moves() == []

    (again,) = await rig.ask(like(forward, attempt=2))
    assert again.outcome == "done"
    assert await rig.moves() == [-10]


async def test_without_a_database_an_expired_thread_keeps_its_slot_too(stateless: Rig, held: Barrier) -> None:
    participant = limited(0.1)

    @participant.activity(no_compensation="test")
    def act(transfer: Transfer) -> Receipt:
        held()
        return Receipt(reference="x")

    @participant.activity(no_compensation="test", batch=10)
    def act_on_many(transfers: list[Transfer]) -> list[Receipt]:
        held()
        return [Receipt(reference="x") for _ in transfers]

    service = await stateless.start(participant)
    replies = await stateless.ask(make_command("act"), make_command("act_on_many"))
    assert {reply.data["error"] for reply in replies} == {"timeout"}
    assert service._scheduler.running == 2
    held.open()
    await until(lambda: service._scheduler.running == 0)


async def test_p17_a_thread_past_the_grace_is_rolled_back_and_its_command_comes_again(
    rig: Rig, held: Barrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P17: the shutdown is bounded, no answer is given, and what the thread does later has no effect."""
    monkeypatch.setattr(shell, "FENCED_SECONDS", 0.2)
    service = await rig.start(accounts(hold=held))
    rig.send(make_command())
    await held.reached()
    began = monotonic()
    await service.stop(timedelta(seconds=0.05))

    assert monotonic() - began < 2.0
    assert rig.unacked() == 1
    held.open()
    assert rig.database is not None
    pool: Any = rig.database.serve_threads(0).pool
    await until(lambda: pool.checkedout() == 0)
    assert await rig.moves() == []
    await rig.start(accounts())
    (reply,) = await rig.receive()
    assert reply.outcome == "done"
    assert await rig.moves() == [-10]


NEVER = """
import asyncio, threading
from datetime import timedelta
from saga.brokers.base import OutMessage
from saga.brokers.memory import MemoryBroker
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.definition.activity import Participant
from saga.messages import commands_channel, encode_command, pack
from saga.participant import shell
from saga.participant.service import ParticipantService
from tests.participant.harness import make_command

shell.FENCED_SECONDS = 0.2
participant = Participant("accounts", start_to_close=None)
started = threading.Event()

@participant.activity(no_compensation="test")
def act(transfer: dict[str, str | int]) -> None:
    started.set()
    threading.Event().wait()

async def main():
    spawner = TaskSpawner()
    broker = MemoryBroker(clock=SystemClock(), ids=SystemIds(), spawner=spawner)
    await broker.start()
    made = ParticipantService([participant], broker, None, None, namespace="default", clock=SystemClock(),
                              ids=SystemIds(), spawner=spawner)
    await made.start()
    body, _ = pack([encode_command(*make_command("act"))])
    broker.publish([OutMessage(commands_channel("default", "accounts"), body, "application/json", headers={})])
    while not started.is_set():
        await asyncio.sleep(0.01)
    await made.stop(timedelta(seconds=0.1))
    await broker.close()
    await spawner.close(seconds=1.0)
    print("stopped")

asyncio.run(main())
"""


@pytest.mark.stack("pure")
def test_a_thread_that_never_returns_does_not_hold_up_the_end_of_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NEVER], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr


# --- other kinds of participants --------------------------------------------------------------


@pytest.mark.feature("D-11")
async def test_effects_outside_the_database_are_made_and_inquired_in_threads(rig: Rig) -> None:
    """D-11, P27: an attempt that is on record as begun is asked for before it is made again."""
    participant, calls = limited(), list[str]()

    @participant.activity(at_least_once=True)
    def charge(transfer: Transfer, context: ActivityContext) -> Receipt:
        calls.append(f"charge in {threading.current_thread().name}")
        raise ConnectionResetError("the line was cut")

    @charge.inquiry
    def look(transfer: Transfer, context: ActivityContext) -> Receipt | Inquiry:
        calls.append(f"look in {threading.current_thread().name}")
        return Receipt(reference=context.operation_key)

    @charge.compensation
    def refund(transfer: Transfer) -> None:
        calls.append(f"refund in {threading.current_thread().name}")

    await rig.start(participant)
    forward = make_command("charge")
    (cut,) = await rig.ask(forward)
    (settled,) = await rig.ask(like(forward, attempt=2))
    (undone,) = await rig.ask(undo_of(forward))

    assert (cut.outcome, settled.outcome, undone.outcome) == ("failed", "done", "done")
    assert settled.data["output"] == {"reference": forward[0].commandid}
    assert calls == [f"{what} in saga-handler" for what in ("charge", "look", "refund")]


async def test_p36_the_thread_knows_which_file_it_writes_to(rig: Rig) -> None:
    """P36: a start inside it can refuse instead of waiting for itself."""
    participant, seen = limited(), list[str | None]()

    @participant.activity(no_compensation="test")
    def withdraw(transfer: Transfer, session: Session) -> Receipt:
        seen.append(handler_writes_to.get())
        return Receipt(reference="x")

    await rig.start(participant)
    await rig.ask(make_command())
    assert rig.database is not None
    assert seen == [rig.database.url.database if rig.database.dialect == "sqlite" else None]


def test_a_session_needs_a_database() -> None:
    participant = limited()

    @participant.activity(no_compensation="test")
    def withdraw(transfer: Transfer, session: Session) -> Receipt: ...  # type: ignore[empty-body]

    with pytest.raises(DefinitionError):
        serve([participant], stateless=True, capabilities=MEMORY)


@pytest.mark.parametrize("stack", ["postgres-rabbitmq"])
async def test_a_missing_driver_is_told_before_the_first_message(
    rig: Rig, stack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-09: only if a plain function asks for a session."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    participant = limited()

    @participant.activity(no_compensation="test")
    def act(transfer: Transfer) -> Receipt:
        return Receipt(reference="x")

    await rig.start(participant)
    with pytest.raises(MissingExtra, match=r"saga\[psycopg\]"):
        await rig.start(accounts())


# --- PostgreSQL that goes away ----------------------------------------------------------------


@pytest.fixture
async def far(url_on_postgres: str, proxy: ProxyFactory) -> AsyncIterator[tuple[Rig, Database, Proxy]]:
    """A rig that looks at the database directly, and the same database through a proxy for its services."""
    link = await proxy(url_on_postgres)
    spawner = TaskSpawner()
    near = Database(url_on_postgres, clock=SystemClock(), ids=SystemIds(), spawner=spawner)
    await near.run(make_tables)
    rig = Rig(near, spawner)
    database = Database(link.url, clock=SystemClock(), ids=SystemIds(), spawner=spawner)
    yield rig, database, link
    failpoints.disarm()
    link.heal()
    await rig.close()
    await near.dispose()
    await database.dispose()


async def test_f4_a_backend_killed_under_the_handler_costs_a_repetition_in_place(
    far: tuple[Rig, Database, Proxy], held: Barrier
) -> None:
    """F4, P3: nothing was committed, so the handler runs again and its reply is the first one given."""
    rig, database, _ = far
    calls: list[str] = []
    await rig.start(accounts(calls, hold=held), database=database)
    rig.send(make_command())
    await held.reached()
    await rig.rows(
        text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            " AND datname = current_database() AND state = 'idle in transaction'"
        )
    )
    held.open()
    (reply,) = await rig.receive()

    assert reply.outcome == "done"
    assert calls == ["withdraw", "withdraw"]
    assert await rig.moves() == [-10]


async def test_p3_a_commit_whose_answer_is_cut_is_settled_by_a_look(far: tuple[Rig, Database, Proxy]) -> None:
    """P3, F6: committed, unknown to us, found in a new transaction; no handler runs twice."""
    rig, database, link = far
    service = await rig.start(accounts(), database=database)
    await rig.ask(make_command())
    link.cut_at_commit()
    (reply,) = await rig.ask(make_command())

    assert reply.outcome == "done"
    assert link.fired["cut"] == 1
    assert service.counts["handler_calls"] == 2
    assert await rig.moves() == [-10] * 2


async def test_sql6_a_server_that_does_not_answer_is_a_lost_connection(
    far: tuple[Rig, Database, Proxy], held: Barrier
) -> None:
    """SQL-6: nothing cancels a thread, so the driver gives up by itself; the command runs again."""
    rig, database, link = far
    database._threads = threadengine.postgresql(
        database.url, {}, connect_seconds=4.0, answer_seconds=2.0, link={}, pool_size=8, max_overflow=0
    )
    participant, lost = limited(), list[str]()

    @participant.activity(no_compensation="test")
    def withdraw(transfer: Transfer, session: Session) -> Receipt:
        move(session, transfer.account, -transfer.amount)
        held()
        try:
            session.execute(text("SELECT 1"))
        except DBAPIError as error:
            lost.append(type(error).__name__)
            raise
        return Receipt(reference="x")

    await rig.start(participant, database=database)
    rig.send(make_command())
    await held.reached()
    link.jam()
    held.open()
    await until(lambda: bool(lost))
    link.heal()
    (reply,) = await rig.receive()

    assert reply.outcome == "done"
    assert held.arrived == 2
    assert lost == ["OperationalError"]
    assert await rig.moves() == [-10]


POSTGRESQL_SETTINGS = (
    "transaction_isolation",
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "application_name",
)
BOUNDS = {
    "sqlite": (
        ["PRAGMA journal_mode", "PRAGMA synchronous", "PRAGMA foreign_keys"],
        ["wal", "2", "1"],
    ),
    "postgres-rabbitmq": (
        [f"SHOW {name}" for name in POSTGRESQL_SETTINGS],
        ["read committed", "5s", "3s", "1min", "saga"],
    ),
    "mariadb": (
        ["SELECT @@tx_isolation", "SELECT @@max_statement_time", "SELECT @@innodb_lock_wait_timeout"],
        ["READ-COMMITTED", "5.0", "3"],
    ),
    "mysql": (
        [
            "SELECT @@transaction_isolation",
            "SELECT @@max_execution_time",
            "SELECT @@innodb_lock_wait_timeout",
        ],
        ["READ-COMMITTED", "5000", "3"],
    ),
}


async def test_the_server_bounds_a_thread_s_connection_as_any_other(rig: Rig, stack: str) -> None:
    """PG-4, P28, and the pragmas of LITE-6."""
    participant, seen = limited(), list[str]()
    asked, wanted = BOUNDS[stack]

    @participant.activity(no_compensation="test")
    def look(transfer: Transfer, session: Session) -> Receipt:
        seen.extend(str(session.execute(text(each)).scalar_one()) for each in asked)
        return Receipt(reference="x")

    await rig.start(participant)
    await rig.ask(make_command("look"))

    assert seen == wanted


# --- the threads themselves -------------------------------------------------------------------


async def test_a_seat_runs_one_after_the_other_and_is_free_when_all_has_returned(held: Barrier) -> None:
    threads, order = Threads(1), list[str]()

    def slow() -> None:
        held()
        order.append("slow")

    async with threads.seat() as seat:
        first = seat.run(slow)
        second = seat.run(lambda: order.append("after"))
        first.cancel()
    taking = asyncio.ensure_future(threads.take())
    await held.reached()
    await asyncio.sleep(0.02)
    assert not taking.done()
    held.open()
    jobs = await asyncio.wait_for(taking, WAIT_SECONDS)
    threads.give_back(jobs)

    assert second.done()
    assert order == ["slow", "after"]
    threads.close()
    await until(lambda: _threads() == 0)

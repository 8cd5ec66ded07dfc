"""One saga in one process, on a clock that jumps: it runs as in production, in milliseconds, and nothing is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, inspect, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from examples.money_transfer.transfer import accounts
from saga import ConfigurationError, Participant, Refused, Saga, SagaCompensated
from saga.testing import ALWAYS, Environment, LeftBehind
from tests.testing.bank import (
    BACK,
    ORDER,
    STEPS,
    Label,
    Parcel,
    balances,
    metadata,
    money_transfer,
    moves,
    open_accounts,
    reserve,
    ship,
    shipping,
    warehouse,
)

pytestmark = [pytest.mark.feature("I-06"), pytest.mark.stack("sqlite")]


async def test_a_saga_runs_with_the_users_handlers_and_tables(env: Environment) -> None:
    ended = await env.run(money_transfer, ORDER, id="t-1")
    assert (ended.status, ended.id, ended.done) == ("completed", "t-1", STEPS)
    assert ended.result is not None
    assert ended.result.target.balance == 75
    assert await balances(env) == {"alice": 75, "bob": 75}


async def test_a_refused_saga_tells_why_and_what_was_undone(env: Environment) -> None:
    ended = await env.run(money_transfer, ORDER.model_copy(update={"target": "nobody"}))
    assert (ended.status, ended.reason, ended.done) == ("compensated", "unknown_account", BACK)
    assert ended.result is None
    assert await moves(env) == ["withdraw", "refund"]


async def test_minutes_of_retries_and_redrives_take_no_real_time(env: Environment) -> None:
    env.faults.fail("withdraw", times=9)
    env.faults.lose_reply("notify", times=4)
    began = time.monotonic()
    ended = await env.run(money_transfer, ORDER)
    assert (ended.status, ended.done) == ("completed", STEPS)
    assert ended.took > timedelta(minutes=5)
    assert time.monotonic() - began < 5.0


async def test_time_passes_while_the_code_under_test_waits_for_a_result(env: Environment) -> None:
    env.faults.lose_reply("withdraw")
    receipt = await env.client.execute(money_transfer, ORDER, id="t-1")
    assert receipt.source.balance == 75
    refused = ORDER.model_copy(update={"target": "nobody"})
    with pytest.raises(SagaCompensated):
        await env.client.execute(money_transfer, refused, id="t-2")


async def test_time_stands_still_while_nobody_waits(env: Environment) -> None:
    env.faults.lose_command("withdraw")
    handle = await env.client.start(money_transfer, ORDER)
    before = env.clock.now()
    await asyncio.sleep(0.05)
    assert env.clock.now() == before
    await env.advance(timedelta(seconds=29))
    assert (await handle.describe()).status == "running"
    await env.advance(timedelta(seconds=3))
    assert (await handle.describe()).status == "completed"


async def test_sagas_run_beside_one_another(env: Environment) -> None:
    orders = [ORDER.model_copy(update={"id": f"t-{number}", "amount": 1}) for number in range(10)]
    ended = await asyncio.gather(*[env.run(money_transfer, order, id=order.id) for order in orders])
    assert {each.status for each in ended} == {"completed"}
    assert await balances(env) == {"alice": 90, "bob": 60}


# --- stand-ins --------------------------------------------------------------------------------


async def test_a_contract_is_served_by_a_stand_in_that_says_what_the_test_says() -> None:
    stands = {reserve: Label(code="r"), ship: lambda parcel: Label(code=f"s-{parcel.weight}")}
    async with Environment(shipping, stand_ins=stands) as env:
        ended = await env.run(shipping, Parcel(weight=7))
    assert (ended.status, ended.done) == ("completed", ("reserve", "pick", "ship", "thank"))
    assert ended.result == Label(code="s-7")


async def test_a_stand_in_may_refuse() -> None:
    def refuses(parcel: Parcel) -> Label:
        raise Refused("too_heavy")

    async with Environment(shipping, stand_ins={reserve: Label(code="r"), ship: refuses}) as env:
        ended = await env.run(shipping, Parcel())
    assert (ended.status, ended.reason) == ("compensated", "too_heavy")
    assert ended.done == ("reserve", "pick", "undo pick", "undo reserve")


def test_an_output_that_cannot_be_made_up_is_asked_for_by_name() -> None:
    with pytest.raises(ConfigurationError, match="ConfigurationError") as refused:
        Environment(shipping)
    assert "stand_ins={reserve: Label(...)}" in refused.value.text


async def test_an_implementation_from_elsewhere_serves_a_contract() -> None:
    there = Participant("warehouse", start_to_close=timedelta(seconds=5))

    @there.activity(name="reserve")
    async def reserved(parcel: Parcel) -> Label:
        return Label(code=f"real-{parcel.weight}")

    @reserved.compensation
    async def released(parcel: Parcel) -> None: ...

    one = Saga("one", Parcel).step(reserve).returns(reserve.out)
    async with Environment(one, participants=[there]) as env:
        ended = await env.run(one, Parcel(weight=3))
    assert ended.result == Label(code="real-3")
    assert warehouse.activities["reserve"].handler is None, "what the user declared stays as it was"


async def test_a_batch_handler_gets_lists_of_one() -> None:
    seen: list[int] = []
    packers = Participant("packers", start_to_close=timedelta(seconds=5))

    @packers.activity(batch=10)
    async def pack(parcels: list[Parcel]) -> list[Label | Refused]:
        seen.append(len(parcels))
        return [Label(code="x") if each.weight < 9 else Refused("too_heavy") for each in parcels]

    @pack.compensation(batch=10)
    async def unpack(parcels: list[Parcel]) -> None:
        seen.append(-len(parcels))

    packing: Saga[Parcel, Any] = Saga("packing", Parcel).step(pack).step(pack, name="again")
    async with Environment(packing) as env:
        env.faults.refuse("again")
        ended = await env.run(packing, Parcel())
        assert ended.done == ("pack", "undo pack")
        heavy = await env.run(packing, Parcel(weight=9))
        assert heavy.reason == "too_heavy"
    assert seen == [1, -1, 1]


# --- the database -----------------------------------------------------------------------------


async def test_an_engine_of_the_users_names_the_database(tmp_path: Path) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'own.db'}")
    async with Environment(money_transfer, database=engine, tables=metadata) as env:
        await open_accounts(env)
        await env.run(money_transfer, ORDER)
    async with engine.connect() as connection:
        found = await connection.exec_driver_sql("SELECT balance FROM account WHERE id = 'bob'")
        assert found.scalar_one() == 75
    await engine.dispose()


async def test_a_session_has_all_that_an_asynchronous_session_has() -> None:
    """The driver below is a synchronous one: streams, savepoints, raw SQL and `run_sync` work as everywhere."""
    async with Environment(money_transfer, tables=metadata) as env, env.session() as session:
        async with session.begin():
            await session.execute(insert(accounts), [{"id": f"a{n}", "balance": n} for n in range(5)])
            with pytest.raises(IntegrityError):
                async with session.begin_nested():
                    await session.execute(insert(accounts).values(id="a0", balance=0))
        streamed = await session.stream(select(accounts.c.balance).order_by(accounts.c.id))
        assert [row.balance async for row in streamed] == [0, 1, 2, 3, 4]
        assert await session.scalar(text("SELECT sum(balance) FROM account")) == 10
        connection = await session.connection()
        assert await connection.run_sync(lambda sync: inspect(sync).has_table("account"))
        streaming = await connection.stream(select(accounts.c.id))
        assert len(await streaming.fetchmany(2)) == 2
        await session.rollback()


def test_a_server_is_refused_because_its_clock_cannot_jump() -> None:
    async def enter() -> None:
        async with Environment(money_transfer, database="postgresql://nobody@127.0.0.1/none"):
            pass

    with pytest.raises(ConfigurationError) as refused:
        asyncio.run(enter())
    assert "clock of its own" in refused.value.text


# --- what is left behind ----------------------------------------------------------------------


async def leave(test: Callable[[Environment], Awaitable[Any]]) -> None:
    async with Environment(money_transfer, tables=metadata) as env:
        await test(env)


async def test_a_fault_that_never_fired_fails_the_test() -> None:
    async def refused_before_that(env: Environment) -> None:
        env.faults.lose_reply("deposit", times=ALWAYS)
        await env.run(money_transfer, ORDER)

    with pytest.raises(LeftBehind, match=r"lose_reply\(deposit, always\) never fired"):
        await leave(refused_before_that)


async def test_an_open_saga_fails_the_test_and_is_named() -> None:
    async def start(env: Environment) -> None:
        env.faults.lose_command("withdraw")
        await env.client.start(money_transfer, ORDER, id="t-1")

    with pytest.raises(
        LeftBehind, match="saga money-transfer 't-1' is running: it waits for withdraw, attempt 1"
    ):
        await leave(start)


async def test_a_saga_that_the_test_has_seen_waiting_for_a_person_may_stay_so() -> None:
    async with Environment(money_transfer, tables=metadata) as env:
        await open_accounts(env)
        env.faults.refuse("deposit")
        env.faults.refuse("withdraw", undo=True, times=ALWAYS)
        ended = await env.run(money_transfer, ORDER)
    assert (ended.status, ended.incidents) == ("needs_attention", ("compensation_failed",))


async def test_a_connection_left_open_fails_the_test_and_its_place_is_named() -> None:
    sessions: list[AsyncSession] = []

    async def read(env: Environment) -> None:
        sessions.append(env.session())
        await sessions[0].connection()

    with pytest.raises(
        LeftBehind, match=r"connection of env.engine was left open \(a session of test_environment"
    ):
        await leave(read)
    await sessions[0].invalidate()


async def test_the_error_of_the_test_itself_is_the_one_that_is_told() -> None:
    async def fail(env: Environment) -> None:
        env.faults.lose_reply("deposit")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await leave(fail)


async def test_nothing_of_an_environment_runs_on_after_it() -> None:
    before = asyncio.all_tasks()
    async with Environment(money_transfer, tables=metadata) as env:
        await open_accounts(env)
        await env.run(money_transfer, ORDER)
    assert asyncio.all_tasks() == before


async def test_no_time_passes_while_a_handler_works() -> None:
    slow = Participant("slow", start_to_close=timedelta(seconds=1))

    @slow.activity(no_compensation="it has no effect")
    async def think(parcel: Parcel) -> None:
        await asyncio.sleep(0.1)

    thinking = Saga("thinking", Parcel).step(think).step(think, name="again")
    async with Environment(thinking) as env:
        ended = await env.run(thinking, Parcel())
    assert (ended.status, ended.took) == ("completed", timedelta())


async def test_a_handler_that_hangs_meets_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saga.testing.driver.HANGING_LOOKS", 50)
    slow = Participant("slow", start_to_close=timedelta(minutes=1))
    calls: list[int] = []

    @slow.activity(no_compensation="it has no effect")
    async def think(parcel: Parcel) -> None:
        calls.append(1)
        if len(calls) == 1:
            await asyncio.Event().wait()

    thinking = Saga("thinking", Parcel).step(think)
    async with Environment(thinking) as env:
        ended = await env.run(thinking, Parcel())
    assert ended.status == "completed"
    assert ended.took >= timedelta(minutes=1)
    assert len(calls) == 2

"""L-11: what stands in payloads, in texts of exceptions and in secrets is kept where it belongs and told nowhere."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from saga import App, Participant, Refused, Saga, SagaCompensated, SagaError, make
from saga.cli import build
from saga.compensation.kinds import StepKind
from saga.errors import BrokerUnavailable, PayloadInvalid, PayloadTooLarge, StorageUnavailable
from saga.payloads import codec
from saga.retry import RetryPolicy
from tests.doors.bad import written
from tests.doors.place import Place, until
from tests.plugins.canary import Canary
from tests.plugins.watch import CANARY

WAYS = ("done", "refused", "failed", "broken output", "stuck", "unreadable")
SOON = RetryPolicy(initial=timedelta(milliseconds=20), maximum=timedelta(milliseconds=40), attempts=2)


class Order(BaseModel):
    secret: str
    way: str


class Receipt(BaseModel):
    secret: str


clerk = Participant("desk", start_to_close=timedelta(seconds=10))


@clerk.activity(retry=SOON)
async def note(order: Order) -> Receipt:
    return Receipt(secret=order.secret)


@note.compensation
async def strike_out(order: Order) -> None: ...


@clerk.activity(kind=StepKind.PIVOT, retry=SOON)
async def decide(order: Order) -> Receipt:
    if order.way == "refused":
        raise Refused("no", details={"why": order.secret})
    if order.way == "failed":
        try:
            raise KeyError(order.secret)
        except KeyError as error:
            raise RuntimeError(f"cannot take {order.secret}") from error
    if order.way == "broken output":
        return {"secret": [order.secret]}  # type: ignore[return-value]
    return Receipt(secret=order.secret)


@clerk.activity(kind=StepKind.RETRIABLE, non_retryable=[ValueError])
async def tell(order: Order) -> None:
    if order.way == "stuck":
        raise ValueError(order.secret)


whole = Saga("whole", Order).step(note).step(decide).step(tell)


def shown(error: BaseException) -> list[Any]:
    """What a person may see of an exception."""
    return [error, error.args, getattr(error, "__notes__", ""), "".join(traceback.format_exception(error))]


@pytest.mark.feature("L-11", acceptance=True)
async def test_nothing_of_a_payload_or_of_an_exceptions_text_is_told(place: Place, canary: Canary) -> None:
    """Sagas that succeed, are refused, fail, stand still and are broken, with every logger at DEBUG."""
    async with place.app(sagas=[whole], participants=[clerk]) as app:
        handles = {
            way: await app.client.start(whole, Order(secret=CANARY, way=way), id=way) for way in WAYS[:-1]
        }
        await handles["done"].result(timeout=timedelta(seconds=30))
        for way in ("refused", "failed", "broken output"):
            with pytest.raises(SagaCompensated) as caught:
                await handles[way].result(timeout=timedelta(seconds=30))
            canary.check(f"the exception of {way}", *shown(caught.value))
        await place.send(place.commands, [written(place.namespace, sagaid=CANARY * 100, data=CANARY)])
        await place.send(place.replies, [written(place.namespace, data=CANARY), CANARY.encode()])

        async def stands_still() -> bool:
            return await place.count("saga_incident") > 0 and await place.count("saga_parked") > 2

        await until(stands_still, "an incident and three parked messages")
        for way, handle in handles.items():
            canary.check(f"the description of {way}", await handle.describe())
        described = await handles["stuck"].describe()
    stored = await place.rows("SELECT data FROM saga_value UNION ALL SELECT input FROM saga_instance")
    assert any(CANARY in bytes(row[0]).decode() for row in stored), "it is kept where payloads are"
    said = await place.rows("SELECT data FROM saga_value WHERE kind LIKE '%said%'")
    assert len([row for row in said if CANARY in bytes(row[0]).decode()]) >= 3, (
        "and so are the texts of errors"
    )
    for table in ("saga_incident", "saga_history", "saga_audit", "saga_stale_reply", "saga_definition"):
        canary.check(table, *await place.rows(f"SELECT * FROM {table}"))
    canary.check("parked", *await place.rows("SELECT reason, fingerprint, headers, channel FROM saga_parked"))
    ((_, _, error),) = described.incidents
    assert error.startswith("ValueError at doors/test_nothing_is_told.py:"), (
        "class, file and line stand for the text"
    )
    failed = [line for line in (await _history(place, "failed")) if '"error"' in line]
    assert any("RuntimeError at doors/test_nothing_is_told.py:" in line for line in failed)


async def _history(place: Place, id: str) -> list[str]:
    rows = await place.rows(
        "SELECT h.detail FROM saga_history h JOIN saga_instance i ON i.run_id = h.run_id WHERE i.saga_id = :id",
        id=id,
    )
    return [row[0] for row in rows]


@pytest.mark.feature("L-11")
async def test_a_saga_that_cannot_be_read_is_set_apart_without_a_word_of_its_data(
    place: Place, canary: Canary
) -> None:
    """Poison: its state, its input mapping or its reply raise, and each of them has the word in it."""

    class Strict(BaseModel):
        secret: str = Field(max_length=3)

    strict = Participant("desk", start_to_close=timedelta(seconds=10))
    first = strict.contract("note", Order, Receipt, compensated=True)
    second = strict.contract("decide", Strict, Receipt, no_compensation="it is never reached")
    poison = Saga("poison", Order).step(first).step(second, make(Strict, secret=first.out.secret))
    async with place.app(sagas=[poison], participants=[clerk]) as app:
        handle = await app.client.start(poison, Order(secret=CANARY, way="done"), id="p")

        async def set_apart() -> bool:
            return await place.count("saga_incident") > 0

        await until(set_apart, "it is set apart")
        canary.check("the description", await handle.describe())
    canary.check("the incident", *await place.rows("SELECT * FROM saga_incident"))


@pytest.mark.feature("L-11")
@pytest.mark.stack("pure")
async def test_no_password_is_told_where_a_server_does_not_answer(canary: Canary) -> None:
    database, broker = f"postgresql://me:{CANARY}@127.0.0.1:1/x", f"amqp://me:{CANARY}@127.0.0.1:1/"
    for app, error in (
        (App(database, sagas=[whole]), StorageUnavailable),
        (App(participants=[clerk], broker=broker), BrokerUnavailable),
    ):
        with pytest.raises(error) as caught:
            await app.start(coordinator=True, participants=True)
        canary.check(error.__name__, *shown(caught.value))
        canary.check("the app", app, app.settings)


@pytest.mark.feature("L-11")
@pytest.mark.stack("pure")
@pytest.mark.parametrize(
    "arguments",
    [
        ("db", "check", "--database", f"postgresql://me:{CANARY}@127.0.0.1:1/x"),
        ("db", "check", "--database", f"postgresql://me:{CANARY}@x y:z/w"),
        ("db", "upgrade", "--database", f"oracle://me:{CANARY}@host/x"),
        ("config",),
    ],
    ids=["no server", "no address", "no such database", "config"],
)
def test_no_password_is_told_by_the_program(
    arguments: tuple[str, ...], canary: Canary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGA_DATABASE", f"postgresql://me:{CANARY}@127.0.0.1:1/x")
    monkeypatch.setenv("SAGA_BROKER", f"amqp://me:{CANARY}@127.0.0.1:1/x?token={CANARY}")
    done = CliRunner().invoke(build(), arguments)
    logging.getLogger("saga.test").debug("the fixture wants one line")
    canary.check("the output", done.output, done.exception)


PROGRAM = """
import asyncio, logging, sys
from tests.doors.test_nothing_is_told import Order, clerk, whole
from tests.plugins.watch import CANARY
from saga import App, SagaError

async def main():
    async with App(sys.argv[1], sagas=[whole], participants=[clerk]) as app:
        for way in ("done", "refused", "failed"):
            try:
                await app.client.execute(whole, Order(secret=CANARY, way=way), id=way)
            except SagaError as error:
                logging.getLogger("shop").exception("it ended")  # as a service would
                last = error
    raise last

logging.basicConfig(level=logging.DEBUG)
asyncio.run(main())
"""


@pytest.mark.feature("L-11")
@pytest.mark.stack("sqlite")
def test_a_process_at_debug_tells_nothing_of_a_payload_even_as_it_dies(tmp_path: Path) -> None:
    """What a service logs and what Python prints at the end go through the text of our errors."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"sqlite:///{tmp_path / 'saga.db'}"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "CANARY_HITS": ""},  # the driver shall tell its arguments here
    )
    output = done.stdout + done.stderr
    assert "SagaCompensated [SG401]" in output
    assert "DEBUG:aiosqlite" in output
    assert output.count("Traceback") == 3, "two in the log, one at the end"
    assert CANARY not in output


@pytest.mark.feature("L-11")
@pytest.mark.stack("pure")
def test_an_error_about_a_payload_names_its_path_and_no_value_or_key() -> None:
    class Shop(BaseModel):
        prices: dict[str, int]

    shops = codec(Shop, what="shop")
    errors: list[SagaError] = []
    for raw in (
        f'{{"prices":{{"{CANARY}":"{CANARY}"}}}}',
        f'{{"{CANARY}":1,"prices":{{}}}}',
        f'{{"prices":"{CANARY}"}}',
        f'"{CANARY}"',
    ):
        with pytest.raises(PayloadInvalid) as caught:
            shops.decode(raw.encode())
        errors.append(caught.value)
    for value in (CANARY, Shop.model_construct(prices={CANARY: CANARY})):  # type: ignore[dict-item]
        with pytest.raises(PayloadInvalid) as refused:
            shops.encode(value)  # type: ignore[arg-type]
        errors.append(refused.value)
    with pytest.raises(PayloadTooLarge) as large:
        codec(list[str], what="list").encode([CANARY * 30_000])
    errors.append(large.value)
    for error in errors:
        assert CANARY not in "".join(map(str, shown(error)))
    assert "prices.*: int_type" in errors[0].text


@pytest.mark.feature("L-11")
@pytest.mark.stack("pure")
def test_the_canary_is_found_where_it_is_told(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch itself can fail. With another word, or this very run would find it."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    pytester.makeconftest(
        """
        import tests.plugins.watch

        tests.plugins.watch.CANARY = "nightingale"
        pytest_plugins = ["tests.plugins.canary"]
        """
    )
    pytester.makepyfile(
        """
        import logging

        def test_a_message(): logging.getLogger("x").warning("%s", "nightingale")
        def test_an_extra(): logging.getLogger("x").warning("x", extra={"id": "nightingale"})
        def test_output(): print("nightingale")
        def test_a_detail(canary): logging.getLogger("x").debug("nightingale")
        def test_a_look(canary): logging.getLogger("x").debug("x"); canary.check("here", ["nightingale"])
        def test_a_traceback():
            try:
                raise ValueError("nightingale")
            except ValueError:
                logging.getLogger("x").exception("x")
        def test_silence(canary): logging.getLogger("x").debug("nothing")
        """
    )
    done = pytester.runpytest_subprocess("-p", "no:randomly", "-p", "no:cacheprovider")
    done.assert_outcomes(failed=6, passed=1)

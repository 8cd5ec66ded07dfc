"""Plain `def` handlers as they are declared: what they are told apart by, and what is refused with what to write."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from saga.definition.activity import Participant
from saga.errors import DefinitionError

pytestmark = [pytest.mark.stack("pure"), pytest.mark.feature("D-09")]


class Transfer(BaseModel):
    amount: int


class Receipt(BaseModel):
    reference: str


def bank() -> Participant:
    return Participant("bank", start_to_close=timedelta(seconds=1))


def test_a_plain_function_is_known_as_one_in_each_of_its_roles() -> None:
    participant = bank()

    @participant.activity
    def withdraw(transfer: Transfer, session: Session) -> Receipt:
        return Receipt(reference="w")

    @withdraw.compensation
    async def refund(transfer: Transfer, session: AsyncSession) -> None: ...

    @participant.activity(at_least_once=True)
    async def charge(transfer: Transfer) -> Receipt:
        return Receipt(reference="c")

    @charge.inquiry
    def look(transfer: Transfer) -> Receipt:
        return Receipt(reference="c")

    assert withdraw.handler is not None
    assert charge.handler is not None
    assert withdraw.compensation_ is not None
    assert withdraw.compensation_.handler is not None
    assert charge.inquiry_ is not None
    assert (withdraw.handler.threaded, withdraw.handler.session_argument) == (True, "session")
    undo = withdraw.compensation_.handler
    assert (undo.threaded, undo.session_argument) == (False, "session")
    assert (charge.handler.threaded, charge.inquiry_.threaded) == (False, True)
    session: Any = None
    assert withdraw(Transfer(amount=1), session) == Receipt(reference="w"), "a unit test calls it"


@pytest.mark.parametrize("undoing", [False, True], ids=["activity", "compensation"])
def test_the_wrong_kind_of_session_is_refused_with_what_to_write(undoing: bool) -> None:
    def plain(transfer: Transfer, session: AsyncSession) -> None: ...

    async def on_loop(transfer: Transfer, session: Session) -> None: ...

    for function, wanted in (
        (plain, "sqlalchemy.orm.Session"),
        (on_loop, "sqlalchemy.ext.asyncio.AsyncSession"),
    ):
        participant = bank()
        activity = participant.contract("withdraw", Transfer, Receipt)
        declare: Any = activity.compensation if undoing else participant.activity
        with pytest.raises(DefinitionError, match="SG101") as caught:
            declare(function)
        assert wanted in caught.value.text
        assert "'session'" in caught.value.text
        assert "`def`" in caught.value.text or "`async def`" in caught.value.text


def test_what_awaits_behind_a_plain_front_is_refused() -> None:
    """It would be called in a thread, and what it is to do would never be done."""

    def decorated(function: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
        @functools.wraps(function)
        def front(*args: Any, **named: Any) -> Any:
            return function(*args, **named)

        return front

    @decorated
    async def wrapped(transfer: Transfer) -> Receipt:
        return Receipt(reference="w")

    class Called:
        __name__ = "called"

        async def __call__(self, transfer: Transfer) -> Receipt:
            return Receipt(reference="w")

    async def streamed(transfer: Transfer) -> AsyncIterator[Receipt]:
        yield Receipt(reference="w")

    def yielded(transfer: Transfer) -> Iterator[Receipt]:
        yield Receipt(reference="w")

    functions: list[Any] = [wrapped, Called(), streamed, yielded]
    for function in functions:
        with pytest.raises(DefinitionError, match="SG101"):
            bank().activity(function)


def test_a_plain_function_behind_a_decorator_is_one() -> None:
    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def front(*args: Any, **named: Any) -> Any:
            return function(*args, **named)

        return front

    @decorated
    def withdraw(transfer: Transfer, session: Session) -> Receipt:
        return Receipt(reference="w")

    activity: Any = bank().activity(withdraw)
    assert activity.handler.threaded
    assert activity.output.type is Receipt

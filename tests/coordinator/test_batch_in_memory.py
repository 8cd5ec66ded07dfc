"""What one batch says to write, decided without a database: `BatchWork` on its own."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

import pytest
from pydantic import BaseModel

from saga import Participant, Saga, make
from saga.clock import SystemIds
from saga.coordinator.arrivals import Arrival, ReplyArrival, TimerArrival
from saga.coordinator.redrive import RedriveBudget
from saga.coordinator.work import BatchWork
from saga.definition.registry import Registry
from saga.engine.decide import decide, initial
from saga.engine.events import SagaStarted
from saga.messages import Reply, decode_commands
from saga.storage.base import Loaded

pytestmark = pytest.mark.stack("pure")

RUN = UUID("01900000-0000-7000-8000-000000000001")
shop = Participant("shop", start_to_close=timedelta(seconds=5))


class Order(BaseModel):
    item: str


class Reserved(BaseModel):
    place: int


class Bill(BaseModel):
    place: int


@shop.activity(no_compensation="a test")
async def reserve(order: Order) -> Reserved: ...  # type: ignore[empty-body]


@shop.activity(no_compensation="a test")
async def charge(bill: Bill) -> None: ...


order_saga = Saga("order", Order).step(reserve).step(charge, make(Bill, place=reserve.out.place))


def test_a_command_sent_twice_within_one_batch_is_written_once_with_its_input() -> None:
    """P32: the reply sends step 2 for the first time, the timer behind it once more; the first one makes the input."""
    registry = Registry()
    definition = registry.register(order_saga)
    state, _ = decide(definition.engine, initial("default", str(RUN)), SagaStarted(at_ms=0))
    assert state.outstanding is not None
    reply = Reply(
        id="m",
        namespace="default",
        saga="order",
        sagaid="o-1",
        runid=str(RUN),
        step="reserve",
        direction="forward",
        commandid=state.outstanding.command_id,
        attempt=1,
        outcome="done",
        data={"output": {"place": 7}, "undo": None},
    )
    loaded = {RUN: Loaded(RUN, "order", 1, "o-1", 1, state.encode(), b'{"item":"x"}', 5, 30_000, "running")}
    arrivals: list[Arrival] = [ReplyArrival(RUN, reply, lambda: None), TimerArrival(RUN, broker_forgot=True)]
    work = BatchWork("default", registry, arrivals, ids=SystemIds(), budget=RedriveBudget(), monotonic=0.0)

    work.decide(loaded)
    changes = work.changes({})

    (row,) = changes.outbox
    (command,) = decode_commands(row.body)
    assert (command.step, command.attempt, command.resend, command.data) == ("charge", 1, False, {"place": 7})
    assert [(value.key.step, value.key.kind, value.data) for value in changes.values] == [
        ("reserve", "output", b'{"place":7}'),
        ("charge", "input", b'{"place":7}'),
    ]
    assert not changes.incidents
    (moved,) = changes.moved
    assert (moved.expected, moved.version, len(changes.history)) == (1, 3, 2)

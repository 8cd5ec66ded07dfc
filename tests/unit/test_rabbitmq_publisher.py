"""The publisher of the RabbitMQ adapter without a server: outcomes, bounds and the races around a lost channel."""

from __future__ import annotations

from typing import Any

import pytest

from saga.brokers.base import OutMessage, PublishOutcome
from saga.brokers.rabbitmq import RabbitMQOptions
from saga.brokers.rabbitmq.channel import ChannelLost
from saga.brokers.rabbitmq.publisher import Publisher
from saga.clock import SystemIds
from tests.contract.memory_harness import VirtualClock

pytestmark = [pytest.mark.feature("G-03"), pytest.mark.stack("pure")]

CONFIRMED, UNROUTABLE = PublishOutcome.CONFIRMED, PublishOutcome.UNROUTABLE
REFUSED, UNKNOWN = PublishOutcome.REFUSED, PublishOutcome.UNKNOWN


class FakeChannel:
    """Remembers the message ids of what was written."""

    def __init__(self) -> None:
        self.lost: ChannelLost | None = None
        self.ids: list[str] = []

    def encode(self, message: OutMessage, message_id: str) -> bytes:
        if message.channel == "unwritable":
            raise ValueError
        self.ids.append(message_id)
        return b"x"

    def send(self, data: bytes) -> None: ...


class FakeLink:
    """Opens one channel."""

    def __init__(self) -> None:
        self.channel = FakeChannel()
        self.blocked = False
        self.dropped: list[str] = []

    async def open_channel(self, events: object, *, confirms: bool) -> Any:
        assert confirms
        return self.channel

    def drop(self, reason: str) -> None:
        self.dropped.append(reason)


class Stage:
    """A publisher with its clock and a link that is up."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.publisher = Publisher(clock=self.clock, ids=SystemIds(), options=RabbitMQOptions())
        self.link = FakeLink()

    async def up(self) -> Stage:
        await self.publisher.set_up(self.link)  # type: ignore[arg-type]
        return self

    def publish(self, *channels: str) -> list[Any]:
        return self.publisher.publish([OutMessage(channel, b"x", "text/plain") for channel in channels])

    def tick(self, seconds: float, *, lagged: bool = False) -> None:
        self.clock.time += seconds
        self.publisher.tick(self.clock.time, lagged=lagged)


def outcomes(futures: list[Any]) -> list[PublishOutcome | None]:
    return [future.result() if future.done() else None for future in futures]


async def test_a_return_decides_before_its_confirm() -> None:
    """RMQ-1: the broker acks what it returned."""
    stage = await Stage().up()
    futures = stage.publish("a", "nowhere", "a")
    stage.publisher.on_returned(stage.link.channel.ids[1])
    stage.publisher.on_confirmed(3, True, True)
    assert outcomes(futures) == [CONFIRMED, UNROUTABLE, CONFIRMED]


async def test_confirms_settle_exactly_what_they_name() -> None:
    stage = await Stage().up()
    futures = stage.publish(*"abcde")
    stage.publisher.on_confirmed(4, False, True)
    stage.publisher.on_confirmed(2, True, True)
    stage.publisher.on_confirmed(5, False, False)
    assert outcomes(futures) == [CONFIRMED, CONFIRMED, None, CONFIRMED, REFUSED]


async def test_what_cannot_be_written_takes_no_tag() -> None:
    """The broker counts what it gets; a gap would shift every outcome after it."""
    stage = await Stage().up()
    futures = stage.publish("a", "unwritable", "b")
    stage.publisher.on_confirmed(2, False, True)
    assert outcomes(futures) == [None, REFUSED, CONFIRMED]


async def test_message_ids_are_fresh_on_every_channel() -> None:
    """RMQ-2."""
    stage = await Stage().up()
    stage.publish("a", "a")
    first = stage.link.channel.ids
    stage.publisher.on_lost(stage.link.channel)  # type: ignore[arg-type]
    stage.link = FakeLink()
    await stage.up()
    stage.publish("a", "a")
    assert len({*first, *stage.link.channel.ids}) == 4


async def test_a_return_of_an_earlier_channel_settles_nothing() -> None:
    stage = await Stage().up()
    stage.publish("a")
    old = stage.link.channel.ids[0]
    stage.publisher.on_lost(stage.link.channel)  # type: ignore[arg-type]
    stage.link = FakeLink()
    await stage.up()
    futures = stage.publish("a")
    stage.publisher.on_returned(old)
    assert outcomes(futures) == [None]


async def test_a_channel_lost_while_it_is_taken_over_is_not_taken() -> None:
    """Its tags would mix with the next one's, and a confirm would go to the wrong message."""
    stage = Stage()
    stage.link.channel.lost = ChannelLost(0, "gone")
    with pytest.raises(ChannelLost):
        await stage.up()
    futures = stage.publish("a")
    assert stage.link.channel.ids == [], "it waits for the next channel"
    stage.link = FakeLink()
    await stage.up()
    stage.publisher.on_confirmed(1, False, True)
    assert outcomes(futures) == [CONFIRMED]


async def test_in_flight_is_unknown_and_waiting_is_kept_when_a_channel_is_lost() -> None:
    """RMQ-12."""
    stage = await Stage().up()
    flying = stage.publish("a")
    stage.publisher.on_lost(stage.link.channel)  # type: ignore[arg-type]
    waiting = stage.publish("b")
    assert outcomes([*flying, *waiting]) == [UNKNOWN, None]
    assert stage.link.dropped, "a connection without a publish channel is of no use"


async def test_a_late_confirm_drops_the_link() -> None:
    """RMQ-8."""
    stage = await Stage().up()
    stage.publish("a")
    stage.tick(4.0)
    assert not stage.link.dropped
    stage.tick(1.0)
    assert stage.link.dropped == ["no confirm for 5 s"]


async def test_one_slow_queue_does_not_cut_its_neighbours() -> None:
    """It is unknown at its bound while the others go on."""
    stage = await Stage().up()
    slow = stage.publish("slow")
    for tag in range(2, 22):
        stage.publish("a")
        stage.publisher.on_confirmed(tag, False, True)
        stage.tick(0.5)
    assert outcomes(slow) == [UNKNOWN]
    assert not stage.link.dropped


async def test_a_loop_that_stood_still_blames_nobody() -> None:
    """AIO-3: the confirms of that time are still in the socket."""
    stage = await Stage().up()
    stage.publish("a")
    stage.tick(7.0, lagged=True)
    assert not stage.link.dropped


async def test_an_alarm_holds_publishes_back_and_drops_nothing() -> None:
    """RMQ-11: a new connection would be blocked in the same way."""
    stage = await Stage().up()
    stage.publish("a")
    stage.link.blocked = True
    stage.tick(0.5)
    held = stage.publish("b")
    stage.tick(6.0)
    assert not stage.link.dropped
    assert len(stage.link.channel.ids) == 1
    stage.link.blocked = False
    stage.tick(0.5)
    assert len(stage.link.channel.ids) == 2, "sent when the alarm is over"
    stage.publisher.on_confirmed(2, True, True)
    assert outcomes(held) == [CONFIRMED]


async def test_every_publish_ends_within_ten_seconds() -> None:
    """RMQ-7: with a link, without one, and blocked."""
    with_link = await Stage().up()
    with_link.link.blocked = True
    without = Stage()
    for stage in (with_link, without):
        futures = stage.publish("a", "b")
        for _ in range(20):
            stage.tick(0.5)
        assert outcomes(futures) == [UNKNOWN, UNKNOWN]
        assert stage.publisher.pending == 0


async def test_the_window_counts_messages_and_bytes_and_empties() -> None:
    clock = VirtualClock()
    options = RabbitMQOptions(pending_messages_max=3, pending_bytes_max=10)
    publisher = Publisher(clock=clock, ids=SystemIds(), options=options)
    small = [OutMessage("a", b"x", "text/plain")] * 4
    assert outcomes(publisher.publish(small)) == [None, None, None, REFUSED]
    clock.time = 20.0
    publisher.tick(clock.time, lagged=False)
    large = [OutMessage("a", b"x" * 6, "text/plain")] * 2
    assert outcomes(publisher.publish(large)) == [None, REFUSED]

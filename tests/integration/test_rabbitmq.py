"""G-03: what only the real server shows: crashes, frozen brokers, alarms, deleted queues, and the driver's quirks.

Quirk tests pin what RabbitMQ and aiormq do (pitfalls.md §2). One that fails means that a row, and perhaps the
adapter that leans on it, must change.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable

import aio_pika
import aiormq
import pytest
from pamqp import commands as spec

from devservices import RabbitMq
from saga.brokers.base import Channel, Consumer, OutMessage, PublishOutcome, Severity
from saga.brokers.rabbitmq import RabbitMQBroker, RabbitMQOptions
from saga.brokers.rabbitmq.consumer import RabbitMQConsumer
from saga.clock import SystemIds, TaskSpawner
from saga.errors import BrokerUnavailable, ConfigurationError
from tests.plugins.features import Faults
from tests.proxy import ProxyFactory

pytestmark = [pytest.mark.feature("G-03"), pytest.mark.stack("postgres-rabbitmq")]

CONFIRMED, UNROUTABLE, UNKNOWN = PublishOutcome.CONFIRMED, PublishOutcome.UNROUTABLE, PublishOutcome.UNKNOWN
PROGRESS_SECONDS_MAX = 3.0
NOTICED_SECONDS_MAX = 15.0

Connect = Callable[..., "contextlib.AbstractAsyncContextManager[RabbitMQBroker]"]


@contextlib.asynccontextmanager
async def connected(url: str, options: RabbitMQOptions | None = None) -> AsyncIterator[RabbitMQBroker]:
    spawner = TaskSpawner()
    broker = RabbitMQBroker(url, spawner=spawner, options=options)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.close()
        await spawner.close()


def new_name(stem: str) -> str:
    return f"test-{stem}-{SystemIds().uuid7().hex[-12:]}"


async def new_channel(broker: RabbitMQBroker, stem: str = "work") -> str:
    name = new_name(stem)
    await broker.declare([Channel(name, f"{name}.parking")])
    return name


async def publish(broker: RabbitMQBroker, name: str, *bodies: bytes) -> list[PublishOutcome]:
    futures = broker.publish([OutMessage(name, body, "text/plain", key="k") for body in bodies])
    return [await future for future in futures]


async def until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait for a condition that nothing announces; return how long it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"{what}: not within {seconds} s"
        await asyncio.sleep(0.02)
    return time.monotonic() - start


class Load:
    """A publisher that keeps what has no confirm, and a consumer with a barrier; both go on through every fault."""

    def __init__(self, broker: RabbitMQBroker, name: str) -> None:
        self.broker = broker
        self.name = name
        self.confirmed: set[bytes] = set()
        self.effects: Counter[bytes] = Counter()
        self.deliveries = 0
        self.pending: dict[bytes, None] = {}
        self.outcomes: Counter[PublishOutcome] = Counter()
        self.running = True

    async def publish(self) -> None:
        number = 0
        while self.running or self.pending:
            if self.running:
                for _ in range(20):
                    number += 1
                    self.pending[b"%06d" % number] = None
            batch = list(self.pending)[:200]
            outcomes = await publish(self.broker, self.name, *batch)
            for body, outcome in zip(batch, outcomes, strict=True):
                self.outcomes[outcome] += 1
                if outcome is CONFIRMED:
                    self.confirmed.add(body)
                    del self.pending[body]
            await asyncio.sleep(0.01)

    async def consume(self, consumer: Consumer) -> None:
        while batch := await consumer.receive():
            for delivery in batch:
                if not self.effects[delivery.body]:
                    self.effects[delivery.body] += 1
                self.deliveries += 1
            consumer.ack(batch)

    async def progress(self, seconds: float) -> float:
        """Return how long it took until something new was confirmed and something new was delivered."""
        confirmed, delivered = len(self.confirmed), self.deliveries
        return await until(
            lambda: len(self.confirmed) > confirmed and self.deliveries > delivered, seconds, "progress"
        )


@contextlib.asynccontextmanager
async def under_load(broker: RabbitMQBroker, name: str) -> AsyncIterator[Load]:
    consumer = await broker.consume(name, prefetch=100)
    load = Load(broker, name)
    publishing, consuming = asyncio.create_task(load.publish()), asyncio.create_task(load.consume(consumer))
    try:
        await load.progress(PROGRESS_SECONDS_MAX)
        yield load
        load.running = False
        await asyncio.wait_for(publishing, 30)
        await until(lambda: len(load.effects) == len(load.confirmed), 30, "everything confirmed is delivered")
        await consumer.close()
        await asyncio.wait_for(consuming, 10)
    finally:
        publishing.cancel()
        consuming.cancel()
        await asyncio.gather(publishing, consuming, return_exceptions=True)
    assert set(load.effects) == load.confirmed, "0 lost"
    assert set(load.effects.values()) == {1}, "0 double effects behind a barrier"


# --- crashes and freezes ------------------------------------------------------------------------------------------


@pytest.mark.feature("G-03", acceptance=True, scale=0.02)
@pytest.mark.slow
async def test_a_broker_killed_and_frozen_under_load_loses_nothing(
    own_rabbitmq: RabbitMq, faults: Faults
) -> None:
    """Row G-03: killed 8 times (of 360), frozen 3 times until noticed; 0 lost, progress within 3 s, stall <= 15 s."""
    faults.declare("broker kill -9", "broker frozen")
    async with connected(own_rabbitmq.url) as broker:
        name = await new_channel(broker)
        async with under_load(broker, name) as load:
            for _ in range(8):
                own_rabbitmq.kill()
                await asyncio.to_thread(own_rabbitmq.start)
                faults.fired("broker kill -9")
                assert await load.progress(10) <= PROGRESS_SECONDS_MAX
            for _ in range(3):
                own_rabbitmq.pause()
                try:
                    await until(
                        lambda: not broker.state.publish_up and not broker.state.consume_up,
                        NOTICED_SECONDS_MAX,
                        "the frozen broker is noticed",
                    )
                finally:
                    own_rabbitmq.resume()
                faults.fired("broker frozen")
                assert await load.progress(10) <= PROGRESS_SECONDS_MAX
        assert load.outcomes[UNKNOWN] > 0, "some publishes were in flight when it struck"


async def test_a_frozen_broker_is_noticed_without_traffic(own_rabbitmq: RabbitMq) -> None:
    """RMQ-8: heartbeats alone would take 33 s."""
    async with connected(own_rabbitmq.url) as broker:
        name = await new_channel(broker)
        own_rabbitmq.pause()
        try:
            await until(
                lambda: not broker.state.publish_up and not broker.state.consume_up,
                NOTICED_SECONDS_MAX,
                "the frozen broker is noticed",
            )
        finally:
            own_rabbitmq.resume()
        assert await publish(broker, name, b"x") == [CONFIRMED]


async def test_connections_closed_by_an_operator_come_back(own_rabbitmq: RabbitMq, faults: Faults) -> None:
    """`rabbitmqctl close_all_connections`: a close in good order, unlike a crash."""
    faults.declare("close_all_connections")
    async with connected(own_rabbitmq.url) as broker:
        name = await new_channel(broker)
        async with under_load(broker, name) as load:
            for _ in range(3):
                connects = broker.state.connects
                await asyncio.to_thread(own_rabbitmq.rabbitmqctl, "close_all_connections", "operator")
                faults.fired("close_all_connections")
                await until(lambda seen=connects: broker.state.connects >= seen + 2, 5, "both are new")  # type: ignore[misc]
                assert await load.progress(10) <= PROGRESS_SECONDS_MAX


async def test_a_black_hole_between_us_and_the_broker_is_noticed(
    rabbitmq_server: RabbitMq, proxy: ProxyFactory
) -> None:
    """RMQ-8: sockets stay open and nothing passes; every publish ends within its bound (G7)."""
    link = await proxy(rabbitmq_server.url)
    async with connected(link.url) as broker:
        name = await new_channel(broker)
        link.drop()
        start = time.monotonic()
        assert await publish(broker, name, b"x") == [UNKNOWN]
        assert time.monotonic() - start <= 10.0
        await until(lambda: not broker.state.consume_up, NOTICED_SECONDS_MAX, "noticed")
        link.heal()
        await until(lambda: broker.state.publish_up, 10, "back")
        assert await publish(broker, name, b"y") == [CONFIRMED]


async def test_a_late_confirm_drops_the_publishing_connection_only(
    rabbitmq_server: RabbitMq, proxy: ProxyFactory
) -> None:
    """RMQ-8, RMQ-11: the two connections have separate fates."""
    link = await proxy(rabbitmq_server.url)
    options = RabbitMQOptions(late_seconds=1.0)
    async with connected(link.url, options) as broker:
        name = await new_channel(broker)
        connects = broker.state.connects
        publisher = broker._publisher
        assert publisher._channel is not None
        publisher._channel._handlers[spec.Basic.Ack] = lambda frame: (
            None
        )  # confirms get lost, probes are answered
        start = time.monotonic()
        assert await publish(broker, name, b"x") == [UNKNOWN]
        assert time.monotonic() - start < 3.0
        await until(lambda: broker.state.connects == connects + 1, 5, "one connection is new")
        assert await publish(broker, name, b"y") == [CONFIRMED]


async def test_a_silent_consumer_is_subscribed_again(rabbitmq_server: RabbitMq) -> None:
    """RMQ-14: messages wait, prefetch is free, and nothing comes."""
    options = RabbitMQOptions(silent_seconds=1.5)
    async with connected(rabbitmq_server.url, options) as broker:
        name = await new_channel(broker)
        consumer = await broker.consume(name, prefetch=2)
        assert isinstance(consumer, RabbitMQConsumer)
        assert consumer._channel is not None
        deaf: dict[type, Callable[..., None]] = dict.fromkeys(consumer._channel._handlers, lambda frame: None)
        consumer._channel._handlers.update(deaf)
        await publish(broker, name, *(b"%d" % number for number in range(5)))
        got: set[bytes] = set()
        while len(got) < 5:
            batch = await asyncio.wait_for(consumer.receive(), 10)
            got |= {delivery.body for delivery in batch}
            consumer.ack(batch)
        assert consumer.subscriptions == 2


async def test_a_quiet_consumer_is_left_alone(rabbitmq_server: RabbitMq) -> None:
    """Neither an empty queue nor a full prefetch is silence."""
    options = RabbitMQOptions(silent_seconds=0.6)
    async with connected(rabbitmq_server.url, options) as broker:
        idle, busy = await new_channel(broker), await new_channel(broker)
        quiet = await broker.consume(idle, prefetch=2)
        full = await broker.consume(busy, prefetch=1)
        await publish(broker, busy, b"1", b"2", b"3")
        (held,) = await full.receive()
        await asyncio.sleep(2.0)
        assert isinstance(quiet, RabbitMQConsumer)
        assert isinstance(full, RabbitMQConsumer)
        assert (quiet.subscriptions, full.subscriptions) == (1, 1)
        full.ack([held])
        assert len(await full.receive()) == 1


# --- alarms, deleted queues, full windows -------------------------------------------------------------------------


async def test_a_memory_alarm_holds_publishes_back_and_lets_consumers_go_on(
    own_rabbitmq: RabbitMq,
) -> None:
    """RMQ-7, RMQ-11: no reconnect (it would be blocked as well), outcomes within the bound, progress afterwards."""
    options = RabbitMQOptions(publish_seconds_max=6.0)
    async with connected(own_rabbitmq.url, options) as broker:
        name = await new_channel(broker)
        consumer = await broker.consume(name, prefetch=1)
        assert await publish(broker, name, *numbered(10)) == [CONFIRMED] * 10
        connects = broker.state.connects
        await asyncio.to_thread(own_rabbitmq.rabbitmqctl, "set_vm_memory_high_watermark", "0.000001")
        try:
            first = broker.publish([OutMessage(name, b"blocked", "text/plain")])
            await until(lambda: broker.state.blocked, 5, "the alarm is visible")
            later = broker.publish([OutMessage(name, b"held", "text/plain")])
            for expected in numbered(10):
                (delivery,) = await asyncio.wait_for(consumer.receive(), 5)
                assert delivery.body == expected, "consuming goes on"
                consumer.ack([delivery])
            assert [await future for future in (*first, *later)] == [UNKNOWN, UNKNOWN]
            assert broker.state.connects == connects, "a blocked connection is not dropped"
            assert (await broker.status(name)).consumers == 1, "questions go over the other connection"
        finally:
            await asyncio.to_thread(own_rabbitmq.rabbitmqctl, "set_vm_memory_high_watermark", "0.4")
        await until(lambda: not broker.state.blocked, 10, "the end of the alarm is visible")
        assert await publish(broker, name, b"after") == [CONFIRMED]
        (blocked,) = await asyncio.wait_for(consumer.receive(), 5)
        consumer.ack([blocked])
        (after,) = await asyncio.wait_for(consumer.receive(), 5)
        assert [blocked.body, after.body] == [b"blocked", b"after"], "what was held and expired was not sent"


@pytest.mark.feature("F-05")
async def test_a_queue_deleted_under_load_is_unroutable_and_works_after_declare(
    own_rabbitmq: RabbitMq,
) -> None:
    """F-05: neighbours are confirmed all the while; its consumer comes back by itself."""
    async with connected(own_rabbitmq.url) as broker:
        name, other = await new_channel(broker), await new_channel(broker, "other")
        consumer = await broker.consume(name, prefetch=10)
        async with under_load(broker, other) as load:
            await asyncio.to_thread(own_rabbitmq.rabbitmqctl, "delete_queue", name)
            for _ in range(5):
                assert await publish(broker, name, b"x") == [UNROUTABLE]
                await load.progress(PROGRESS_SECONDS_MAX)
            await broker.declare([Channel(name, f"{name}.parking")])
            assert await publish(broker, name, b"y") == [CONFIRMED]
            (delivery,) = await asyncio.wait_for(consumer.receive(), 10)
            assert delivery.body == b"y"
            assert load.outcomes[UNROUTABLE] == 0
            assert load.outcomes[UNKNOWN] == 0
        assert broker.state.connects == 2, "nothing had to reconnect"


async def test_a_full_window_refuses_at_once(rabbitmq_server: RabbitMq, proxy: ProxyFactory) -> None:
    """What may wait inside the adapter is bounded."""
    link = await proxy(rabbitmq_server.url)
    options = RabbitMQOptions(pending_messages_max=5, publish_seconds_max=2.0)
    async with connected(link.url, options) as broker:
        name = await new_channel(broker)
        link.jam()
        futures = broker.publish([OutMessage(name, body, "text/plain") for body in numbered(8)])
        assert [future.result() for future in futures[5:]] == [PublishOutcome.REFUSED] * 3
        assert not any(future.done() for future in futures[:5])
        assert {await future for future in futures[:5]} == {UNKNOWN}
        assert broker.state.pending == 0, "the window is free again"
        link.release()


async def test_topology_is_quorum_durable_with_delivery_limit_and_parking(own_rabbitmq: RabbitMq) -> None:
    """P14, RMQ-17, RMQ-19."""
    async with connected(own_rabbitmq.url) as broker:
        name = await new_channel(broker)
        listing = await asyncio.to_thread(
            own_rabbitmq.rabbitmqctl,
            "list_queues",
            "name",
            "type",
            "durable",
            "arguments",
            "--no-table-headers",
        )
    (work,) = [line for line in listing.splitlines() if line.startswith(f"{name}\t")]
    (parking,) = [line for line in listing.splitlines() if line.startswith(f"{name}.parking\t")]
    for line in (work, parking):
        assert line.split("\t")[1:3] == ["quorum", "true"]
    assert '{"x-delivery-limit",100}' in work
    assert f'{{"x-dead-letter-routing-key","{name}.parking"}}' in work
    assert "x-dead-letter" not in parking


# --- start --------------------------------------------------------------------------------------------------------


async def test_starting_without_a_broker_is_broker_unavailable_within_ten_seconds(
    proxy: ProxyFactory,
) -> None:
    link = await proxy("amqp://guest:guest@127.0.0.1:9/")
    start = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        async with connected(link.url):
            pass
    assert time.monotonic() - start <= 10.0


async def test_a_wrong_password_is_named_and_shown_nowhere(
    rabbitmq_server: RabbitMq, caplog: pytest.LogCaptureFixture
) -> None:
    """S20: neither errors nor logs hold the credentials, at DEBUG."""
    caplog.set_level(logging.DEBUG)
    url = rabbitmq_server.url.replace("guest:guest", "guest:canary-7f3a")
    with pytest.raises(ConfigurationError) as caught:
        async with connected(url):
            pass
    assert "refuses the log-in" in caught.value.text
    assert "canary-7f3a" not in caught.value.text
    assert "canary-7f3a" not in caplog.text


def test_a_url_of_another_scheme_is_refused() -> None:
    with pytest.raises(ConfigurationError):
        RabbitMQBroker("http://127.0.0.1")


# --- pinned quirks of the server and the driver -------------------------------------------------------------------


@contextlib.asynccontextmanager
async def plain_channel(url: str, **settings: bool) -> AsyncIterator[aiormq.abc.AbstractChannel]:
    connection = await aiormq.connect(url)
    try:
        yield await connection.channel(**settings)
    finally:
        await connection.close()


async def new_quorum_queue(channel: aiormq.abc.AbstractChannel) -> str:
    name = new_name("quirk")
    await channel.queue_declare(name, durable=True, arguments={"x-queue-type": "quorum"})
    return name


async def test_quirk_an_unroutable_message_looks_sent_unless_it_is_mandatory(
    rabbitmq_server: RabbitMq,
) -> None:
    """RMQ-1: that is why every publish of ours is mandatory and a return decides before its ack."""
    async with plain_channel(rabbitmq_server.url, on_return_raises=False) as channel:
        answer = await channel.basic_publish(b"x", routing_key=new_name("nowhere"), mandatory=False)
        assert isinstance(answer, spec.Basic.Ack)
        answer = await channel.basic_publish(b"x", routing_key=new_name("nowhere"), mandatory=True)
        assert not isinstance(answer, spec.Basic.Ack)


async def test_quirk_the_driver_swaps_results_of_publishes_with_one_message_id(
    rabbitmq_server: RabbitMq,
) -> None:
    """RMQ-2: that is why our message id is made of the channel's prefix and the tag."""
    async with plain_channel(rabbitmq_server.url) as channel:
        name, nowhere = await new_quorum_queue(channel), new_name("nowhere")

        async def outcome(target: str, message_id: str) -> bool:
            properties = spec.Basic.Properties(message_id=message_id, delivery_mode=2)
            try:
                await channel.basic_publish(b"x", routing_key=target, properties=properties, mandatory=True)
            except aiormq.exceptions.PublishError:
                return False
            return True

        targets = [nowhere, name, nowhere, name]
        same = await asyncio.gather(*(outcome(target, "same") for target in targets))
        assert same != [False, True, False, True]
        own = await asyncio.gather(*(outcome(target, f"id-{index}") for index, target in enumerate(targets)))
        assert own == [False, True, False, True]


async def test_quirk_the_default_delivery_mode_is_transient(rabbitmq_server: RabbitMq) -> None:
    """RMQ-3: that is why the header that we write says 2."""
    assert aio_pika.Message(b"x").delivery_mode == aio_pika.DeliveryMode.NOT_PERSISTENT
    async with plain_channel(rabbitmq_server.url) as channel:
        name = await new_quorum_queue(channel)
        await channel.basic_publish(b"x", routing_key=name, mandatory=True)
        message = await channel.basic_get(name, no_ack=True)
        assert message.header.properties.delivery_mode == 1


@pytest.mark.parametrize("loss", ["closed here", "reset by the network"])
async def test_quirk_a_connection_closed_here_cancels_publishers_of_the_driver(
    rabbitmq_server: RabbitMq, proxy: ProxyFactory, loss: str
) -> None:
    """RMQ-9: that is why nothing of ours awaits a future of the driver, but to connect and to close.

    A watchdog that drops the connection is such a close. A reset by the network is an error in aiormq 7.2.
    """
    link = await proxy(rabbitmq_server.url)
    connection = await aiormq.connect(link.url)
    channel = await connection.channel()
    name = await new_quorum_queue(channel)
    link.jam()
    publishing = asyncio.create_task(channel.basic_publish(b"x", routing_key=name, mandatory=True))
    await link.wait_fired("jam")
    closing = asyncio.create_task(connection.close())
    if loss != "closed here":
        closing.cancel()
        link.reset()
    await asyncio.wait({publishing}, timeout=5)
    link.heal()
    await asyncio.gather(closing, return_exceptions=True)
    await connection.close()
    assert publishing.cancelled() is (loss == "closed here")
    assert publishing.cancelling() == 0, "nobody asked the task to end"


async def test_quirk_prefetched_messages_of_a_dead_channel_are_still_handed_out(
    rabbitmq_server: RabbitMq, proxy: ProxyFactory
) -> None:
    """RMQ-13: that is why a lost channel takes our buffer with it."""
    link = await proxy(rabbitmq_server.url)
    async with connected(rabbitmq_server.url) as broker:
        name = await new_channel(broker)
        await publish(broker, name, *numbered(8))
    connection = await aio_pika.connect_robust(link.url, reconnect_interval=0.2)
    try:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=8)
        queue = await channel.get_queue(name)
        seen: Counter[bytes] = Counter()
        failed = 0
        async with queue.iterator() as messages:
            await asyncio.sleep(0.5)  # eight are prefetched into the iterator
            link.reset()
            await asyncio.sleep(1.0)  # it has reconnected
            async for message in messages:
                seen[message.body] += 1
                try:
                    await message.ack()
                except aio_pika.exceptions.ChannelInvalidStateError:
                    failed += 1
                if len(seen) == 8 and min(seen.values()) >= 2:
                    break
        assert failed == 8, "acks of the dead channel's messages"
    finally:
        await connection.close()


async def test_quirk_redeliveries_of_a_quorum_queue_carry_their_count(rabbitmq_server: RabbitMq) -> None:
    """Our delivery count is this header plus one; the first delivery has none."""
    async with plain_channel(rabbitmq_server.url) as channel:
        name = await new_quorum_queue(channel)
        await channel.basic_publish(b"x", routing_key=name, mandatory=True)
        counts = []
        for _ in range(3):
            message = await channel.basic_get(name)
            headers = message.header.properties.headers or {}
            counts.append(headers.get("x-delivery-count", 0))
            assert message.delivery_tag is not None
            await channel.basic_nack(message.delivery_tag, requeue=True)
            await asyncio.sleep(0.1)
        assert counts == [0, 1, 2]


def numbered(count: int) -> list[bytes]:
    return [b"m%04d" % number for number in range(count)]


# --- what is found of queues that are not ours ------------------------------------------------------


async def make_queue(url: str, name: str, arguments: dict[str, object]) -> None:
    connection = await aiormq.connect(url)
    channel = await connection.channel()
    await channel.queue_declare(name, durable=True, arguments=arguments)  # type: ignore[arg-type]
    await connection.close()


OURS = {
    "x-queue-type": "quorum",
    "x-overflow": "reject-publish",
    "x-delivery-limit": 100,
    "x-dead-letter-exchange": "",
    "x-dead-letter-strategy": "at-least-once",
}


@pytest.mark.feature("G-05", acceptance=True)
@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"x-queue-type": "classic", "x-delivery-limit": None, "x-dead-letter-strategy": None}, "queue-type"),
        ({"x-dead-letter-routing-key": "elsewhere"}, "dead-letter-target"),
        ({"x-dead-letter-strategy": "at-most-once"}, "dead-letter-strategy"),
        ({"x-delivery-limit": 3}, "delivery-limit"),
        ({"x-overflow": "drop-head"}, "overflow"),
        ({"x-max-length": 10}, "queue-length"),
    ],
)
async def test_a_queue_that_is_not_as_ours_is_found_by_its_code(
    rabbitmq_url: str, changed: dict[str, object], code: str
) -> None:
    name = new_name("check")
    wanted = {**OURS, "x-dead-letter-routing-key": f"{name}.parking", **changed}
    given = {argument: value for argument, value in wanted.items() if value is not None}
    await make_queue(rabbitmq_url, name, given)
    async with connected(rabbitmq_url) as broker:
        await broker.declare([Channel(f"{name}.parking")])
        (found,) = await broker.check([Channel(name, f"{name}.parking")])
        assert (found.code, found.severity, found.channel) == (code, Severity.REFUSE, name)
        assert found.fix


@pytest.mark.feature("G-05")
async def test_a_check_makes_no_queue_and_finds_nothing_of_ours(rabbitmq_url: str) -> None:
    async with connected(rabbitmq_url) as broker:
        name = new_name("check")
        for _ in range(2):
            found = await broker.check([Channel(name, f"{name}.parking")])
            assert [each.code for each in found] == ["missing", "missing"]
        await broker.declare([Channel(name, f"{name}.parking")])
        assert await broker.check([Channel(name, f"{name}.parking")]) == []

"""G-04: what only a real cluster shows: offsets, groups, rebalances, crashes and frozen brokers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import pytest
from aiokafka.protocol.admin import DeleteTopicsRequest

from devservices import Kafka
from saga.brokers.base import Channel, Consumer, Delivery, OutMessage, PublishOutcome
from saga.brokers.kafka import KafkaBroker, KafkaOptions
from saga.brokers.kafka.cluster import NewTopic
from saga.brokers.kafka.consumer import KafkaConsumer
from saga.brokers.kafka.membership import Membership
from saga.brokers.kafka.offsets import Held, Window
from saga.clock import SystemIds, TaskSpawner
from saga.errors import BrokerUnavailable, TopologyMismatch
from tests.kafka_proxy import KafkaProxy
from tests.plugins.features import Faults

pytestmark = [pytest.mark.feature("G-04"), pytest.mark.stack("postgres-kafka")]

CONFIRMED, UNROUTABLE, UNKNOWN = PublishOutcome.CONFIRMED, PublishOutcome.UNROUTABLE, PublishOutcome.UNKNOWN
PATIENCE_SECONDS = 40.0
QUICK = KafkaOptions(partitions=4, heartbeat_seconds=0.2, drain_seconds_max=0.3, backoff_seconds_max=0.5)


def options(**changed: Any) -> KafkaOptions:
    """Return options for small tests: few partitions, and rebalances that are noticed soon."""
    kept = {name: getattr(QUICK, name) for name in QUICK.__dataclass_fields__}
    return KafkaOptions(**{**kept, **changed})


@contextlib.asynccontextmanager
async def connected(url: str, chosen: KafkaOptions = QUICK) -> AsyncIterator[KafkaBroker]:
    spawner = TaskSpawner()
    broker = KafkaBroker(url, spawner=spawner, options=chosen)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.close()
        await spawner.close()


def new_name(stem: str) -> str:
    return f"test-{stem}-{SystemIds().uuid7().hex[-12:]}"


async def new_channel(broker: KafkaBroker, stem: str = "work") -> str:
    name = new_name(stem)
    await broker.declare([Channel(name, f"{name}.parking")])
    return name


def numbered(count: int, stem: str = "m") -> list[bytes]:
    return [f"{stem}{number:05d}".encode() for number in range(count)]


async def publish(
    broker: KafkaBroker, name: str, *bodies: bytes, keys: Sequence[str] = ("k",)
) -> list[PublishOutcome]:
    messages = [
        OutMessage(name, body, "text/plain", key=keys[number % len(keys)])
        for number, body in enumerate(bodies)
    ]
    return [await future for future in broker.publish(messages)]


async def take(consumer: Consumer, count: int) -> list[Delivery]:
    taken: list[Delivery] = []
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(taken) < count:
            taken += await consumer.receive()
    assert len(taken) == count
    return taken


def bodies(deliveries: Iterable[Delivery]) -> list[bytes]:
    return sorted(each.body for each in deliveries)


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition that nothing announces."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < PATIENCE_SECONDS, what
        await asyncio.sleep(0.02)


async def until_lag(broker: KafkaBroker, name: str, lag: int) -> None:
    """Wait until the group has committed all but so many."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (await broker.status(name)).messages != lag:
            pass


# --- order and offsets --------------------------------------------------------------------------------------------


async def test_each_key_stays_in_order_across_overlapping_batches_and_two_consumers(
    kafka_server: Kafka,
) -> None:
    """The partition follows from the key, and nothing overtakes in it."""
    keys = [f"run-{number}" for number in range(20)]
    async with connected(kafka_server.url) as broker:
        name = await new_channel(broker)
        consumers = [await broker.consume(name, prefetch=37) for _ in range(2)]
        await until(
            lambda: all(len(each._windows) == 2 for each in broker._consumers), "both have partitions"
        )
        futures: list[asyncio.Future[PublishOutcome]] = []
        for number in range(30):
            messages = [
                OutMessage(name, f"{key} {number:03d}".encode(), "text/plain", key=key) for key in keys
            ]
            futures += broker.publish(messages)  # the next batch before the last is confirmed
        seen: list[bytes] = []

        async def consume(consumer: Consumer) -> None:
            while batch := await consumer.receive():
                seen.extend(each.body for each in batch)
                consumer.ack(batch)

        async with asyncio.TaskGroup() as group:
            for each in consumers:
                group.create_task(consume(each))
            assert {await future for future in futures} == {CONFIRMED}
            await until(lambda: len(seen) >= 600, "all are delivered")
            for each in consumers:
                await each.close()
        for key in keys:
            of_key = [body for body in seen if body.startswith(f"{key} ".encode())]
            assert of_key == sorted(of_key)
            assert len(of_key) == 30


async def test_nine_of_ten_acked_with_the_first_unfinished_all_come_back(kafka_server: Kafka) -> None:
    """KAF-8: `single_ack` is not declared; the barrier answers the nine."""
    async with connected(kafka_server.url) as broker:
        name = await new_channel(broker)
        await publish(broker, name, *numbered(10))
        consumer = await broker.consume(name, prefetch=10)
        taken = await take(consumer, 10)
        consumer.ack(taken[1:])
        await consumer.close()
        again = await broker.consume(name, prefetch=20)
        assert bodies(await take(again, 10)) == numbered(10)


async def test_what_is_acked_before_the_first_unfinished_is_committed(kafka_server: Kafka) -> None:
    async with connected(kafka_server.url) as broker:
        name = await new_channel(broker)
        await publish(broker, name, *numbered(10))
        consumer = await broker.consume(name, prefetch=10)
        taken = await take(consumer, 10)
        consumer.ack([each for each in taken if each.body != b"m00006"])
        await until_lag(broker, name, 4)
        await consumer.close()
        again = await broker.consume(name, prefetch=20)
        assert bodies(await take(again, 4)) == numbered(10)[6:]


async def test_commits_have_what_was_finished_meanwhile_and_are_few(kafka_server: Kafka) -> None:
    """KAF-22: a commit per message would cost ten times what everything else does."""
    async with connected(kafka_server.url) as broker:
        name = await new_channel(broker)
        await publish(broker, name, *numbered(2_000))
        consumer = await broker.consume(name, prefetch=500)
        assert isinstance(consumer, KafkaConsumer)
        member = consumer._member
        assert member is not None
        commits: list[int] = []
        driver_commit = member._consumer.commit

        async def counted(offsets: Any) -> None:
            commits.append(len(offsets))
            await driver_commit(offsets)

        member._consumer.commit = counted
        seen = 0
        while seen < 2_000:
            for delivery in await consumer.receive():
                consumer.ack([delivery])  # one at a time
                seen += 1
        await until_lag(broker, name, 0)
        assert len(commits) < 100


async def test_a_partition_is_not_fetched_far_beyond_its_first_unfinished_message(
    kafka_server: Kafka,
) -> None:
    """After a crash everything behind that message comes again, so it is bounded."""
    async with connected(kafka_server.url, options(ahead_messages_max=50)) as broker:
        name = await new_channel(broker)
        await publish(broker, name, *numbered(200))
        consumer = await broker.consume(name, prefetch=10)
        first: Delivery | None = None
        seen = 0
        with contextlib.suppress(TimeoutError):
            while True:
                batch = list(await asyncio.wait_for(consumer.receive(), 1.0))
                first = first or batch.pop(0)
                seen += len(batch)
                consumer.ack(batch)
        assert 40 <= seen <= 70
        assert first is not None
        consumer.ack([first])
        assert len(await take(consumer, 10)) == 10


# --- groups -------------------------------------------------------------------------------------------------------


async def test_late_acks_after_a_rebalance_settle_nothing_and_nothing_is_lost(kafka_server: Kafka) -> None:
    """KAF-6, KAF-17: revocation is a lost connection; whoever has the partitions then gets what was unfinished."""
    keys = [f"run-{number}" for number in range(8)]
    async with connected(kafka_server.url) as broker, connected(kafka_server.url) as other:
        name = await new_channel(broker)
        await publish(broker, name, *numbered(80), keys=keys)
        one = await broker.consume(name, prefetch=100)
        held = await take(one, 80)
        two = await other.consume(name, prefetch=100)
        one.ack(held)
        one.retry(held)
        both: Counter[bytes] = Counter()
        while sum(both.values()) < 80:
            done, waiting = await asyncio.wait(
                {asyncio.create_task(one.receive()), asyncio.create_task(two.receive())},
                return_when=asyncio.FIRST_COMPLETED,
                timeout=PATIENCE_SECONDS,
            )
            assert done, f"{sum(both.values())} of 80 came again"
            for each in waiting:
                each.cancel()
            for each in done:
                both.update(delivery.body for delivery in each.result())
        assert sorted(both) == numbered(80)
        assert set(both.values()) == {1}


async def test_what_ends_while_partitions_are_taken_away_is_committed(kafka_server: Kafka) -> None:
    """KAF-6: drain, commit, release."""
    async with (
        connected(kafka_server.url, options(drain_seconds_max=5.0)) as broker,
        connected(kafka_server.url) as other,
    ):
        name = await new_channel(broker)
        await publish(broker, name, *numbered(10))
        one = await broker.consume(name, prefetch=10)
        assert isinstance(one, KafkaConsumer)
        held = await take(one, 10)
        joining = asyncio.create_task(other.consume(name, prefetch=10))
        await until(lambda: one._revoking, "the rebalance is noticed")
        one.ack(held)
        await joining
        assert (await broker.status(name)).messages == 0


async def test_a_member_that_died_is_followed_by_another(kafka_server: Kafka) -> None:
    """KAF-18: after the session; a process that dies says nothing."""
    async with (
        KafkaProxy(kafka_server.url) as link,
        connected(kafka_server.url) as other,
        connected(link.url) as broker,
    ):
        name = await new_channel(broker)
        await publish(broker, name, *numbered(5))
        consumer = await broker.consume(name, prefetch=5)
        await take(consumer, 5)
        link.refuse()
        link.reset()
        successor = await other.consume(name, prefetch=5)
        assert bodies(await take(successor, 5)) == numbered(5)


async def test_a_silent_consumer_is_made_again(kafka_server: Kafka) -> None:
    """KAF-5: messages wait, prefetch is free, and nothing comes."""
    async with connected(kafka_server.url, options(silent_seconds=1.5)) as broker:
        name = await new_channel(broker)
        consumer = await broker.consume(name, prefetch=2)
        assert isinstance(consumer, KafkaConsumer)
        assert consumer._member is not None
        consumer._member._consumer._fetcher._fetch_task.cancel()
        await publish(broker, name, *numbered(5))
        got: set[bytes] = set()
        while len(got) < 5:
            batch = await asyncio.wait_for(consumer.receive(), PATIENCE_SECONDS)
            got |= {delivery.body for delivery in batch}
            consumer.ack(batch)
        assert consumer.memberships == 2


async def test_a_quiet_consumer_is_left_alone(kafka_server: Kafka) -> None:
    """Neither an empty topic nor a full prefetch is silence."""
    async with connected(kafka_server.url, options(silent_seconds=0.6)) as broker:
        idle, busy = await new_channel(broker), await new_channel(broker)
        quiet = await broker.consume(idle, prefetch=2)
        full = await broker.consume(busy, prefetch=1)
        await publish(broker, busy, b"1", b"2", b"3")
        (held,) = await full.receive()
        await asyncio.sleep(2.0)
        assert isinstance(quiet, KafkaConsumer)
        assert isinstance(full, KafkaConsumer)
        assert (quiet.memberships, full.memberships) == (1, 1)
        full.ack([held])
        assert len(await full.receive()) == 1


async def test_poison_is_parked_whole_and_then_passed(kafka_server: Kafka) -> None:
    """KAF-9: it would hold its partition for ever; parked first, and only then stepped past."""
    async with connected(kafka_server.url, options(delivery_limit=3, retry_seconds=0.01)) as broker:
        name = await new_channel(broker)
        message = OutMessage(name, b"poison", "text/plain", key="k", headers={"id": "7"})
        assert [await each for each in broker.publish([message])] == [CONFIRMED]
        consumer = await broker.consume(name, prefetch=5)
        for _ in range(3):
            consumer.retry(await take(consumer, 1))
        parked = await broker.consume(f"{name}.parking", prefetch=5)
        (found,) = await take(parked, 1)
        assert (found.body, found.content_type, found.headers) == (b"poison", "text/plain", {"id": "7"})
        await publish(broker, name, b"next")
        (following,) = await take(consumer, 1)
        assert following.body == b"next"
        consumer.ack([following])
        await until_lag(broker, name, 0)


async def test_poison_stays_while_it_cannot_be_parked(kafka_server: Kafka) -> None:
    """A message is never dropped because its parking failed."""
    async with connected(kafka_server.url, options(delivery_limit=1, retry_seconds=0.01)) as broker:
        name = await new_channel(broker)
        await publish(broker, name, b"poison")
        consumer = await broker.consume(name, prefetch=5)
        assert isinstance(consumer, KafkaConsumer)
        refused = asyncio.Event()

        async def refuse(delivery: Delivery) -> bool:
            refused.set()
            return False

        consumer._park = refuse
        consumer.retry(await take(consumer, 1))
        await asyncio.wait_for(refused.wait(), PATIENCE_SECONDS)
        await consumer.close()
        assert (await broker.status(name)).messages == 1


# --- the cluster away, frozen, killed -----------------------------------------------------------------------------


async def test_a_frozen_broker_makes_publishes_unknown_within_the_bound(own_kafka: Kafka) -> None:
    """KAF-2, KAF-20: by our own timer; the producer is replaced, and what was UNKNOWN may have arrived."""
    async with connected(own_kafka.url, options(publish_seconds_max=3.0)) as broker:
        name = await new_channel(broker)
        await publish(broker, name, b"before")
        own_kafka.pause()
        try:
            futures = broker.publish([OutMessage(name, body, "text/plain") for body in numbered(3)])
            assert {await asyncio.wait_for(future, 10) for future in futures} == {UNKNOWN}
        finally:
            own_kafka.resume()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await publish(broker, name, b"after") != [CONFIRMED]:
                pass
        assert broker._publisher.producers >= 2
        assert broker._publisher.pending == 0


async def test_closing_is_bounded_while_the_broker_is_frozen(own_kafka: Kafka) -> None:
    """KAF-20: a client that does not want to end is abandoned."""
    broker = KafkaBroker(own_kafka.url, options=QUICK)
    await broker.start()
    name = await new_channel(broker)
    await broker.consume(name, prefetch=5)
    own_kafka.pause()
    try:
        futures = broker.publish([OutMessage(name, b"x", "text/plain")])
        await asyncio.wait_for(broker.close(), 15)
        assert [future.result() for future in futures] == [UNKNOWN]
    finally:
        own_kafka.resume()


async def test_a_black_hole_between_us_and_the_broker_ends_in_unknown(kafka_server: Kafka) -> None:
    """Sockets stay open and nothing passes."""
    async with (
        KafkaProxy(kafka_server.url) as link,
        connected(link.url, options(publish_seconds_max=2.0)) as broker,
    ):
        name = await new_channel(broker)
        link.drop()
        assert await asyncio.wait_for(publish(broker, name, b"x"), 10) == [UNKNOWN]
        link.heal()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await publish(broker, name, b"y") != [CONFIRMED]:
                pass


async def test_starting_without_a_broker_is_broker_unavailable(kafka_server: Kafka) -> None:
    async with KafkaProxy(kafka_server.url) as link:
        link.refuse()
        with pytest.raises(BrokerUnavailable) as caught:
            async with connected(link.url):
                pass
        assert f"127.0.0.1:{link.port}" in caught.value.text


async def test_a_full_window_refuses_at_once(kafka_server: Kafka) -> None:
    """What may wait inside the adapter is bounded."""
    bounded = options(pending_messages_max=5, publish_seconds_max=2.0)
    async with KafkaProxy(kafka_server.url) as link, connected(link.url, bounded) as broker:
        name = await new_channel(broker)
        link.jam()
        futures = broker.publish([OutMessage(name, body, "text/plain") for body in numbered(8)])
        assert [future.result() for future in futures[5:]] == [PublishOutcome.REFUSED] * 3
        assert not any(future.done() for future in futures[:5])
        assert {await future for future in futures[:5]} == {UNKNOWN}
        assert broker._publisher.pending == 0, "the window is free again"
        link.release()


class Load:
    """Runs that each have one message on its way, as sagas have, and consumers with a barrier that ack out of order.

    What has no confirm is sent again; both sides go on through every fault.
    """

    RUNS: Final = 20

    def __init__(self, broker: KafkaBroker, name: str) -> None:
        self.broker = broker
        self.name = name
        self.confirmed: dict[int, int] = dict.fromkeys(range(self.RUNS), 0)
        """Of each run, how many messages; their numbers begin at 1."""
        self.effects: dict[int, list[int]] = {run: [] for run in range(self.RUNS)}
        """Of each run, the numbers in the order in which they were first delivered."""
        self.in_hand: set[Held] = set()
        self.outcomes: Counter[PublishOutcome] = Counter()
        self.running = True

    async def publish(self) -> None:
        unknown: set[int] = set()
        while self.running or unknown:
            runs = list(self.confirmed) if self.running else sorted(unknown)
            messages = [
                OutMessage(
                    self.name, f"{run} {self.confirmed[run] + 1}".encode(), "text/plain", key=f"run-{run}"
                )
                for run in runs
            ]
            outcomes = [await future for future in self.broker.publish(messages)]
            for run, outcome in zip(runs, outcomes, strict=True):
                self.outcomes[outcome] += 1
                if outcome is CONFIRMED:
                    self.confirmed[run] += 1
                    unknown.discard(run)
                else:
                    unknown.add(run)
            await asyncio.sleep(0.01)

    async def consume(self, consumer: Consumer) -> None:
        while batch := await consumer.receive():
            for delivery in batch:
                assert isinstance(delivery.token, Held)
                self.in_hand.add(delivery.token)
                run, number = map(int, delivery.body.split())
                if number not in self.effects[run]:
                    self.effects[run].append(number)
            for delivery in reversed(batch):
                await asyncio.sleep(0.001)
                self.in_hand.discard(delivery.token)
                consumer.ack([delivery])

    @property
    def done(self) -> bool:
        """Whether everything confirmed was delivered."""
        return all(len(self.effects[run]) >= count for run, count in self.confirmed.items())

    async def progress(self) -> None:
        """Wait until something new is confirmed and something new is delivered."""
        confirmed = sum(self.confirmed.values())
        delivered = sum(map(len, self.effects.values()))
        await until(
            lambda: (
                sum(self.confirmed.values()) > confirmed and sum(map(len, self.effects.values())) > delivered
            ),
            "progress",
        )


@contextlib.asynccontextmanager
async def under_load(broker: KafkaBroker, name: str) -> AsyncIterator[Load]:
    consumer = await broker.consume(name, prefetch=100)
    load = Load(broker, name)
    publishing, consuming = asyncio.create_task(load.publish()), asyncio.create_task(load.consume(consumer))
    try:
        await load.progress()
        yield load
        load.running = False
        await asyncio.wait_for(publishing, PATIENCE_SECONDS)
        await until(lambda: load.done, "everything confirmed is delivered")
        await consumer.close()
        await asyncio.wait_for(consuming, 10)
    finally:
        publishing.cancel()
        consuming.cancel()
        await asyncio.gather(publishing, consuming, return_exceptions=True)
    for run, count in load.confirmed.items():
        assert load.effects[run] == list(range(1, count + 1)), "0 lost, and in order"


@pytest.mark.slow
async def test_a_broker_killed_under_load_loses_nothing(own_kafka: Kafka, faults: Faults) -> None:
    """KAF-19: clients come back by themselves, or are replaced."""
    faults.declare("broker kill -9")
    async with connected(own_kafka.url) as broker:
        name = await new_channel(broker)
        async with under_load(broker, name) as load:
            for _ in range(2):
                own_kafka.kill()
                await asyncio.to_thread(own_kafka.start)
                faults.fired("broker kill -9")
                await load.progress()


@pytest.mark.slow
@pytest.mark.feature("G-04", acceptance=True, scale=0.1)
async def test_rebalances_and_a_restart_under_load_lose_nothing(
    own_kafka: Kafka, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row G-04: members come and go every two seconds, the broker restarts.

    0 lost, order per saga kept, and no commit passes what is unfinished.
    """
    faults.declare("rebalance", "broker restart")
    watched: list[tuple[int, int]] = []
    """At each commit, every unfinished message of its partitions: its offset, and the one that was committed."""
    async with connected(own_kafka.url) as broker, connected(own_kafka.url) as other:
        name = await new_channel(broker)
        async with under_load(broker, name) as load:
            commit = Membership.commit

            async def checked(member: Membership, offsets: Mapping[int, int]) -> bool:
                windows = [window for each in (broker, other) for window in windows_of(each, member)]
                mine = [held for held in load.in_hand if held.window in windows]
                watched.extend((held.offset, offsets.get(held.window.partition, 0)) for held in mine)
                return await commit(member, offsets)

            monkeypatch.setattr(Membership, "commit", checked)
            for round_ in range(6):
                guest = await other.consume(name, prefetch=20)
                eating = asyncio.create_task(load.consume(guest))
                faults.fired("rebalance")
                await asyncio.sleep(1.0)
                await guest.close()
                await eating
                await load.progress()
                if round_ % 2:
                    await asyncio.to_thread(own_kafka.stop)
                    await asyncio.to_thread(own_kafka.start)
                    faults.fired("broker restart")
                    await load.progress()
    assert len(watched) > 20
    assert all(committed <= unfinished for unfinished, committed in watched)


def windows_of(broker: KafkaBroker, member: Membership) -> list[Window]:
    """Return the windows of the consumer that this is the membership of."""
    return [
        window for each in broker._consumers if each._member is member for window in each._windows.values()
    ]


# --- topics -------------------------------------------------------------------------------------------------------


async def delete(broker: KafkaBroker, topic: str) -> None:
    """Delete a topic; for a moment the broker still takes messages for it, which nobody will see."""
    client = await broker._cluster._ready()
    await client.send(client.get_random_node(), DeleteTopicsRequest([topic], 10_000))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await publish(broker, topic, b"too late") != [UNROUTABLE]:
            pass


@pytest.mark.feature("F-05")
async def test_a_topic_deleted_under_load_is_unroutable_and_works_after_declare(kafka_server: Kafka) -> None:
    """F-05: its neighbours are confirmed in the end, and nothing of them is lost."""
    async with connected(kafka_server.url, options(metadata_seconds=1.0)) as broker:
        name, neighbour = await new_channel(broker), await new_channel(broker, "other")
        assert await publish(broker, name, b"before") == [CONFIRMED]
        async with under_load(broker, neighbour) as load:
            await delete(broker, name)
            for _ in range(3):
                assert await publish(broker, name, b"x") == [UNROUTABLE]
                await load.progress()
            await broker.declare([Channel(name, f"{name}.parking")])
            assert await publish(broker, name, b"y") == [CONFIRMED]
            consumer = await broker.consume(name, prefetch=10)
            (delivery,) = await take(consumer, 1)
            assert delivery.body == b"y", "what was unroutable is not there"
            assert load.outcomes[UNROUTABLE] == 0


async def test_another_number_of_partitions_is_a_mismatch(kafka_server: Kafka) -> None:
    async with (
        connected(kafka_server.url) as broker,
        connected(kafka_server.url, options(partitions=5)) as other,
    ):
        name = await new_channel(broker)
        with pytest.raises(TopologyMismatch) as caught:
            await other.declare([Channel(name, f"{name}.parking")])
        assert name in caught.value.text
        assert "4 partitions, declared with 5" in caught.value.text


async def test_fewer_copies_than_asked_for_are_a_mismatch(kafka_server: Kafka) -> None:
    """KAF-12: whoever asks for three does not get one silently."""
    async with (
        connected(kafka_server.url) as broker,
        connected(kafka_server.url, options(replication_factor=3)) as other,
    ):
        name = await new_channel(broker)
        with pytest.raises(TopologyMismatch, match="SG206"):
            await other.declare([Channel(name, f"{name}.parking")])
        with pytest.raises(TopologyMismatch) as caught:
            await other.declare([Channel(new_name("many-copies"))])
        assert "could not be made" in caught.value.text


async def test_a_topic_that_takes_only_small_messages_is_a_mismatch(kafka_server: Kafka) -> None:
    """KAF-12: size is set outside of our code."""
    async with connected(kafka_server.url) as broker:
        name = new_name("small")
        await broker._cluster.create([NewTopic(name, 4, 1, {"max.message.bytes": "1000"})])
        with pytest.raises(TopologyMismatch) as caught:
            await broker.declare([Channel(name)])
        assert "max.message.bytes=1000" in caught.value.text


async def test_a_parking_topic_keeps_everything_and_a_work_topic_two_weeks(kafka_server: Kafka) -> None:
    async with connected(kafka_server.url) as broker:
        name = await new_channel(broker)
        kept = await broker._cluster.settings([name, f"{name}.parking"], ["retention.ms"])
        assert kept == {
            name: {"retention.ms": str(14 * 86_400_000)},
            f"{name}.parking": {"retention.ms": "-1"},
        }


@pytest.mark.feature("G-05")
async def test_a_check_finds_what_the_cluster_tells_of_a_topic_and_makes_none(kafka_server: Kafka) -> None:
    async with connected(kafka_server.url) as broker:
        name = new_name("check")
        found = await broker.check([Channel(name, f"{name}.parking")])
        assert {each.code for each in found} == {"missing", "one-copy"}
        wrong = {
            "cleanup.policy": "compact",
            "retention.ms": "1000",
            "unclean.leader.election.enable": "true",
        }
        await broker._cluster.create([NewTopic(name, 4, 1, wrong)])
        found = await broker.check([Channel(name, f"{name}.parking")])
        assert {each.code for each in found if each.channel == name} == {
            "message-size",
            "one-copy",
            "unclean-election",
            "compacted",
            "retention",
        }
        assert f"{name}.parking" not in await broker._cluster.topics([f"{name}.parking"])


async def test_no_log_line_holds_what_was_sent(kafka_server: Kafka, caplog: pytest.LogCaptureFixture) -> None:
    """aiokafka tells key and value of each message at debug level."""
    caplog.set_level(logging.DEBUG)
    async with connected(kafka_server.url) as broker:
        name = await new_channel(broker)
        assert await publish(broker, name, b"canary-51c7", keys=["canary-51c7"]) == [CONFIRMED]
        consumer = await broker.consume(name, prefetch=1)
        consumer.ack(await take(consumer, 1))
    assert "canary-51c7" not in caplog.text


async def test_a_topic_that_is_made_anew_is_consumed_from_its_beginning(kafka_server: Kafka) -> None:
    """Its offsets begin again: what the consumer knew of the old one says nothing about it."""
    async with connected(kafka_server.url, options(metadata_seconds=1.0)) as broker:
        name = await new_channel(broker)
        consumer = await broker.consume(name, prefetch=50)
        assert await publish(broker, name, *numbered(20)) == [CONFIRMED] * 20
        consumer.ack(await take(consumer, 20))
        await until_lag(broker, name, 0)
        await delete(broker, name)
        await broker.declare([Channel(name, f"{name}.parking")])
        assert await publish(broker, name, *numbered(5, "new")) == [CONFIRMED] * 5
        taken = await take(consumer, 5)
        assert bodies(taken) == numbered(5, "new")
        consumer.ack(taken)
        await until_lag(broker, name, 0)

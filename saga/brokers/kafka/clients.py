"""aiokafka's clients, made with our settings and ended within a bound, also when they do not want to end.

A client's `stop` waits for the cluster without bound: a producer for what is pending, a consumer for its group (KAF-5,
KAF-20). One that takes too long is abandoned: its tasks are cancelled and its connections closed. There is no public
way to do that, so the private names of aiokafka are used here and nowhere else; tests pin them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, Final, Generic, TypeVar, cast

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import create_conn
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)

from saga.brokers.kafka.address import Address
from saga.brokers.kafka.options import KafkaOptions
from saga.clock import Spawner
from saga.transport import disagreement

T = TypeVar("T")

FAILURES: Final[tuple[type[Exception], ...]] = (KafkaError, OSError, TimeoutError, AssertionError)
"""What a call of aiokafka raises when the cluster is away; the assertions are about a cluster without a broker."""
_ABANDON_SECONDS_MAX = 5.0
_REFUSAL_SECONDS_MAX = 2.0
_SURPLUS_SECONDS = 10.0
_NO_POLL_LIMIT_MS = 7 * 86400 * 1000


async def bounded(seconds: float, work: Coroutine[Any, Any, T], *, spawner: Spawner, name: str) -> T:
    """Await for at most `seconds`; then cancel it, leave it to the spawner and raise TimeoutError (AIO-2).

    Unlike `saga.clock.within`, what is late is cancelled: a commit or a join that ends later than we think is worse
    than one that did not take place.
    """
    task = spawner.spawn(
        _quiet(work), name=name
    )  # its failure after the bound is nobody's unretrieved exception
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not done:
        task.cancel()
        raise TimeoutError(name)
    return task.result().result()


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    return await asyncio.gather(*work)


class _Ended(Generic[T]):
    """What a call came to."""

    def __init__(self, value: T | None, error: Exception | None) -> None:
        self._value = value
        self._error = error

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return cast("T", self._value)


async def _quiet(work: Coroutine[Any, Any, T]) -> _Ended[T]:
    try:
        return _Ended(await work, None)
    except Exception as error:  # returned, and raised by whoever still waits
        return _Ended(None, error)


class Clients:
    """Makes and ends the clients of one cluster."""

    def __init__(self, address: Address, options: KafkaOptions, spawner: Spawner) -> None:
        self._address = address
        self._options = options
        self._spawner = spawner
        self._common: dict[str, Any] = {
            **address.client,
            "bootstrap_servers": list(address.servers),
            "metadata_max_age_ms": int(options.metadata_seconds * 1000),
            "request_timeout_ms": int(options.request_seconds_max * 1000),
        }

    def client(self) -> Any:
        """Return a client for questions, not started."""
        return AIOKafkaClient(**self._common, client_id="saga-ask")

    def producer(self) -> Any:
        """Return a producer, not started: a confirm means all copies that are in step, and no reordering by retries."""
        return AIOKafkaProducer(
            **self._common,
            client_id="saga-publish",
            acks="all",
            enable_idempotence=True,
            max_batch_size=self._options.batch_bytes_max,
            max_request_size=self._options.record_bytes_max,
        )

    def consumer(self, group: str) -> Any:
        """Return a member of a group, neither started nor subscribed (KAF-1, KAF-18)."""
        session_ms = int(self._options.session_seconds * 1000)
        common = {**self._common, "request_timeout_ms": session_ms + int(_SURPLUS_SECONDS * 1000)}
        return AIOKafkaConsumer(
            **common,
            client_id="saga-consume",
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=session_ms,
            rebalance_timeout_ms=session_ms,
            heartbeat_interval_ms=int(self._options.heartbeat_seconds * 1000),
            # a full prefetch is no reason to leave; who makes no progress is found by our own watch
            max_poll_interval_ms=_NO_POLL_LIMIT_MS,
            max_partition_fetch_bytes=self._options.record_bytes_max,
        )

    async def refusal(self) -> str:
        """Return why no broker takes us, for people: what an operator must see to. Empty for what passes by itself.

        A client that finds none says only that; so each broker is asked once more, within 2 s in all.
        """
        asked = [self._refusal(server) for server in self._address.servers]
        try:
            whys = await bounded(
                _REFUSAL_SECONDS_MAX, _all(asked), spawner=self._spawner, name="saga-kafka-refusal"
            )
        except TimeoutError:
            return ""
        return next((why for why in whys if why), "")

    async def _refusal(self, server: str) -> str:
        host, _, port = server.rpartition(":")
        try:
            connection = await create_conn(host.strip("[]"), int(port), **self._address.client)
        except SaslAuthenticationFailed:
            return "it refuses the log-in: user or password is wrong, or of another mechanism"
        except UnsupportedSaslMechanismError:
            return f"it takes no log-in by {self._address.client['sasl_mechanism']}; say sasl= in the address"
        except FAILURES as error:
            return disagreement(error)
        connection.close()
        return ""

    async def end_client(self, client: Any) -> None:
        """Close a client for questions; bounded, never raises."""
        await self._try(_ABANDON_SECONDS_MAX, client.close())

    async def end_producer(self, producer: Any, seconds: float) -> None:
        """Stop a producer; abandon it, with what is pending in it, if that takes too long. Never raises."""
        if seconds <= 0 or not await self._try(seconds, producer.stop()):
            await self._try(_ABANDON_SECONDS_MAX, _abandon_producer(producer))

    async def end_consumer(self, consumer: Any, seconds: float) -> None:
        """Leave the group and stop; abandon the consumer if that takes too long. Never raises."""
        if seconds <= 0 or not await self._try(seconds, consumer.stop()):
            await self._try(_ABANDON_SECONDS_MAX, _abandon_consumer(consumer))

    async def _try(self, seconds: float, work: Coroutine[Any, Any, Any]) -> bool:
        try:
            await bounded(seconds, work, spawner=self._spawner, name="saga-kafka-end")
        except Exception:  # an ending client may say what it likes; it is not used any more
            return False
        return True


async def _abandon_producer(producer: Any) -> None:
    """End a producer without its pending messages, which must not go out any more once they are UNKNOWN."""
    producer._closed = True
    accumulator = producer._message_accumulator
    batches = [
        *(each for queue in accumulator._batches.values() for each in queue),
        *accumulator._pending_batches,
    ]
    for batch in batches:
        batch.failure(KafkaConnectionError("abandoned"))
        if batch._drain_waiter.done() and not batch._drain_waiter.cancelled():
            batch._drain_waiter.exception()  # nobody else may ask for it, and then it would be logged
    accumulator._exception = KafkaConnectionError("abandoned")
    _cancel([producer._sender.sender_task])
    await producer.client.close()


async def _abandon_consumer(consumer: Any) -> None:
    """End a consumer without leaving the group: no heartbeat may keep its partitions from the others."""
    consumer._closed = True
    coordinator, fetcher = consumer._coordinator, consumer._fetcher
    if coordinator is not None:
        tasks = ("_heartbeat_task", "_commit_refresh_task", "_coordination_task")
        _cancel(getattr(coordinator, name, None) for name in tasks)
    if fetcher is not None:
        _cancel([fetcher._fetch_task])
    await consumer._client.close()


def _cancel(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    for task in tasks:
        if task is not None:
            task.cancel()

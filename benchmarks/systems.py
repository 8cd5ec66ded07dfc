"""The systems behind one face, as the worker processes run them: start, execute one saga, stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from benchmarks import naive, naive_sqlite, workloads
from benchmarks.naive_database import PolledQueues
from benchmarks.naive_kafka import BareCoordinator, BareParticipant, PartitionedTopics
from examples.money_transfer.transfer import Transfer
from saga.app import App

SYSTEMS: Final = ("naive", "saga")
BARE: Final = "bare"
"""A question and its answer on Kafka."""
COORDINATOR_POOL: Final = 5
PARTICIPANT_POOL: Final = 10


@dataclass(frozen=True, slots=True)
class Spec:
    """What one worker process runs."""

    system: str
    role: str
    """`coordinator` or `participant`."""
    workload: str
    participants: str
    name: str
    """Keeps the queues of this cell apart: namespace of the one, prefix of the other."""
    database: str | None
    broker: str
    in_flight: int
    pool_factor: int = 1
    """Naive only: how many times the pool that both have."""
    prefetch_factor: int = 1
    """Naive only: how many times the prefetch, which is the number in flight."""
    tally: str | None = None
    """The file in which this process counts its statements, where no server does."""

    @property
    def broker_kind(self) -> str:
        return self.broker.partition("://")[0].partition("+")[0]


class System(Protocol):
    """One process of a system."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def execute(self, transfer: dict[str, Any]) -> None:
        """Run one saga to its end; raises if it did not complete. Coordinators only."""
        ...


class SagaSystem:
    """An app with its defaults: nothing is tuned for the benchmark."""

    def __init__(self, spec: Spec) -> None:
        self._coordinates = spec.role == "coordinator"
        self._saga = workloads.saga(spec.workload)
        self._app = App(
            spec.database,
            broker=spec.broker,
            sagas=[self._saga] if self._coordinates else [],
            participants=[] if self._coordinates else workloads.participants(spec.participants),
            namespace=spec.name,
        )

    async def start(self) -> None:
        await self._app.start(coordinator=self._coordinates, participants=not self._coordinates)

    async def stop(self) -> None:
        await self._app.stop()

    async def execute(self, transfer: dict[str, Any]) -> None:
        handle = await self._app.client.start(self._saga, Transfer.model_construct(**transfer))
        await handle.result()


class NaiveCoordinator:
    """The load on the naive coordinator."""

    def __init__(self, spec: Spec) -> None:
        steps = workloads.STEPS[spec.workload]
        self._inner: naive.Coordinator | naive_sqlite.Coordinator
        if spec.broker_kind == "sqlite":
            self._inner = naive_sqlite.Coordinator(spec.broker, prefix=spec.name, steps=steps)
        else:
            assert spec.database is not None
            self._inner = naive.Coordinator(
                spec.database,
                _queues(spec),
                steps=steps,
                pool_size=COORDINATOR_POOL * spec.pool_factor,
                prefetch=spec.in_flight * spec.prefetch_factor,
            )
        self.start = self._inner.start
        self.stop = self._inner.stop

    async def execute(self, transfer: dict[str, Any]) -> None:
        status = await self._inner.execute(transfer)
        if status != "completed":
            raise RuntimeError(f"a saga ended as {status}")


class NaiveParticipant:
    """The naive participants."""

    def __init__(self, spec: Spec) -> None:
        inner: naive.Participant | naive_sqlite.Participant
        if spec.broker_kind == "sqlite":
            inner = naive_sqlite.Participant(spec.database, spec.broker, prefix=spec.name)
        else:
            inner = naive.Participant(
                spec.database,
                _queues(spec),
                pool_size=PARTICIPANT_POOL * spec.pool_factor,
                prefetch=spec.in_flight * spec.prefetch_factor,
            )
        self.start = inner.start
        self.stop = inner.stop

    async def execute(self, transfer: dict[str, Any]) -> None:
        raise NotImplementedError


def _queues(spec: Spec) -> naive.Queues:
    kinds: dict[str, Callable[[str, str], naive.Queues]] = {
        "amqp": naive.QuorumQueues,
        "kafka": PartitionedTopics,
    }
    return kinds.get(spec.broker_kind, PolledQueues)(spec.broker, spec.name)


def make(spec: Spec) -> System:
    """Return what a worker runs."""
    if spec.system == "saga":
        return SagaSystem(spec)
    if spec.system == BARE:
        bare = BareCoordinator if spec.role == "coordinator" else BareParticipant
        return bare(spec.broker, spec.name, in_flight=spec.in_flight)
    return NaiveCoordinator(spec) if spec.role == "coordinator" else NaiveParticipant(spec)

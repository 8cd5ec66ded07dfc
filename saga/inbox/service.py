"""The inbox's service: events in, handlers in one transaction with the row that remembers them, acks out.

deliveries -> EventIntake -> Scheduler -> Runner -> Outcomes -> ack
"""

from __future__ import annotations

from collections.abc import Sequence

from saga.brokers.base import Broker
from saga.clock import Clock, Ids, Spawner
from saga.definition.inbox import Inbox
from saga.inbox.intake import EventIntake
from saga.inbox.outcomes import Outcomes
from saga.inbox.served import consumed
from saga.outbox.parking import Parking
from saga.participant.attempts import Attempt
from saga.participant.forward import ForwardRuns
from saga.participant.runner import Runner
from saga.participant.settling import Settling
from saga.participant.shell import PREFETCH, Shell
from saga.patience import Patience
from saga.retention.ages import Horizon
from saga.storage.base import EventStore, ParkingStore, ParticipantStore


class InboxService(Shell):
    """Serves every consumer of its inboxes.

    `store` keeps what was acted on, `events` the attempts to come. What is older than `horizon` is refused. Raises
    DuplicateActivity, and what `Shell` does.
    """

    def __init__(
        self,
        inboxes: Sequence[Inbox],
        broker: Broker,
        store: ParticipantStore,
        events: EventStore,
        parking: ParkingStore,
        *,
        namespace: str,
        clock: Clock,
        ids: Ids,
        spawner: Spawner,
        concurrency: int = 64,
        prefetch: int = PREFETCH,
        horizon: Horizon | None = None,
    ) -> None:
        super().__init__(
            consumed(inboxes),
            broker,
            store,
            clock=clock,
            spawner=spawner,
            concurrency=concurrency,
            prefetch=prefetch,
        )
        patience = Patience(clock, ids)
        kept = Parking(parking, broker, patience)
        outcomes = Outcomes(
            events,
            kept,
            clock=clock,
            patience=patience,
            spawner=spawner,
            settled=self._settled,
            counts=self.counts,
        )
        self._events = EventIntake(
            namespace=namespace,
            skipped=frozenset(
                topic for inbox in inboxes if inbox.skip_others for topic, _ in inbox.consumers
            ),
            horizon=horizon,
            parking=kept,
            add=self._scheduler.add,
            clock=clock,
            spawner=spawner,
            counts=self.counts,
        )
        settling = Settling(store, answer=outcomes.settle, patience=patience, counts=self.counts)
        runner = Runner(
            stateless=None,
            settling=settling,
            forward=ForwardRuns(settling, self._calls, clock=clock, counts=self.counts),
            undo=None,  # an event is never taken back
            outside=None,
            parking=kept,
            answer=outcomes.settle,
            forget=self._settled,
            counts=self.counts,
        )
        self._connect(self._events, runner, outcomes)

    def _settled(self, attempt: Attempt) -> None:
        self._events.settled(attempt)

"""The participant's service: commands in, the paths that answer them, replies out.

deliveries -> Intake -> Scheduler -> Runner -> Replies -> ack
"""

from __future__ import annotations

from collections.abc import Sequence

from saga.brokers.base import Broker, Channel
from saga.clock import Clock, Ids, Spawner
from saga.definition.activity import Participant
from saga.messages import commands_channel, parking_channel
from saga.outbox.parking import Parking
from saga.participant.attempts import Attempt
from saga.participant.forward import ForwardRuns
from saga.participant.intake import Intake
from saga.participant.outside import OutsideRuns
from saga.participant.replies import Replies
from saga.participant.runner import Runner
from saga.participant.served import fence, serve
from saga.participant.settling import Settling
from saga.participant.shell import PREFETCH, Shell
from saga.participant.stateless import StatelessRuns
from saga.participant.undo import UndoRuns
from saga.patience import Patience
from saga.retention.ages import Horizon
from saga.storage.base import ParkingStore, ParticipantStore


class ParticipantService(Shell):
    """Serves every activity of its participants that has a handler here.

    `store` is None for a participant without a database; without `parking` refused messages go to the parking
    channels. What is behind `horizon` is refused; without a barrier there is none, since there is nothing that could
    be purged. Raises at construction what `serve` raises: DefinitionError, DuplicateActivity, MissingCapability; and
    what `Shell` does.
    """

    def __init__(
        self,
        participants: Sequence[Participant],
        broker: Broker,
        store: ParticipantStore | None,
        parking: ParkingStore | None,
        *,
        namespace: str,
        clock: Clock,
        ids: Ids,
        spawner: Spawner,
        concurrency: int = 64,
        prefetch: int = PREFETCH,
        horizon: Horizon | None = None,
    ) -> None:
        tables = serve(participants, stateless=store is None, capabilities=broker.capabilities)
        names = {queue: commands_channel(namespace, queue) for queue in tables}
        super().__init__(
            {Channel(names[queue], parking_channel(names[queue])): table for queue, table in tables.items()},
            broker,
            store,
            clock=clock,
            spawner=spawner,
            concurrency=concurrency,
            prefetch=prefetch,
        )
        patience = Patience(clock, ids)
        kept = Parking(parking, broker, patience)
        self._replies = Replies(
            broker, patience=patience, ids=ids, spawner=spawner, settled=self._settled, counts=self.counts
        )
        self._commands = Intake(
            namespace=namespace,
            stateless=store is None,
            horizon=horizon,
            fence=fence(),
            parking=kept,
            add=self._scheduler.add,
            answer=self._replies.send,
            clock=clock,
            spawner=spawner,
            counts=self.counts,
        )
        self._connect(self._commands, self._make_runner(store, kept, patience), self._replies)

    def _make_runner(self, store: ParticipantStore | None, parking: Parking, patience: Patience) -> Runner:
        calls, answer, clock, counts = self._calls, self._replies.send, self._clock, self.counts
        settling = forward = undo = outside = stateless = None
        if store is None:
            stateless = StatelessRuns(calls, answer=answer, clock=clock, counts=counts)
        else:
            settling = Settling(store, answer=answer, patience=patience, counts=counts)
            forward = ForwardRuns(settling, calls, clock=clock, counts=counts)
            undo = UndoRuns(settling, calls, clock=clock, counts=counts)
            outside = OutsideRuns(settling, calls, clock=clock, counts=counts)
        return Runner(
            stateless=stateless,
            settling=settling,
            forward=forward,
            undo=undo,
            outside=outside,
            parking=parking,
            answer=answer,
            forget=self._settled,
            counts=counts,
        )

    def _settled(self, attempt: Attempt) -> None:
        self._commands.settled(attempt)

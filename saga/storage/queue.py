"""The port that the database broker keeps its queues behind; it stands above both ports because it speaks of both.

A message waits in the queue, is moved to the claims by whoever takes it, and is deleted by the ack. A claim holds for
as long as its consumer does, and a consumer for as long as it is renewed: who comes late names a token that is no more
and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol
from uuid import UUID

from saga.brokers.base import Channel, ChannelStatus, OutMessage, PublishOutcome


class Claimed(NamedTuple):
    """A message that a consumer holds. Ids are in the order of publishing; `headers` is a JSON object of text."""

    id: int
    deliveries: int
    content_type: str
    headers: str
    body: bytes


class Looked(NamedTuple):
    """What a look found."""

    waiting: Collection[str]
    """Those of the channels that have something to claim."""
    alive: Collection[UUID]
    """Those of the tokens that still stand, renewed."""
    delayed_due: bool = False
    """Whether the outbox of this database holds delayed rows whose time has come."""


class QueueStore(Protocol):
    """Each method is one transaction. All of them raise StorageUnavailable or StorageBusy.

    Those of consumers are tried once over a lost connection, acks alone excepted: what they did is then unknown, and
    whoever called them begins anew under another token. To delete what is acked a second time is harmless.
    """

    async def declare(self, channels: Sequence[Channel]) -> Sequence[Channel]:
        """Add the channels that are missing; return those that stand otherwise, and add none if there are any."""
        ...

    async def publish(
        self, messages: Sequence[OutMessage], *, length_max: int | None
    ) -> Sequence[PublishOutcome]:
        """Append messages in order; return an outcome for each. `length_max` bounds what waits in a channel."""
        ...

    async def status(self, channel: str) -> ChannelStatus | None:
        """Return depth and consumers; None if the channel is not declared."""
        ...

    async def subscribe(
        self, token: UUID, channel: str, seconds: float, *, instead_of: Collection[UUID] = ()
    ) -> bool:
        """Add a consumer and give back all that others of its names hold; return whether the channel is declared."""
        ...

    async def claim(
        self, token: UUID, channel: str, *, above: int, limit: int, deliveries_max: int
    ) -> Sequence[Claimed]:
        """Take the oldest messages that are due, in order: those given back, and new ones with an id above `above`.

        What was delivered more than `deliveries_max` times goes to the channel's parking channel instead.
        """
        ...

    async def settle(
        self, token: UUID, acked: Collection[int], returned: Collection[int], pause_seconds: float
    ) -> None:
        """Delete what is acked and give back what is returned, to be due after a pause; only what `token` holds."""
        ...

    async def leave(self, tokens: Collection[UUID]) -> None:
        """Remove consumers and give back all that they hold, due at once."""
        ...

    async def look(self, channels: Collection[str], renewed: Collection[UUID], seconds: float) -> Looked:
        """Tell what waits. With `renewed`, prolong those consumers, and give back what those hold that ran out."""
        ...


class Bell(Protocol):
    """How processes on one database tell each other that something was put into a queue. Any ring may be lost."""

    async def listen(self, heard: Callable[[str], None], lost: Callable[[], None]) -> None:
        """Call `heard` with a channel's name, or an empty one for any, until cancelled; `lost` when the link breaks."""
        ...

    async def ring(self, channels: Collection[str]) -> None:
        """Tell the other processes, after the commit. Raises StorageUnavailable or StorageBusy."""
        ...

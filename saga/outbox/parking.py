"""Parks messages that could not be handled, and returns only when they are safe, so that the original may be acked.

With a database they become rows; without one they go to the parking channel beside their own, confirmed. Either is
tried until it succeeds: a message is never dropped because its parking failed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Final

from saga.brokers.base import Broker, Delivery, OutMessage, PublishOutcome
from saga.messages import parking_channel
from saga.patience import Patience
from saga.storage.base import ParkedRow, ParkingStore

REASON_HEADER: Final = "saga-parked-reason"
DETAIL_HEADER: Final = "saga-parked-detail"
"""Which attribute or field is wrong and how, never its value; kept beside the sender's headers."""
FINGERPRINT_HEADER: Final = "saga-parked-fingerprint"
log: Final[logging.Logger] = logging.getLogger("saga.parking")


def parked_row(
    delivery: Delivery, reason: str, *, body: bytes | None = None, kind: str = "", detail: str = ""
) -> ParkedRow:
    """Return the row for a delivery, or for one envelope of it.

    `kind` tells apart what has the same reason; `detail` says more to whoever reads it.
    """
    text = f"{delivery.channel}\n{reason}\n{kind}"
    return ParkedRow(
        channel=delivery.channel,
        reason=reason,
        fingerprint=hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16],
        content_type=delivery.content_type,
        headers=_kept(delivery.headers, detail),
        body=delivery.body if body is None else body,
    )


def _kept(headers: Mapping[str, str], detail: str) -> Mapping[str, str]:
    """Return the sender's headers with our detail; a detail of the sender's own is none, for it is shown to people."""
    kept = {name: value for name, value in headers.items() if name != DETAIL_HEADER}
    return {**kept, DETAIL_HEADER: detail} if detail else kept


class _NotConfirmed(Exception):
    """The parking channel does not have every message."""


class Parking:
    """The confirmed store of refused messages: a table where there is a database, else the parking channel."""

    def __init__(self, store: ParkingStore | None, broker: Broker, patience: Patience) -> None:
        self._store = store
        self._broker = broker
        self._patience = patience

    async def park(self, rows: Sequence[ParkedRow]) -> None:
        """Store messages with bytes, headers and reason. Returns once they are safe; waits as long as that takes."""
        await self._patience.outlast(lambda: self._park(rows), _told)
        for row in rows:
            log.warning("parked a message of %s: %s (%s)", row.channel, row.reason, row.fingerprint)

    async def _park(self, rows: Sequence[ParkedRow]) -> None:
        if self._store is not None:
            await self._store.park(rows)
        else:
            await self._publish(rows)

    async def _publish(self, rows: Sequence[ParkedRow]) -> None:
        # A retry publishes all of them again: a doubled parked message is harmless, a lost one is not.
        messages = [
            OutMessage(parking_channel(row.channel), row.body, row.content_type, headers=_headers(row))
            for row in rows
        ]
        outcomes = [await future for future in self._broker.publish(messages)]
        for outcome in outcomes:
            if outcome is not PublishOutcome.CONFIRMED:
                raise _NotConfirmed


def _told(error: Exception) -> None:
    log.warning("parking failed with %s and is tried again", type(error).__name__)


def _headers(row: ParkedRow) -> Mapping[str, str]:
    return {**row.headers, REASON_HEADER: row.reason, FINGERPRINT_HEADER: row.fingerprint}

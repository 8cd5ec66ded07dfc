"""The storage ports: what coordinator, client, relay and participant need of a database; one method, one transaction.

Every method can be run twice: keys and version checks make the second run a no-op, so a lost COMMIT answer is settled
by running it again (P3). Times are milliseconds of database time since the instance was created (P10).
"""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeAlias, TypeVar
from uuid import UUID

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
    from sqlalchemy.orm import Session, scoped_session

    CallersSession: TypeAlias = (
        AsyncSession
        | AsyncConnection
        | Session
        | Connection
        | async_scoped_session[AsyncSession]
        | scoped_session[Session]
    )
    """What `session=` takes: whatever holds the caller's transaction."""

T = TypeVar("T")

PARTS: Final = 16
"""Partitions of the outbox; a row's part is a stable hash of its ordering key."""


def part_of(ordering_key: str) -> int:
    """Return the partition of a key: the same in every process and release."""
    return zlib.crc32(ordering_key.encode()) % PARTS


class OutboxRow(NamedTuple):
    """One message to send: body is one envelope."""

    message_id: UUID
    part: int
    channel: str
    ordering_key: str
    body: bytes


class StoredRow(NamedTuple):
    """An outbox row as the database has it. Ids order rows of one saga and mean nothing else."""

    id: int
    message_id: UUID
    channel: str
    ordering_key: str
    body: bytes


class ValueKey(NamedTuple):
    """Name of a payload that was written once. `kind`: input, output, undo, refusal, error."""

    run_id: UUID
    step: str
    iteration: int
    round: int
    kind: str


class ValueRow(NamedTuple):
    """A payload, written once and never rewritten."""

    key: ValueKey
    data: bytes


class HistoryRow(NamedTuple):
    """One transition as people read it: no payload, no text of an exception."""

    run_id: UUID
    version: int
    event: str
    step: str | None
    direction: str | None
    attempt: int | None
    detail: str | None


class Loaded(NamedTuple):
    """An instance, locked for this transaction. `now_ms` and `wakeup_ms` are database time since it was created."""

    run_id: UUID
    saga: str
    saga_version: int
    saga_id: str
    version: int
    state: str
    input: bytes
    now_ms: int
    wakeup_ms: int | None
    status: str
    """As the row has it; `needs_attention` over another status in `state` says that the instance was set apart."""


class MovedRow(NamedTuple):
    """An instance moved from version `expected` to `version` (P1). `wakeup_ms` is None when it closed.

    `was` is the row's status that was decided on: setting an instance apart changes it and no version.
    """

    run_id: UUID
    expected: int
    was: str
    version: int
    status: str
    state: str
    wakeup_ms: int | None
    result: bytes | None


class NewInstance(NamedTuple):
    """An instance to insert, with its first history row and command."""

    run_id: UUID
    saga: str
    saga_version: int
    saga_id: str
    run_number: int
    status: str
    state: str
    input: bytes
    wakeup_ms: int | None
    result: bytes | None


class IncidentRow(NamedTuple):
    """A named reason why an instance stands still; counted when it comes again."""

    run_id: UUID
    kind: str
    step: str
    saga: str
    error: str
    fingerprint: str


class StaleRow(NamedTuple):
    """A reply that answered nothing outstanding."""

    run_id: UUID
    step: str
    direction: str
    command_id: str
    attempt: int
    outcome: str


class PendingRow(NamedTuple):
    """A reply for an instance whose version this process lacks, kept as it came (P29)."""

    run_id: UUID
    saga: str
    saga_version: int
    body: bytes


class AuditRow(NamedTuple):
    """An operator's verb, written in the commit of what it did (P16)."""

    run_id: UUID
    request_id: UUID
    verb: str
    actor: str
    reason: str
    status_before: str
    status_after: str
    detail: str | None
    """JSON: the effects that stand, as [step, in doubt], where a verb leaves them."""


@dataclass(slots=True)
class Changes:
    """Everything one transaction writes, for any number of instances."""

    new: list[NewInstance] = field(default_factory=list)
    moved: list[MovedRow] = field(default_factory=list)
    woken: list[tuple[UUID, int]] = field(default_factory=list)
    """Instances whose wake-up alone moves (run id, milliseconds); no version, no history."""
    history: list[HistoryRow] = field(default_factory=list)
    values: list[ValueRow] = field(default_factory=list)
    outbox: list[OutboxRow] = field(default_factory=list)
    incidents: list[IncidentRow] = field(default_factory=list)
    resolved: list[tuple[UUID, str]] = field(default_factory=list)
    """Incidents to close: run id and step."""
    flagged: list[tuple[UUID, int]] = field(default_factory=list)
    """Instances set apart at this version: their rows' status alone becomes `needs_attention` (I3)."""
    mended: list[UUID] = field(default_factory=list)
    """Instances that moved again: their poison incidents are closed."""
    stale: list[StaleRow] = field(default_factory=list)
    pending: list[PendingRow] = field(default_factory=list)
    taken: list[tuple[UUID, int]] = field(default_factory=list)
    """Pending replies that were applied: run id and id."""
    audit: list[AuditRow] = field(default_factory=list)


class Work(Protocol):
    """What a transaction of `advance` does between loading and writing: pure, run again if the commit is."""

    def decide(self, loaded: Mapping[UUID, Loaded]) -> Collection[ValueKey]:
        """Move every instance in memory; return the payloads needed to write the commands that follow."""
        ...

    def changes(self, values: Mapping[ValueKey, bytes]) -> Changes:
        """Return what to write."""
        ...


class Advanced(NamedTuple):
    """What a batch came to."""

    rows: Sequence[StoredRow]
    """The outbox rows written."""
    lost: Collection[UUID]
    """Instances that another process moved meanwhile: nothing of them was written, decide again."""


class CoordinatorStore(Protocol):
    """What the coordinator needs."""

    @property
    def writers(self) -> int:
        """How many batches it is worth to have under way at a time: 1 where writers wait for each other anyway."""
        ...

    async def advance(
        self, run_ids: Collection[UUID], work: Work, confirmed: Collection[int], session: Any = None
    ) -> Advanced:
        """Load the instances, let `work` decide, then write in one transaction and delete confirmed outbox rows.

        Every row is written only if its version is still the one that was loaded, and rows are locked in id order
        first (P1, PG-8). With `session`, all of it is part of the caller's transaction. The number of statements does
        not grow with the batch (K-05).
        """
        ...

    async def read_due(self, limit: int, served: Collection[tuple[str, int]]) -> Sequence[UUID]:
        """Return instances of served versions whose wake-up has passed, oldest first, without locking them (P11)."""
        ...

    async def read_open(self, above: UUID | None, limit: int) -> Sequence[UUID]:
        """Return a page of open instances in id order."""
        ...

    async def read_pending(
        self, above: int, limit: int, served: Collection[tuple[str, int]]
    ) -> Sequence[tuple[int, bytes]]:
        """Return a page of stored replies of versions served here, ascending id: id and body (P29).

        `above` is the last id of the page before, 0 for the first; less than `limit` of them are the last page.
        """
        ...

    async def audited(self, request_id: UUID) -> tuple[str, str] | None:
        """Return the status before and after the order of this id; None if it was not carried out (P31)."""
        ...

    async def register(self, definitions: Sequence[tuple[str, int, str, str]]) -> Sequence[str]:
        """Store (name, version, fingerprint, content) unless known; return the names whose fingerprint differs."""
        ...


class Existing(NamedTuple):
    """What is known of an id: its latest run."""

    run_id: UUID
    run_number: int
    status: str
    input: bytes


class Closed(NamedTuple):
    """How a run ended."""

    run_id: UUID
    status: str
    result: bytes | None
    state: str


class Described(NamedTuple):
    """A run with its history, for people."""

    run_id: UUID
    saga: str
    saga_version: int
    saga_id: str
    run_number: int
    version: int
    status: str
    state: str
    created_at: datetime
    closed_at: datetime | None
    history: Sequence[tuple[HistoryRow, datetime]]
    incidents: Sequence[IncidentRow]


class ClientStore(Protocol):
    """What the client needs. `session` is the caller's (or a connection), or None for a transaction of our own.

    With a plain session nothing awaits, so that code without a loop can drive the call.
    """

    async def start(self, changes: Changes) -> tuple[frozenset[UUID], Sequence[StoredRow]]:
        """Insert instances that are not known yet; return the run ids inserted and the outbox rows written."""
        ...

    async def start_in(self, session: Any, changes: Changes) -> frozenset[UUID]:
        """The same inside the caller's transaction; a duplicate id never aborts it (SQL-10)."""
        ...

    async def find(self, session: Any, saga: str, saga_id: str) -> Existing | None:
        """Return the latest run of an id, as the session (or a new transaction) sees it."""
        ...

    async def read_closed(self, run_ids: Collection[UUID]) -> Sequence[Closed]:
        """Return those of the runs that have ended."""
        ...

    async def read_values(self, keys: Collection[ValueKey]) -> Mapping[ValueKey, bytes]:
        """Return payloads by name; absent ones are left out."""
        ...

    async def describe(self, run_id: UUID) -> Described | None:
        """Return a run with its history and incidents."""
        ...


# --- operators --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Filter:
    """Which instances are meant; everything that is given must hold."""

    saga: str | None = None
    id: str | None = None
    run_id: UUID | None = None
    statuses: Collection[str] = ()
    """Any of these; empty means any."""
    steps: Collection[tuple[str, int, int]] | None = None
    """Outstanding step as (saga, version, index of the step), any of these."""
    id_prefix: str = ""
    """Compared character by character, case and all."""
    fingerprint: str | None = None
    """Of an open incident."""


class Listed(NamedTuple):
    """An instance in a list."""

    run_id: UUID
    saga: str
    saga_version: int
    saga_id: str
    run_number: int
    status: str
    state: str
    created_at: datetime
    closed_at: datetime | None


class IncidentGroup(NamedTuple):
    """Open incidents of one fingerprint: the same cause, as far as can be told."""

    fingerprint: str
    kind: str
    saga: str
    step: str
    error: str
    instances: int
    first_seen_at: datetime
    last_seen_at: datetime


class DeadLetter(NamedTuple):
    """A parked message without its body, which is payload."""

    id: UUID
    channel: str
    reason: str
    fingerprint: str
    content_type: str
    body_bytes: int
    parked_at: datetime


class OutboxStatus(NamedTuple):
    """What waits to be sent."""

    pending: int
    oldest_seconds: float | None
    """Age of the oldest row; None if there is none."""
    delayed: int
    blocked: Sequence[tuple[str, str, int]]
    """Ordering keys that the broker would not take: key, reason, attempts."""


class AuditEntry(NamedTuple):
    """An order that was carried out."""

    at: datetime
    verb: str
    actor: str
    reason: str
    status_before: str
    status_after: str
    detail: str | None


class Payload(NamedTuple):
    """What an instance took, gave or said, as JSON. `step` is None for the saga's own input and result."""

    step: str | None
    iteration: int
    round: int
    kind: str
    """`input`, `output`, `undo`, `result`, or what a refusing or failing attempt said: `forward.said.2`."""
    data: bytes


class OperatorStore(Protocol):
    """What operators look at. Pages are newest first; `below` is the last id of the page before, None for the first."""

    async def list(self, filter: Filter, below: UUID | None, limit: int) -> Sequence[Listed]:
        """Return a page of instances."""
        ...

    async def count(self, filter: Filter, limit: int) -> int:
        """Return how many instances there are, counting no further than `limit`."""
        ...

    async def load(self, run_ids: Collection[UUID]) -> Mapping[UUID, Loaded]:
        """Return instances as a verb would meet them, without locking them."""
        ...

    async def audit(self, run_id: UUID) -> Sequence[AuditEntry]:
        """Return the orders carried out on an instance, oldest first."""
        ...

    async def payloads(self, run_id: UUID) -> Sequence[Payload]:
        """Return all that is kept of an instance's payloads: its own first, then by step and kind."""
        ...

    async def incident_groups(self, saga: str | None, limit: int) -> Sequence[IncidentGroup]:
        """Return the open incidents by fingerprint, the largest group first."""
        ...

    async def dead_letters(
        self, channel: str | None, fingerprint: str | None, below: UUID | None, limit: int
    ) -> Sequence[DeadLetter]:
        """Return a page of parked messages."""
        ...

    async def outbox(self) -> OutboxStatus:
        """Return what waits to be sent."""
        ...


# --- outbox -----------------------------------------------------------------------------------


class Lease(NamedTuple):
    """A time-bound right. `epoch` rises with every change of owner and fences a stale one."""

    name: str
    epoch: int


class OutboxStore(Protocol):
    """What the relay needs."""

    async def renew(self, names: Collection[str], owner: UUID, seconds: float) -> Sequence[Lease]:
        """Take or renew the leases that are free or ours; return those held. Never takes one from a live owner."""
        ...

    async def release(self, owner: UUID) -> None:
        """Give up every lease of `owner`."""
        ...

    async def read_outbox(
        self, parts: Collection[int], low: int, older_than_seconds: float, limit: int
    ) -> Sequence[StoredRow]:
        """Return the oldest unsent rows of the partitions above the hint `low`, ascending id.

        One short transaction, no locks, ended before the caller publishes. A hint of 0 reads everything.
        """
        ...

    async def delete_confirmed(self, ids: Collection[int]) -> None:
        """Delete rows that the broker has confirmed, in id order, leaving to others what they are deleting (P34)."""
        ...

    async def move_due(self, limit: int) -> int:
        """Move delayed rows that are due into the outbox; return how many."""
        ...

    async def block(
        self, lease: Lease, owner: UUID, row: StoredRow, reason: str, retry_seconds: float
    ) -> bool:
        """Count a failed send of a row's key and open an incident, if the lease's epoch is still ours."""
        ...

    async def rescan(self, limit: int) -> Mapping[str, float]:
        """Move due rows as `move_due` does, and return the keys that wait for their next try, in one transaction.

        Ordering key to seconds from now, 0 when due.
        """
        ...

    async def unblock(self, keys: Collection[str]) -> None:
        """The broker took these keys again: forget their attempts and close their incidents."""
        ...


class EventStore(Protocol):
    """What publishing a domain event needs. `session` is the caller's session or connection, async or plain."""

    async def append(self, session: Any, row: OutboxRow, due: timedelta | datetime | None) -> None:
        """Write an event in the caller's transaction; `due` from now or at an instant, None for at once."""
        ...

    async def schedule(self, rows: Sequence[tuple[OutboxRow, timedelta]]) -> None:
        """Write messages that are due after a time from now, in a transaction of our own; known ids are left out."""
        ...

    async def revoke(self, session: Any, message_id: UUID) -> bool:
        """Delete an event that waits for its time, in a transaction of our own if `session` is None; whether it did."""
        ...


class ParkedRow(NamedTuple):
    """A message that could not be handled."""

    channel: str
    reason: str
    fingerprint: str
    content_type: str
    headers: Mapping[str, str]
    body: bytes


class ParkingStore(Protocol):
    """The confirmed store of refused messages."""

    async def park(self, rows: Sequence[ParkedRow]) -> None:
        """Store messages with bytes, headers and reason; returns after the commit."""
        ...


class DeadLetterStore(ParkingStore, Protocol):
    """What operators need of it."""

    async def read(self, id: UUID) -> ParkedRow | None:
        """Return a parked message whole."""
        ...

    async def delete(self, id: UUID) -> None:
        """Forget a message that was sent again."""
        ...


# --- participant ------------------------------------------------------------------------------


BUSY: Final = "busy"
LOST: Final = "lost"
OTHER: Final = "other"


class BarrierKey(NamedTuple):
    """Name of one decision: what a command id is made of. `direction` is forward or compensate."""

    run_id: UUID
    step: str
    iteration: int
    round: int
    direction: str


class BarrierRow(NamedTuple):
    """A decision that stands for ever: outcome done, refused, cancelled or nothing_to_undo, and the reply's data."""

    key: BarrierKey
    outcome: str
    reply: bytes | None


class Thread(Protocol):
    """A thread that a command has for itself."""

    def run(self, function: Callable[[], T]) -> Awaitable[T]:
        """Run a function there, after all that it was given before; nothing cancels it."""
        ...


class HandlerTransaction(Protocol):
    """One open transaction around a handler, on one connection. Entered and left by `async with`.

    It begins at its first statement. Leaving it without `commit` rolls everything back. Every method but `session`
    raises StorageBusy (rolled back; run the whole function again) or StorageUnavailable (outcome unknown: look the
    keys up in a new transaction, P3); what the handler's own pending statements raise comes through.
    """

    @property
    def session(self) -> Any:
        """The handler's AsyncSession, or its Session if it runs in a thread.

        Its commit, rollback, close and begin raise SessionIsManaged (P23).
        """
        ...

    async def __aenter__(self) -> HandlerTransaction: ...

    async def __aexit__(self, *exc: object) -> None: ...

    async def find(self, keys: Sequence[BarrierKey]) -> Mapping[BarrierKey, BarrierRow]:
        """Return the rows that are there: one statement for any number of keys."""
        ...

    async def cancel(
        self, forward: Sequence[BarrierKey], also: Sequence[BarrierKey]
    ) -> Mapping[BarrierKey, BarrierRow]:
        """Insert `forward` as cancelled where there is no row; return the rows that stood before, and those of `also`.

        A forward key that is not in the result is cancelled from this transaction's COMMIT on. Two statements.
        """
        ...

    async def commit(self, rows: Sequence[BarrierRow]) -> frozenset[BarrierKey]:
        """Flush the session, insert `rows` sorted by key in one statement, and COMMIT.

        Returns the keys that were taken already. Unless it is empty, everything was rolled back (judged by row
        count, never by an exception: P22).
        """
        ...

    async def abandon(self) -> None:
        """Give up a transaction whose handler does not let go of it.

        Its connection is cut, so that the database rolls back. In a thread, where the handler may be using it, it is
        rolled back when the handler has returned; connection and permit stay taken until then.
        """
        ...


class ParticipantStore(Protocol):
    """What a participant needs of its own database."""

    @property
    def transactions_max(self) -> int:
        """How many handler transactions can be open at a time; more wait in `__aenter__`, first come first served."""
        ...

    def serve_threads(self) -> None:
        """Get ready for transactions in threads. Raises MissingExtra if their driver is not installed."""
        ...

    def transaction(self, handler: str, thread: Thread | None = None) -> HandlerTransaction:
        """Return a transaction for the handler of that name, not begun yet; all of it happens in `thread`, if given."""
        ...

    def trouble(self, error: BaseException) -> str:
        """Tell what an exception means: BUSY (run again in place), LOST (unknown: look, then run again) or OTHER."""
        ...

    async def look_up(self, keys: Sequence[BarrierKey]) -> Mapping[BarrierKey, BarrierRow]:
        """Return the rows that are there, read in a new transaction (P22)."""
        ...

    async def decide(self, rows: Sequence[BarrierRow]) -> Mapping[BarrierKey, BarrierRow]:
        """Insert rows where there are none, in a transaction of their own; return the rows that stand now."""
        ...

    async def replace(self, row: BarrierRow, was: str) -> BarrierRow:
        """Give a row another outcome and reply if its outcome is `was`; return the row that stands then.

        In a transaction of its own. The row is there: `decide` comes first.
        """
        ...

    async def count_lone_run(self, command_id: str) -> int:
        """Count, durably, that a command is about to run alone; return how often it has, this one included (P14)."""
        ...

    async def forget_lone_run(self, command_id: str) -> None:
        """Delete the count: the command had an outcome."""
        ...

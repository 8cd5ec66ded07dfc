"""The tables. Coordinator and participant each use their part; one migration makes both, in every database of ours.

Rows are named by ids that we make (UUIDv7); identity columns only order. The namespace is part of every key.
Payload columns are bytes of JSON and are written once; what moves is the small `state` snapshot.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    UniqueConstraint,
    text,
)

from saga.storage.sqlalchemy.types import IDENTITY, data, instant, key, long_name, name, prose, uuid, word

metadata: Final[MetaData] = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    }
)

# --- coordinator ------------------------------------------------------------------------------

definition: Final[Table] = Table(
    "saga_definition",
    metadata,
    Column("namespace", name(), nullable=False),
    Column("name", name(), nullable=False),
    Column("version", Integer, nullable=False),
    Column("fingerprint", name(), nullable=False),
    Column("content", prose(), nullable=False),
    Column("created_at", instant(), nullable=False),
    PrimaryKeyConstraint("namespace", "name", "version"),
)

instance: Final[Table] = Table(
    "saga_instance",
    metadata,
    Column("namespace", name(), nullable=False),
    Column("run_id", uuid(), nullable=False),
    Column("saga", name(), nullable=False),
    Column("saga_version", Integer, nullable=False),
    Column("saga_id", key(), nullable=False),
    Column("run_number", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("status", word(), nullable=False),
    Column("state", prose(), nullable=False),
    Column("input", data(), nullable=False),
    Column("result", data()),
    Column("created_at", instant(), nullable=False),
    Column("closed_at", instant()),
    # Set exactly while the instance is open, and never later than the true due time, which the state knows.
    # Usually it is earlier: moving it with every transition would cost an index entry each (docs/design/0001).
    Column("wakeup_at", instant()),
    PrimaryKeyConstraint("namespace", "run_id"),
    UniqueConstraint("namespace", "saga", "saga_id", "run_number"),
    CheckConstraint("(wakeup_at IS NULL) = (closed_at IS NOT NULL)", name="open_is_woken"),
)
Index(
    "ix_saga_instance_wakeup",
    instance.c.namespace,
    instance.c.wakeup_at,
    postgresql_where=text("wakeup_at IS NOT NULL"),
    sqlite_where=text("wakeup_at IS NOT NULL"),
)

history: Final[Table] = Table(
    "saga_history",
    metadata,
    Column("namespace", name(), nullable=False),
    Column("run_id", uuid(), nullable=False),
    Column("version", Integer, nullable=False),
    Column("event", word(), nullable=False),
    Column("step", name()),
    Column("direction", word()),
    Column("attempt", Integer),
    Column("detail", prose()),
    Column("at", instant(), nullable=False),
    PrimaryKeyConstraint("namespace", "run_id", "version"),
)

value: Final[Table] = Table(
    "saga_value",
    metadata,
    Column("namespace", name(), nullable=False),
    Column("run_id", uuid(), nullable=False),
    Column("step", name(), nullable=False),
    Column("iteration", Integer, nullable=False),
    Column("round", Integer, nullable=False),
    Column("kind", word(), nullable=False),  # input | output | undo | refusal | error
    Column("data", data(), nullable=False),
    PrimaryKeyConstraint("namespace", "run_id", "step", "iteration", "round", "kind"),
)

pending_reply: Final[Table] = Table(
    # P29: replies that came to a process without the instance's version, until one that has it takes them.
    "saga_pending_reply",
    metadata,
    Column("id", IDENTITY, primary_key=True, autoincrement=True),
    Column("namespace", name(), nullable=False),
    Column("run_id", uuid(), nullable=False),
    Column("saga", name(), nullable=False),
    Column("saga_version", Integer, nullable=False),
    Column("body", data(), nullable=False),
    Column("received_at", instant(), nullable=False),
    sqlite_autoincrement=True,
)
Index(
    "ix_saga_pending_reply_saga",
    pending_reply.c.namespace,
    pending_reply.c.saga,
    pending_reply.c.saga_version,
)

stale_reply: Final[Table] = Table(
    "saga_stale_reply",
    metadata,
    Column("id", IDENTITY, primary_key=True, autoincrement=True),
    Column("namespace", name(), nullable=False),
    Column("run_id", uuid(), nullable=False),
    Column("step", name(), nullable=False),
    Column("direction", word(), nullable=False),
    Column("command_id", long_name(), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("outcome", word(), nullable=False),
    Column("received_at", instant(), nullable=False),
    sqlite_autoincrement=True,
)
Index("ix_saga_stale_reply_run", stale_reply.c.namespace, stale_reply.c.run_id)

incident: Final[Table] = Table(
    "saga_incident",
    metadata,
    Column("namespace", name(), nullable=False),
    Column("run_id", uuid(), nullable=False),
    Column("kind", word(), nullable=False),
    Column("step", name(), nullable=False),
    Column("saga", name(), nullable=False),
    Column("error", prose(), nullable=False),  # a code or class name, never a text
    Column("fingerprint", name(), nullable=False),
    Column("count", Integer, nullable=False),
    Column("first_seen_at", instant(), nullable=False),
    Column("last_seen_at", instant(), nullable=False),
    Column("resolved_at", instant()),
    PrimaryKeyConstraint("namespace", "run_id", "kind", "step"),
)

audit: Final[Table] = Table(
    "saga_audit",
    metadata,
    Column("id", IDENTITY, primary_key=True, autoincrement=True),
    Column("namespace", name(), nullable=False),
    Column("run_id", uuid(), nullable=False),
    Column("request_id", uuid(), nullable=False),
    Column("verb", word(), nullable=False),
    Column("actor", prose(), nullable=False),
    Column("reason", prose(), nullable=False),
    Column("status_before", word(), nullable=False),
    Column("status_after", word(), nullable=False),
    Column("detail", prose()),
    Column("at", instant(), nullable=False),
    UniqueConstraint("namespace", "request_id"),
    sqlite_autoincrement=True,
)

# --- outbox -----------------------------------------------------------------------------------

outbox: Final[Table] = Table(
    # Insert and delete only; no update on the hot path, no status column (pitfalls 6.1).
    "saga_outbox",
    metadata,
    Column("id", IDENTITY, primary_key=True, autoincrement=True),
    Column("namespace", name(), nullable=False),
    Column("part", SmallInteger, nullable=False),
    Column("message_id", uuid(), nullable=False),
    Column("channel", name(), nullable=False),
    Column("ordering_key", key(), nullable=False),
    Column("body", data(), nullable=False),
    Column("created_at", instant(), nullable=False),
    sqlite_autoincrement=True,  # a deleted highest id must not come back (LITE-3)
)
Index("ix_saga_outbox_part", outbox.c.namespace, outbox.c.part, outbox.c.id)

outbox_delayed: Final[Table] = Table(
    # Rows that are not due yet wait here and move to the outbox, so that its low-water hint need not wait for them.
    "saga_outbox_delayed",
    metadata,
    Column("message_id", uuid(), primary_key=True),
    Column("namespace", name(), nullable=False),
    Column("part", SmallInteger, nullable=False),
    Column("channel", name(), nullable=False),
    Column("ordering_key", key(), nullable=False),
    Column("body", data(), nullable=False),
    Column("due_at", instant(), nullable=False),
)
Index("ix_saga_outbox_delayed_due", outbox_delayed.c.namespace, outbox_delayed.c.due_at)

lease: Final[Table] = Table(
    "saga_lease",
    metadata,
    Column("namespace", name(), nullable=False),
    Column("name", name(), nullable=False),
    Column("owner", uuid()),
    Column("epoch", Integer, nullable=False),
    Column("expires_at", instant(), nullable=False),
    PrimaryKeyConstraint("namespace", "name"),
)

blocked_key: Final[Table] = Table(
    # Ordering keys whose oldest row the broker would not take: attempts and next try, fenced by the lease's epoch.
    "saga_outbox_blocked",
    metadata,
    Column("namespace", name(), nullable=False),
    Column("ordering_key", key(), nullable=False),
    Column("part", SmallInteger, nullable=False),
    Column("reason", prose(), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_try_at", instant(), nullable=False),
    PrimaryKeyConstraint("namespace", "ordering_key"),
)

parked: Final[Table] = Table(
    # Messages that could not be handled: raw bytes, headers and the reason, confirmed here before they are acked.
    "saga_parked",
    metadata,
    Column("id", uuid(), primary_key=True),
    Column("namespace", name(), nullable=False),
    Column("channel", name(), nullable=False),
    Column("reason", prose(), nullable=False),
    Column("fingerprint", name(), nullable=False),
    Column("content_type", prose(), nullable=False),
    Column("headers", prose(), nullable=False),
    Column("body", data(), nullable=False),
    Column("parked_at", instant(), nullable=False),
)
Index("ix_saga_parked_fingerprint", parked.c.namespace, parked.c.fingerprint)

# --- database as broker -----------------------------------------------------------------------

channel: Final[Table] = Table(
    # The channels that were declared, each with the one that takes what is delivered too often.
    "saga_channel",
    metadata,
    Column("name", name(), nullable=False),
    Column("parking", name()),
    PrimaryKeyConstraint("name"),
)

queue: Final[Table] = Table(
    # Messages that nobody has claimed yet: insert and delete only. The coordinator's commit writes its own.
    "saga_queue",
    metadata,
    Column("id", IDENTITY, primary_key=True, autoincrement=True),
    Column("channel", name(), nullable=False),
    Column("message_id", uuid(), nullable=False),
    Column("ordering_key", key(), nullable=False),
    Column("content_type", prose(), nullable=False),
    Column("headers", prose(), nullable=False),
    Column("body", data(), nullable=False),
    Column("created_at", instant(), nullable=False),
    sqlite_autoincrement=True,  # the id of an acked message must not come back
)
Index("ix_saga_queue_channel", queue.c.channel, queue.c.id)

consumer: Final[Table] = Table(
    # Who consumes now. A claim holds for as long as its consumer renews this row, which is one write for all claims.
    "saga_consumer",
    metadata,
    Column("token", uuid(), nullable=False),
    Column("channel", name(), nullable=False),
    Column("expires_at", instant(), nullable=False),
    # PostgreSQL: the advisory lock that its process holds for as long as it lives, so that a death is seen at once.
    Column("presence", BigInteger),
    PrimaryKeyConstraint("token"),
)

claim: Final[Table] = Table(
    # Messages that were claimed: moved here by the claim, deleted by the ack. Only the database broker writes here.
    # Without a token it was given back, and waits until `due_at`.
    "saga_claim",
    metadata,
    Column("id", IDENTITY, autoincrement=False, nullable=False),
    Column("channel", name(), nullable=False),
    Column("token", uuid()),
    Column("due_at", instant()),
    Column("deliveries", Integer, nullable=False),
    Column("message_id", uuid(), nullable=False),
    Column("ordering_key", key(), nullable=False),
    Column("content_type", prose(), nullable=False),
    Column("headers", prose(), nullable=False),
    Column("body", data(), nullable=False),
    Column("created_at", instant(), nullable=False),
    PrimaryKeyConstraint("id"),
)
Index("ix_saga_claim_token", claim.c.token)

# --- participant ------------------------------------------------------------------------------

barrier: Final[Table] = Table(
    # One row per decided (run, step, pass, round, direction): the reply's outbox. Written in the transaction of the
    # business write and never updated (row D-10), save where the effect is outside the database: then it is committed
    # as `attempted` before the call, and each further step is an update conditional on the one before (P27).
    "saga_barrier",
    metadata,
    Column("namespace", name(), nullable=False),
    Column("run_id", uuid(), nullable=False),
    Column("step", name(), nullable=False),
    Column("iteration", Integer, nullable=False),
    Column("round", Integer, nullable=False),
    Column("direction", word(), nullable=False),  # forward | compensate
    # done | refused | cancelled | nothing_to_undo; outside the database also attempted | closed | late_effect
    Column("outcome", word(), nullable=False),
    Column("reply", data()),  # the reply's data; null for `cancelled`
    Column("decided_at", instant(), nullable=False),
    PrimaryKeyConstraint("namespace", "run_id", "step", "iteration", "round", "direction"),
)

lone_run: Final[Table] = Table(
    # P14: how often a command ran alone in its process without an outcome; only commands on their third delivery
    # ever get a row, and an outcome deletes it.
    "saga_lone_run",
    metadata,
    Column("namespace", name(), nullable=False),
    Column("command_id", long_name(), nullable=False),
    Column("runs", Integer, nullable=False),
    Column("last_run_at", instant(), nullable=False),
    PrimaryKeyConstraint("namespace", "command_id"),
)

# --- inbox ------------------------------------------------------------------------------------

inbox: Final[Table] = Table(
    # One row per event that was acted on, written in the transaction of its handler and never updated (row F-08).
    "saga_inbox",
    metadata,
    Column("namespace", name(), nullable=False),
    Column("topic", name(), nullable=False),
    Column("message_key", uuid(), nullable=False),  # made from source and id, or from a business key
    Column("received_at", instant(), nullable=False),
    PrimaryKeyConstraint("namespace", "topic", "message_key"),
)
Index("ix_saga_inbox_received", inbox.c.namespace, inbox.c.received_at)

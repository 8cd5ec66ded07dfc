"""First light: definitions, instances, outbox, leases, parking and the participant's barrier."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

from saga.storage.sqlalchemy.migrations.columns import (
    INNODB,
    create_index,
    data,
    instant,
    integer,
    key,
    long_name,
    name,
    number,
    prose,
    small,
    uuid,
    word,
)

revision = "0001_first_light"
down_revision = None
branch_labels: tuple[str, ...] = ("saga",)
depends_on = None

# pitfalls 6.2: rows of the outbox live for milliseconds. Vacuum goes by their number, not by the table's size, and
# does not pause, or polling slows down with the dead rows.
SHORT_LIVED = {
    "autovacuum_vacuum_scale_factor": 0,
    "autovacuum_vacuum_threshold": 1000,
    "autovacuum_vacuum_cost_delay": 0,
}
# An instance is rewritten with every transition. Room in its page makes that a heap-only update: no index entry.
REWRITTEN = {"fillfactor": 75}


def upgrade(op: Operations) -> None:
    _coordinator(op)
    _reports(op)
    _outbox(op)
    _participant(op)


def _coordinator(op: Operations) -> None:
    op.create_table(
        "saga_definition",
        name("namespace"),
        name("name"),
        integer("version"),
        name("fingerprint"),
        prose("content"),
        instant("created_at"),
        sa.PrimaryKeyConstraint("namespace", "name", "version", name="pk_saga_definition"),
        if_not_exists=True,
        **INNODB,
    )
    op.create_table(
        "saga_instance",
        name("namespace"),
        uuid("run_id"),
        name("saga"),
        integer("saga_version"),
        key("saga_id"),
        integer("run_number"),
        integer("version"),
        word("status"),
        prose("state"),
        data("input"),
        data("result", nullable=True),
        instant("created_at"),
        instant("closed_at", nullable=True),
        instant("wakeup_at", nullable=True),
        sa.PrimaryKeyConstraint("namespace", "run_id", name="pk_saga_instance"),
        sa.UniqueConstraint(
            "namespace",
            "saga",
            "saga_id",
            "run_number",
            name="uq_saga_instance_namespace_saga_saga_id_run_number",
        ),
        sa.CheckConstraint(
            "(wakeup_at IS NULL) = (closed_at IS NOT NULL)", name="ck_saga_instance_open_is_woken"
        ),
        postgresql_with=REWRITTEN,
        if_not_exists=True,
        **INNODB,
    )
    create_index(
        op,
        "ix_saga_instance_wakeup",
        "saga_instance",
        ["namespace", "wakeup_at"],
        postgresql_where=sa.text("wakeup_at IS NOT NULL"),
        sqlite_where=sa.text("wakeup_at IS NOT NULL"),
    )
    op.create_table(
        "saga_history",
        name("namespace"),
        uuid("run_id"),
        integer("version"),
        word("event"),
        name("step", nullable=True),
        word("direction", nullable=True),
        integer("attempt", nullable=True),
        prose("detail", nullable=True),
        instant("at"),
        sa.PrimaryKeyConstraint("namespace", "run_id", "version", name="pk_saga_history"),
        if_not_exists=True,
        **INNODB,
    )
    op.create_table(
        "saga_value",
        name("namespace"),
        uuid("run_id"),
        name("step"),
        integer("iteration"),
        integer("round"),
        word("kind"),
        data("data"),
        sa.PrimaryKeyConstraint(
            "namespace", "run_id", "step", "iteration", "round", "kind", name="pk_saga_value"
        ),
        if_not_exists=True,
        **INNODB,
    )


def _reports(op: Operations) -> None:
    op.create_table(
        "saga_pending_reply",
        number(),
        name("namespace"),
        uuid("run_id"),
        name("saga"),
        integer("saga_version"),
        data("body"),
        instant("received_at"),
        sa.PrimaryKeyConstraint("id", name="pk_saga_pending_reply"),
        sqlite_autoincrement=True,
        if_not_exists=True,
        **INNODB,
    )
    create_index(
        op,
        "ix_saga_pending_reply_saga",
        "saga_pending_reply",
        ["namespace", "saga", "saga_version"],
    )
    op.create_table(
        "saga_stale_reply",
        number(),
        name("namespace"),
        uuid("run_id"),
        name("step"),
        word("direction"),
        long_name("command_id"),
        integer("attempt"),
        word("outcome"),
        instant("received_at"),
        sa.PrimaryKeyConstraint("id", name="pk_saga_stale_reply"),
        sqlite_autoincrement=True,
        if_not_exists=True,
        **INNODB,
    )
    create_index(op, "ix_saga_stale_reply_run", "saga_stale_reply", ["namespace", "run_id"])
    op.create_table(
        "saga_incident",
        name("namespace"),
        uuid("run_id"),
        word("kind"),
        name("step"),
        name("saga"),
        prose("error"),
        name("fingerprint"),
        integer("count"),
        instant("first_seen_at"),
        instant("last_seen_at"),
        instant("resolved_at", nullable=True),
        sa.PrimaryKeyConstraint("namespace", "run_id", "kind", "step", name="pk_saga_incident"),
        if_not_exists=True,
        **INNODB,
    )
    op.create_table(
        "saga_audit",
        number(),
        name("namespace"),
        uuid("run_id"),
        uuid("request_id"),
        word("verb"),
        prose("actor"),
        prose("reason"),
        word("status_before"),
        word("status_after"),
        instant("at"),
        sa.PrimaryKeyConstraint("id", name="pk_saga_audit"),
        sa.UniqueConstraint("namespace", "request_id", name="uq_saga_audit_namespace_request_id"),
        sqlite_autoincrement=True,
        if_not_exists=True,
        **INNODB,
    )


def _outbox(op: Operations) -> None:
    op.create_table(
        "saga_outbox",
        number(),
        name("namespace"),
        small("part"),
        uuid("message_id"),
        name("channel"),
        key("ordering_key"),
        data("body"),
        instant("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_saga_outbox"),
        sqlite_autoincrement=True,  # LITE-3: a deleted highest id must not come back
        postgresql_with=SHORT_LIVED,
        if_not_exists=True,
        **INNODB,
    )
    create_index(op, "ix_saga_outbox_part", "saga_outbox", ["namespace", "part", "id"])
    op.create_table(
        "saga_outbox_delayed",
        uuid("message_id"),
        name("namespace"),
        small("part"),
        name("channel"),
        key("ordering_key"),
        data("body"),
        instant("due_at"),
        sa.PrimaryKeyConstraint("message_id", name="pk_saga_outbox_delayed"),
        if_not_exists=True,
        **INNODB,
    )
    create_index(op, "ix_saga_outbox_delayed_due", "saga_outbox_delayed", ["namespace", "due_at"])
    op.create_table(
        "saga_lease",
        name("namespace"),
        name("name"),
        uuid("owner", nullable=True),
        integer("epoch"),
        instant("expires_at"),
        sa.PrimaryKeyConstraint("namespace", "name", name="pk_saga_lease"),
        if_not_exists=True,
        **INNODB,
    )
    op.create_table(
        "saga_outbox_blocked",
        name("namespace"),
        key("ordering_key"),
        small("part"),
        prose("reason"),
        integer("attempts"),
        instant("next_try_at"),
        sa.PrimaryKeyConstraint("namespace", "ordering_key", name="pk_saga_outbox_blocked"),
        if_not_exists=True,
        **INNODB,
    )
    op.create_table(
        "saga_parked",
        uuid("id"),
        name("namespace"),
        name("channel"),
        prose("reason"),
        name("fingerprint"),
        prose("content_type"),
        prose("headers"),
        data("body"),
        instant("parked_at"),
        sa.PrimaryKeyConstraint("id", name="pk_saga_parked"),
        if_not_exists=True,
        **INNODB,
    )
    create_index(op, "ix_saga_parked_fingerprint", "saga_parked", ["namespace", "fingerprint"])


def _participant(op: Operations) -> None:
    op.create_table(
        "saga_barrier",
        name("namespace"),
        uuid("run_id"),
        name("step"),
        integer("iteration"),
        integer("round"),
        word("direction"),
        word("outcome"),
        data("reply", nullable=True),
        instant("decided_at"),
        sa.PrimaryKeyConstraint(
            "namespace", "run_id", "step", "iteration", "round", "direction", name="pk_saga_barrier"
        ),
        if_not_exists=True,
        **INNODB,
    )
    op.create_table(
        "saga_lone_run",
        name("namespace"),
        long_name("command_id"),
        integer("runs"),
        instant("last_run_at"),
        sa.PrimaryKeyConstraint("namespace", "command_id", name="pk_saga_lone_run"),
        if_not_exists=True,
        **INNODB,
    )

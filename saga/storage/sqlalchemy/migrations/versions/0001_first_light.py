"""First light: definitions, instances, outbox, leases, parking and the participant's barrier."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0001_first_light"
down_revision = None
branch_labels: tuple[str, ...] = ("saga",)
depends_on = None

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # LITE-4: SQLite numbers INTEGER keys only

# pitfalls 6.2: rows of the outbox live for milliseconds. Vacuum goes by their number, not by the table's size, and
# does not pause, or polling slows down with the dead rows.
SHORT_LIVED = {
    "autovacuum_vacuum_scale_factor": 0,
    "autovacuum_vacuum_threshold": 1000,
    "autovacuum_vacuum_cost_delay": 0,
}
# An instance is rewritten with every transition. Room in its page makes that a heap-only update: no index entry.
REWRITTEN = {"fillfactor": 75}


def text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=False)


def integer(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer(), nullable=False)


def uuid(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.Uuid(), nullable=False)


def data(name: str) -> sa.Column[bytes]:
    return sa.Column(name, sa.LargeBinary(), nullable=False)


def instant(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def number() -> sa.Column[int]:
    return sa.Column("id", NUMBER, autoincrement=True, nullable=False)


def upgrade(op: Operations) -> None:
    _coordinator(op)
    _reports(op)
    _outbox(op)
    _participant(op)


def _coordinator(op: Operations) -> None:
    op.create_table(
        "saga_definition",
        text("namespace"),
        text("name"),
        integer("version"),
        text("fingerprint"),
        text("content"),
        instant("created_at"),
        sa.PrimaryKeyConstraint("namespace", "name", "version", name="pk_saga_definition"),
        if_not_exists=True,
    )
    op.create_table(
        "saga_instance",
        text("namespace"),
        uuid("run_id"),
        text("saga"),
        integer("saga_version"),
        text("saga_id"),
        integer("run_number"),
        integer("version"),
        text("status"),
        text("state"),
        data("input"),
        sa.Column("result", sa.LargeBinary()),
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
    )
    op.create_index(
        "ix_saga_instance_wakeup",
        "saga_instance",
        ["namespace", "wakeup_at"],
        postgresql_where=sa.text("wakeup_at IS NOT NULL"),
        sqlite_where=sa.text("wakeup_at IS NOT NULL"),
        if_not_exists=True,
    )
    op.create_table(
        "saga_history",
        text("namespace"),
        uuid("run_id"),
        integer("version"),
        text("event"),
        sa.Column("step", sa.Text()),
        sa.Column("direction", sa.Text()),
        sa.Column("attempt", sa.Integer()),
        sa.Column("detail", sa.Text()),
        instant("at"),
        sa.PrimaryKeyConstraint("namespace", "run_id", "version", name="pk_saga_history"),
        if_not_exists=True,
    )
    op.create_table(
        "saga_value",
        text("namespace"),
        uuid("run_id"),
        text("step"),
        integer("iteration"),
        integer("round"),
        text("kind"),
        data("data"),
        sa.PrimaryKeyConstraint(
            "namespace", "run_id", "step", "iteration", "round", "kind", name="pk_saga_value"
        ),
        if_not_exists=True,
    )


def _reports(op: Operations) -> None:
    op.create_table(
        "saga_pending_reply",
        number(),
        text("namespace"),
        uuid("run_id"),
        text("saga"),
        integer("saga_version"),
        data("body"),
        instant("received_at"),
        sa.PrimaryKeyConstraint("id", name="pk_saga_pending_reply"),
        sqlite_autoincrement=True,
        if_not_exists=True,
    )
    op.create_index(
        "ix_saga_pending_reply_saga",
        "saga_pending_reply",
        ["namespace", "saga", "saga_version"],
        if_not_exists=True,
    )
    op.create_table(
        "saga_stale_reply",
        number(),
        text("namespace"),
        uuid("run_id"),
        text("step"),
        text("direction"),
        text("command_id"),
        integer("attempt"),
        text("outcome"),
        instant("received_at"),
        sa.PrimaryKeyConstraint("id", name="pk_saga_stale_reply"),
        sqlite_autoincrement=True,
        if_not_exists=True,
    )
    op.create_index(
        "ix_saga_stale_reply_run", "saga_stale_reply", ["namespace", "run_id"], if_not_exists=True
    )
    op.create_table(
        "saga_incident",
        text("namespace"),
        uuid("run_id"),
        text("kind"),
        text("step"),
        text("saga"),
        text("error"),
        text("fingerprint"),
        integer("count"),
        instant("first_seen_at"),
        instant("last_seen_at"),
        instant("resolved_at", nullable=True),
        sa.PrimaryKeyConstraint("namespace", "run_id", "kind", "step", name="pk_saga_incident"),
        if_not_exists=True,
    )
    op.create_table(
        "saga_audit",
        number(),
        text("namespace"),
        uuid("run_id"),
        uuid("request_id"),
        text("verb"),
        text("actor"),
        text("reason"),
        text("status_before"),
        text("status_after"),
        instant("at"),
        sa.PrimaryKeyConstraint("id", name="pk_saga_audit"),
        sa.UniqueConstraint("namespace", "request_id", name="uq_saga_audit_namespace_request_id"),
        sqlite_autoincrement=True,
        if_not_exists=True,
    )


def _outbox(op: Operations) -> None:
    op.create_table(
        "saga_outbox",
        number(),
        text("namespace"),
        sa.Column("part", sa.SmallInteger(), nullable=False),
        uuid("message_id"),
        text("channel"),
        text("ordering_key"),
        data("body"),
        instant("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_saga_outbox"),
        sqlite_autoincrement=True,  # LITE-3: a deleted highest id must not come back
        postgresql_with=SHORT_LIVED,
        if_not_exists=True,
    )
    op.create_index("ix_saga_outbox_part", "saga_outbox", ["namespace", "part", "id"], if_not_exists=True)
    op.create_table(
        "saga_outbox_delayed",
        uuid("message_id"),
        text("namespace"),
        sa.Column("part", sa.SmallInteger(), nullable=False),
        text("channel"),
        text("ordering_key"),
        data("body"),
        instant("due_at"),
        sa.PrimaryKeyConstraint("message_id", name="pk_saga_outbox_delayed"),
        if_not_exists=True,
    )
    op.create_index(
        "ix_saga_outbox_delayed_due", "saga_outbox_delayed", ["namespace", "due_at"], if_not_exists=True
    )
    op.create_table(
        "saga_lease",
        text("namespace"),
        text("name"),
        sa.Column("owner", sa.Uuid()),
        integer("epoch"),
        instant("expires_at"),
        sa.PrimaryKeyConstraint("namespace", "name", name="pk_saga_lease"),
        if_not_exists=True,
    )
    op.create_table(
        "saga_outbox_blocked",
        text("namespace"),
        text("ordering_key"),
        sa.Column("part", sa.SmallInteger(), nullable=False),
        text("reason"),
        integer("attempts"),
        instant("next_try_at"),
        sa.PrimaryKeyConstraint("namespace", "ordering_key", name="pk_saga_outbox_blocked"),
        if_not_exists=True,
    )
    op.create_table(
        "saga_parked",
        uuid("id"),
        text("namespace"),
        text("channel"),
        text("reason"),
        text("fingerprint"),
        text("content_type"),
        text("headers"),
        data("body"),
        instant("parked_at"),
        sa.PrimaryKeyConstraint("id", name="pk_saga_parked"),
        if_not_exists=True,
    )
    op.create_index(
        "ix_saga_parked_fingerprint", "saga_parked", ["namespace", "fingerprint"], if_not_exists=True
    )


def _participant(op: Operations) -> None:
    op.create_table(
        "saga_barrier",
        text("namespace"),
        uuid("run_id"),
        text("step"),
        integer("iteration"),
        integer("round"),
        text("direction"),
        text("outcome"),
        sa.Column("reply", sa.LargeBinary()),
        instant("decided_at"),
        sa.PrimaryKeyConstraint(
            "namespace", "run_id", "step", "iteration", "round", "direction", name="pk_saga_barrier"
        ),
        if_not_exists=True,
    )
    op.create_table(
        "saga_lone_run",
        text("namespace"),
        text("command_id"),
        integer("runs"),
        instant("last_run_at"),
        sa.PrimaryKeyConstraint("namespace", "command_id", name="pk_saga_lone_run"),
        if_not_exists=True,
    )

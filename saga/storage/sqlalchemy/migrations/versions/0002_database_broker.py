"""The database as broker: declared channels, the queue, its consumers and what they have claimed."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0002_database_broker"
down_revision = "0001_first_light"
branch_labels = None
depends_on = None

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # LITE-4: SQLite numbers INTEGER keys only

# Rows live for milliseconds: vacuum goes by their number, not by the table's size (pitfalls 6.2).
SHORT_LIVED = {
    "autovacuum_vacuum_scale_factor": 0,
    "autovacuum_vacuum_threshold": 1000,
    "autovacuum_vacuum_cost_delay": 0,
}


def text(name: str, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=nullable)


def uuid(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.Uuid(), nullable=nullable)


def instant(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def message() -> list[sa.Column[Any]]:
    return [
        uuid("message_id"),
        text("ordering_key"),
        text("content_type"),
        text("headers"),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        instant("created_at"),
    ]


def upgrade(op: Operations) -> None:
    op.create_table(
        "saga_channel",
        text("name"),
        text("parking", nullable=True),
        sa.PrimaryKeyConstraint("name", name="pk_saga_channel"),
        if_not_exists=True,
    )
    op.create_table(
        "saga_queue",
        sa.Column("id", NUMBER, autoincrement=True, nullable=False),
        text("channel"),
        *message(),
        sa.PrimaryKeyConstraint("id", name="pk_saga_queue"),
        sqlite_autoincrement=True,  # the id of an acked message must not come back
        postgresql_with=SHORT_LIVED,
        if_not_exists=True,
    )
    op.create_index("ix_saga_queue_channel", "saga_queue", ["channel", "id"], if_not_exists=True)
    op.create_table(
        "saga_consumer",
        uuid("token"),
        text("channel"),
        instant("expires_at"),
        sa.Column("presence", sa.BigInteger()),
        sa.PrimaryKeyConstraint("token", name="pk_saga_consumer"),
        if_not_exists=True,
    )
    op.create_table(
        "saga_claim",
        sa.Column("id", NUMBER, autoincrement=False, nullable=False),
        text("channel"),
        uuid("token", nullable=True),
        instant("due_at", nullable=True),
        sa.Column("deliveries", sa.Integer(), nullable=False),
        *message(),
        sa.PrimaryKeyConstraint("id", name="pk_saga_claim"),
        postgresql_with=SHORT_LIVED,
        if_not_exists=True,
    )
    op.create_index("ix_saga_claim_token", "saga_claim", ["token"], if_not_exists=True)

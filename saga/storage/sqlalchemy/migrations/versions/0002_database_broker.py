"""The database as broker: declared channels, the queue, its consumers and what they have claimed."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic.operations import Operations

from saga.storage.sqlalchemy.migrations.columns import (
    INNODB,
    NUMBER,
    create_index,
    data,
    instant,
    integer,
    key,
    name,
    number,
    prose,
    uuid,
)

revision = "0002_database_broker"
down_revision = "0001_first_light"
branch_labels = None
depends_on = None

# Rows live for milliseconds: vacuum goes by their number, not by the table's size (pitfalls 6.2).
SHORT_LIVED = {
    "autovacuum_vacuum_scale_factor": 0,
    "autovacuum_vacuum_threshold": 1000,
    "autovacuum_vacuum_cost_delay": 0,
}


def message() -> list[sa.Column[Any]]:
    return [
        uuid("message_id"),
        key("ordering_key"),
        prose("content_type"),
        prose("headers"),
        data("body"),
        instant("created_at"),
    ]


def upgrade(op: Operations) -> None:
    op.create_table(
        "saga_channel",
        name("name"),
        name("parking", nullable=True),
        sa.PrimaryKeyConstraint("name", name="pk_saga_channel"),
        if_not_exists=True,
        **INNODB,
    )
    op.create_table(
        "saga_queue",
        number(),
        name("channel"),
        *message(),
        sa.PrimaryKeyConstraint("id", name="pk_saga_queue"),
        sqlite_autoincrement=True,  # the id of an acked message must not come back
        postgresql_with=SHORT_LIVED,
        if_not_exists=True,
        **INNODB,
    )
    create_index(op, "ix_saga_queue_channel", "saga_queue", ["channel", "id"])
    op.create_table(
        "saga_consumer",
        uuid("token"),
        name("channel"),
        instant("expires_at"),
        sa.Column("presence", sa.BigInteger()),
        sa.PrimaryKeyConstraint("token", name="pk_saga_consumer"),
        if_not_exists=True,
        **INNODB,
    )
    op.create_table(
        "saga_claim",
        sa.Column("id", NUMBER, autoincrement=False, nullable=False),
        name("channel"),
        uuid("token", nullable=True),
        instant("due_at", nullable=True),
        integer("deliveries"),
        *message(),
        sa.PrimaryKeyConstraint("id", name="pk_saga_claim"),
        postgresql_with=SHORT_LIVED,
        if_not_exists=True,
        **INNODB,
    )
    create_index(op, "ix_saga_claim_token", "saga_claim", ["token"])

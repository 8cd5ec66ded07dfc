"""The inbox: which plain events were acted on."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

from saga.storage.sqlalchemy.migrations.columns import INNODB, create_index, instant, name, uuid

revision = "0004_inbox"
down_revision = "0003_operators"
branch_labels = None
depends_on = None


def upgrade(op: Operations) -> None:
    op.create_table(
        "saga_inbox",
        name("namespace"),
        name("topic"),
        uuid("message_key"),
        instant("received_at"),
        sa.PrimaryKeyConstraint("namespace", "topic", "message_key", name="pk_saga_inbox"),
        if_not_exists=True,
        **INNODB,
    )
    create_index(op, "ix_saga_inbox_received", "saga_inbox", ["namespace", "received_at"])

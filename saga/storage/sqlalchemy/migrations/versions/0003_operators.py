"""Operators: what an audited verb left standing."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

from saga.storage.sqlalchemy.migrations.columns import prose

revision = "0003_operators"
down_revision = "0002_database_broker"
branch_labels = None
depends_on = None


def upgrade(op: Operations) -> None:
    # SQLite has no ADD COLUMN IF NOT EXISTS, and a crash after it may leave the column without the version
    context = op.get_context()
    if context.as_sql or "detail" not in _columns(op.get_bind(), "saga_audit"):
        op.add_column("saga_audit", prose("detail", nullable=True))


def _columns(connection: sa.Connection, table: str) -> set[str]:
    return {column["name"] for column in sa.inspect(connection).get_columns(table)}

"""For projects that use Alembic themselves: a filter that leaves our tables alone when both share a database.

In the project's `env.py`:

    from saga.alembic import include_object

    context.configure(connection=connection, target_metadata=target_metadata, include_object=include_object)

Then `alembic check` and `alembic revision --autogenerate` neither drop nor add what is ours, in whichever schema it is;
`saga db upgrade` looks after it. A filter of your own goes in front: `mine(...) and include_object(...)`.
"""

from __future__ import annotations

from typing import Any, Final

from saga.storage.sqlalchemy.schema import VERSION_TABLE
from saga.storage.sqlalchemy.tables import metadata

TABLES: Final = frozenset({*metadata.tables, VERSION_TABLE})
"""Names of all tables that are ours, the version table among them."""


def include_object(object_: Any, name: str | None, type_: str, reflected: bool, compare_to: Any) -> bool:
    """Return whether Alembic may compare this: False for our tables, and so for their columns and indexes."""
    return not (type_ == "table" and name in TABLES)

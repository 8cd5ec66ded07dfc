"""The coordinator's and the client's store over SQLAlchemy: each port method is one transaction of plain functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, Select, bindparam, select, tuple_

from saga.failpoints import failpoint
from saga.storage.base import (
    Advanced,
    Changes,
    Closed,
    Described,
    Existing,
    HistoryRow,
    IncidentRow,
    Loaded,
    StoredRow,
    ValueKey,
    Work,
)
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.callers import inside
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.mysql import MySQLStatements
from saga.storage.sqlalchemy.postgresql import PostgreSQLStatements
from saga.storage.sqlalchemy.recent import Known, RecentInstances
from saga.storage.sqlalchemy.statements import SERVED, Fenced, Statements, has_rare

_p = t.pending_reply.c
PENDING: Final = (
    select(_p.id, _p.body)
    .where(
        _p.namespace == bindparam("b_namespace"),
        tuple_(_p.saga, _p.saga_version).in_(SERVED),
        _p.id > bindparam("b_above"),
    )
    .order_by(_p.id)
    .limit(bindparam("b_limit"))
)
_d = t.definition.c
DEFINITIONS: Final = select(_d.name, _d.version, _d.fingerprint).where(
    _d.namespace == bindparam("b_namespace")
)


def statements_for(database: Database, namespace: str, *, queued: bool = False) -> Statements:
    """Return the statements of the database's dialect. `queued`: commands go into the queue of the database broker."""
    return _STATEMENTS[database.dialect](namespace, database.clock, queued=queued)


_STATEMENTS: Final[dict[str, type[Statements]]] = {
    "mysql": MySQLStatements,
    "postgresql": PostgreSQLStatements,
    "sqlite": Statements,
}


class SqlCoordinatorStore:
    """Adapter of `CoordinatorStore`. `recent` is shared with the client's store of the process.

    With `queued` the commands that it writes are entries of the database broker's queue already.
    """

    def __init__(
        self,
        database: Database,
        namespace: str,
        recent: RecentInstances | None = None,
        *,
        queued: bool = False,
    ) -> None:
        self._database = database
        self._recent = recent or RecentInstances(database.clock)
        self._namespace = namespace
        self._sql = statements_for(database, namespace, queued=queued)

    @property
    def writers(self) -> int:
        return self._sql.writers

    async def advance(
        self, run_ids: Collection[UUID], work: Work, confirmed: Collection[int], session: Any = None
    ) -> Advanced:
        if session is not None:
            return await inside(
                session,
                self._database,
                lambda connection: self._advance(connection, run_ids, work, confirmed),
            )
        if self._sql.decides_first:
            try:
                return await self._decide_first(run_ids, work, confirmed)
            except Fenced:
                # all of it is rolled back, and nobody knows whose version was another: with locks it cannot happen
                self._recent.mistaken()
        return await self._database.run(
            lambda connection: self._advance(connection, run_ids, work, confirmed), lost_commit="C7"
        )

    async def _decide_first(
        self, run_ids: Collection[UUID], work: Work, confirmed: Collection[int]
    ) -> Advanced:
        """Decide on rows that are not locked, and on those that this process wrote last: the versions make it safe.

        One or two round trips instead of four on PostgreSQL; on MySQL nothing is locked while Python decides.
        """
        known = self._recent.take(run_ids)
        guessed = set(known)
        missing = set(run_ids) - guessed
        while True:
            if missing:
                known.update(await self._load(missing))
            changes = await self._decide(work, known)
            # P1 checks what moves; what a guess made of a reply besides (stale, nothing to do) nothing would check
            missing = guessed.difference([row.run_id for row in changes.moved])
            if not missing:
                break
            guessed -= missing
            for run_id in missing:
                del known[run_id]
        failpoint("C6")  # decided, nothing written: a crash here leaves no trace
        advanced = await self._database.run(
            lambda connection: self._sql.write(connection, changes, confirmed),
            lost_commit="C7",
            single=not has_rare(changes),
        )
        if not guessed.isdisjoint(advanced.lost):
            self._recent.mistaken()
        for run_id in advanced.lost:
            del known[run_id]
        self._recent.keep_moved(known, changes)
        return advanced

    async def _decide(self, work: Work, known: Mapping[UUID, Known]) -> Changes:
        wanted = work.decide({run_id: each.row for run_id, each in known.items()})
        values: dict[ValueKey, bytes] = {}
        for run_id in {key.run_id for key in wanted}:
            values.update([row for row in known[run_id].values if row.key in wanted])
        if len(values) < len(wanted):
            values.update(await self._read_values([key for key in wanted if key not in values]))
        return work.changes(values)

    async def _load(self, run_ids: Collection[UUID]) -> dict[UUID, Known]:
        def read(connection: Connection) -> tuple[float, Mapping[UUID, Loaded]]:
            return self._recent.now(), self._sql.load(connection, run_ids)

        at, rows = await self._database.run(read, single=True)
        return {run_id: Known(row, at, at) for run_id, row in rows.items()}

    def _advance(
        self, connection: Connection, run_ids: Collection[UUID], work: Work, confirmed: Collection[int]
    ) -> Advanced:
        loaded: Mapping[UUID, Loaded] = self._sql.load(connection, run_ids, lock=True) if run_ids else {}
        wanted = work.decide(loaded)
        values = self._sql.read_values(connection, wanted) if wanted else {}
        changes = work.changes(values)
        failpoint("C6")
        return self._sql.write(connection, changes, confirmed)

    async def _read_values(self, keys: Collection[ValueKey]) -> Mapping[ValueKey, bytes]:
        return await self._database.run(
            lambda connection: self._sql.read_values(connection, keys), single=True
        )

    async def read_due(self, limit: int, served: Collection[tuple[str, int]]) -> Sequence[UUID]:
        return await self._database.run(
            lambda connection: self._sql.read_due(connection, limit, served), single=True
        )

    async def read_open(self, above: UUID | None, limit: int) -> Sequence[UUID]:
        i = t.instance.c
        query = (
            select(i.run_id).where(i.namespace == self._namespace, i.closed_at.is_(None)).order_by(i.run_id)
        )
        if above is not None:
            query = query.where(i.run_id > above)
        return await self._database.run(
            lambda connection: connection.execute(query.limit(limit)).scalars().all()
        )

    async def read_pending(
        self, above: int, limit: int, served: Collection[tuple[str, int]]
    ) -> Sequence[tuple[int, bytes]]:
        sought = {
            "b_namespace": self._namespace,
            "b_served": list(served),
            "b_above": above,
            "b_limit": limit,
        }
        return await self._database.run(
            lambda connection: [(row.id, row.body) for row in connection.execute(PENDING, sought)]
        )

    async def audited(self, request_id: UUID) -> tuple[str, str] | None:
        a = t.audit.c
        query = select(a.status_before, a.status_after).where(
            a.namespace == self._namespace, a.request_id == request_id
        )

        def read(connection: Connection) -> tuple[str, str] | None:
            row = connection.execute(query).first()
            return None if row is None else (row.status_before, row.status_after)

        return await self._database.run(read, single=True)

    async def register(self, definitions: Sequence[tuple[str, int, str, str]]) -> Sequence[str]:
        def transaction(connection: Connection) -> Sequence[str]:
            now = self._sql.now(connection)
            rows = [
                {
                    "namespace": self._namespace,
                    "name": name,
                    "version": version,
                    "fingerprint": fingerprint,
                    "content": content,
                    "created_at": now,
                }
                for name, version, fingerprint, content in definitions
            ]
            if rows:
                connection.execute(self._sql.insert_ignore(t.definition), rows)
            found = connection.execute(DEFINITIONS, {"b_namespace": self._namespace})
            known = {(row.name, row.version): row.fingerprint for row in found}
            return [
                name for name, version, fingerprint, _ in definitions if known[name, version] != fingerprint
            ]

        return await self._database.run(transaction)


class SqlClientStore:
    """Adapter of `ClientStore`. `recent` is given where a coordinator runs in the same process."""

    def __init__(
        self,
        database: Database,
        namespace: str,
        recent: RecentInstances | None = None,
        *,
        queued: bool = False,
    ) -> None:
        self._database = database
        self._recent = recent
        self._namespace = namespace
        self._sql = statements_for(database, namespace, queued=queued)

    async def start(self, changes: Changes) -> tuple[frozenset[UUID], Sequence[StoredRow]]:
        failpoint("C1")

        def transaction(connection: Connection) -> tuple[float, tuple[frozenset[UUID], Sequence[StoredRow]]]:
            at = self._database.clock.monotonic()
            started = self._sql.start(connection, changes)
            failpoint("C2")
            return at, started

        # one statement on PostgreSQL unless an id is known already; then the second one only reads
        at, started = await self._database.run(transaction, lost_commit="C3", single=True)
        failpoint("C4")
        if self._recent is not None and self._sql.decides_first:
            self._recent.keep_new((new for new in changes.new if new.run_id in started[0]), at)
        return started

    async def start_in(self, session: Any, changes: Changes) -> frozenset[UUID]:
        started, _ = await inside(
            session, self._database, lambda connection: self._sql.start(connection, changes)
        )
        return started

    async def find(self, session: Any, saga: str, saga_id: str) -> Existing | None:
        i = t.instance.c
        query = (
            select(i.run_id, i.run_number, i.status, i.input)
            .where(i.namespace == self._namespace, i.saga == saga, i.saga_id == saga_id)
            .order_by(i.run_number.desc())
            .limit(1)
        )

        def read(connection: Connection, query: Select[Any]) -> Existing | None:
            row = connection.execute(query).one_or_none()
            return None if row is None else Existing(*row)

        if session is None:
            return await self._database.run(lambda connection: read(connection, query))
        current = self._sql.as_committed(query)
        return await inside(session, self._database, lambda connection: read(connection, current))

    async def read_closed(self, run_ids: Collection[UUID]) -> Sequence[Closed]:
        i = t.instance.c
        query = select(i.run_id, i.status, i.result, i.state).where(
            i.namespace == self._namespace, i.run_id.in_(list(run_ids)), i.closed_at.is_not(None)
        )
        return await self._database.run(
            lambda connection: [Closed(*row) for row in connection.execute(query)], single=True
        )

    async def read_values(self, keys: Collection[ValueKey]) -> Mapping[ValueKey, bytes]:
        return await self._database.run(lambda connection: self._sql.read_values(connection, keys))

    async def describe(self, run_id: UUID) -> Described | None:
        return await self._database.run(lambda connection: self._describe(connection, run_id))

    def _describe(self, connection: Connection, run_id: UUID) -> Described | None:
        i, h, n = t.instance.c, t.history.c, t.incident.c
        row = connection.execute(
            select(
                i.run_id,
                i.saga,
                i.saga_version,
                i.saga_id,
                i.run_number,
                i.version,
                i.status,
                i.state,
                i.created_at,
                i.closed_at,
            ).where(i.namespace == self._namespace, i.run_id == run_id)
        ).one_or_none()
        if row is None:
            return None
        history = connection.execute(
            select(h.run_id, h.version, h.event, h.step, h.direction, h.attempt, h.detail, h.at)
            .where(h.namespace == self._namespace, h.run_id == run_id)
            .order_by(h.version)
        )
        incidents = connection.execute(
            select(n.run_id, n.kind, n.step, n.saga, n.error, n.fingerprint).where(
                n.namespace == self._namespace, n.run_id == run_id, n.resolved_at.is_(None)
            )
        )
        past = [(HistoryRow(*each[:7]), each.at) for each in history]
        return Described._make((*row, past, [IncidentRow(*each) for each in incidents]))

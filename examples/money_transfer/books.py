"""Reads the banks' books as an auditor would: plain SQL, a connection of its own, one snapshot, none of our library.

Money is conserved if the balances, plus what was withdrawn and neither deposited nor refunded, give the same total in
every snapshot. What is on its way counts once per transfer: a transfer that was withdrawn twice is money lost.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

ACCOUNTS = "SELECT id, balance FROM {schema}account ORDER BY id"
LEDGER = "SELECT transfer, kind, account, delta FROM {schema}ledger ORDER BY id"
NOTIFICATIONS = "SELECT transfer FROM {schema}notification ORDER BY id"
TOTAL = """
WITH balances AS ({balances}), moves AS ({moves}), on_the_way AS (
    SELECT -min(CASE WHEN kind = 'withdraw' THEN delta END) AS amount FROM moves GROUP BY transfer
    HAVING count(CASE WHEN kind = 'withdraw' THEN 1 END) > 0
       AND count(CASE WHEN kind IN ('deposit', 'refund') THEN 1 END) = 0
)
SELECT (SELECT coalesce(sum(balance), 0) FROM balances) + (SELECT coalesce(sum(amount), 0) FROM on_the_way)
"""
"""`Books.total` in one statement, for books that are too long to be read every second."""
STATES = "SELECT status, count(*) FROM saga_instance GROUP BY status"
ENDS = "SELECT saga_id, status FROM saga_instance"
SECONDS_MAX = 10.0

Rows = Sequence[Sequence[Any]]


class Move(NamedTuple):
    """One row of a ledger."""

    transfer: str
    kind: str
    account: str
    delta: int


@dataclass(frozen=True)
class Books:
    """All balances, ledgers and notifications as of one moment."""

    balances: Mapping[str, int]
    moves: Sequence[Move]
    notified: Sequence[str]

    def of(self, transfer: str) -> list[Move]:
        """Return what one transfer moved, each bank's rows in their order."""
        return [move for move in self.moves if move.transfer == transfer]

    def moved(self, account: str) -> int:
        """Return what the ledgers say an account gained since it was opened."""
        return sum(move.delta for move in self.moves if move.account == account)

    def wrong(self, ends: Mapping[str, str]) -> list[str]:
        """Return the closed transfers whose rows are not those of their end, each once and in their order."""
        moved: dict[str, list[str]] = {}
        for move in self.moves:
            moved.setdefault(move.transfer, []).append(move.kind)
        told = Counter(self.notified)
        right = {
            "completed": [(["withdraw", "deposit"], 1)],
            "compensated": [([], 0), (["withdraw", "refund"], 0)],
        }
        return [
            transfer
            for transfer, end in ends.items()
            if end in right and (moved.get(transfer, []), told[transfer]) not in right[end]
        ]

    @property
    def on_the_way(self) -> int:
        """What was withdrawn and neither deposited nor refunded, in cents."""
        arrived = {move.transfer for move in self.moves if move.kind in ("deposit", "refund")}
        withdrawn = {move.transfer: -move.delta for move in self.moves if move.kind == "withdraw"}
        return sum(amount for transfer, amount in withdrawn.items() if transfer not in arrived)

    @property
    def total(self) -> int:
        """All the money there is, in cents."""
        return sum(self.balances.values()) + self.on_the_way


class Auditor(Protocol):
    """Whoever can read the books."""

    def read(self) -> Books:
        """Return the books as of now, in one snapshot."""
        ...

    def total(self) -> int:
        """Return all the money there is, in cents, as of one snapshot."""
        ...


class SqliteAuditor:
    """Reads the one file of the embedded form."""

    def __init__(self, path: Path) -> None:
        self._url = f"sqlite:///{path}"

    def read(self) -> Books:
        return _books(
            *_in_file(self._url, [query.format(schema="") for query in (ACCOUNTS, LEDGER, NOTIFICATIONS)])
        )

    def total(self) -> int:
        ((row,),) = _in_file(self._url, [_total([""])])
        return int(row[0])


class ServerAuditor:
    """Reads the schemas of two banks and a notifier; in one snapshot, if they are in one database.

    A schema of MariaDB and MySQL is a database, and one snapshot has all of a server.
    """

    def __init__(self, banks: Sequence[tuple[str, str]], notifier: tuple[str, str]) -> None:
        """Each service is the address of its database, as a role that may read it, and its schema."""
        self._banks = banks
        self._notifier = notifier

    def read(self) -> Books:
        return asyncio.run(asyncio.wait_for(self.read_async(), SECONDS_MAX))

    def total(self) -> int:
        """Only where both banks are in one database: elsewhere there is no snapshot of both."""
        (url,) = {url for url, _ in self._banks}
        query = _total([f'"{schema}".' for _, schema in self._banks])
        found = asyncio.run(asyncio.wait_for(snapshot(url, [query]), SECONDS_MAX))
        return int(found[0][0][0])

    async def read_async(self) -> Books:
        """`read` for those who are in an event loop."""
        queries: dict[str, list[str]] = {}
        for url, schema in self._banks:
            here = queries.setdefault(url, [])
            here += [query.format(schema=f'"{schema}".') for query in (ACCOUNTS, LEDGER)]
        url, schema = self._notifier
        queries.setdefault(url, []).append(NOTIFICATIONS.format(schema=f'"{schema}".'))
        found: dict[str, list[Sequence[Any]]] = {}
        for url, here in queries.items():
            for query, rows in zip(here, await snapshot(url, here), strict=True):
                found.setdefault(query.split(" FROM ")[0], []).extend(rows)
        return _books(*(found[query.split(" FROM ")[0]] for query in (ACCOUNTS, LEDGER, NOTIFICATIONS)))


def states(environment: Mapping[str, str]) -> dict[str, int]:
    """Return how many transfers stand how, as the coordinator's database says; `environment` is a layout's."""
    return {row[0]: row[1] for row in _asked(environment, STATES)}


def ends(environment: Mapping[str, str]) -> dict[str, str]:
    """Return how each transfer stands."""
    found = _asked(environment, ENDS)
    return {id_.decode() if isinstance(id_, bytes) else id_: status for id_, status in found}


def _asked(environment: Mapping[str, str], query: str) -> Rows:
    url = environment.get("DEMO_DATABASE") or environment["MONEY_TRANSFER_COORDINATOR_DATABASE"]
    (rows,) = asyncio.run(asyncio.wait_for(snapshot(url, [query]), SECONDS_MAX))
    return rows


async def snapshot(url: str, queries: Sequence[str]) -> list[Rows]:
    """Return the rows of each query as of one moment. Names are quoted by double quotes in every kind of database."""
    scheme = url.partition(":")[0].partition("+")[0]
    if scheme == "postgresql":
        return await _on_postgresql(url, queries)
    read = _in_file if scheme == "sqlite" else _on_mysql
    return await asyncio.to_thread(read, url, queries)


def _in_file(url: str, queries: Sequence[str]) -> list[Rows]:
    path = url.partition(":///")[2]
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=SECONDS_MAX)) as connection:
        connection.execute("BEGIN")  # until the end, every statement reads what the first one saw
        return [connection.execute(query).fetchall() for query in queries]


async def _on_postgresql(url: str, queries: Sequence[str]) -> list[Rows]:
    import asyncpg

    connection = await asyncpg.connect(url.replace("+asyncpg", ""), timeout=SECONDS_MAX)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            return [[tuple(row) for row in await connection.fetch(each)] for each in queries]
    finally:
        await connection.close(timeout=SECONDS_MAX)


def _on_mysql(url: str, queries: Sequence[str]) -> list[Rows]:
    import pymysql

    at = urlsplit(url)
    with (
        pymysql.connect(
            host=at.hostname,
            port=at.port or 3306,
            user=unquote(at.username or ""),
            password=unquote(at.password or ""),
            database=at.path.removeprefix("/"),
            connect_timeout=int(SECONDS_MAX),
            read_timeout=SECONDS_MAX,
            sql_mode="ANSI_QUOTES",
        ) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        cursor.execute("START TRANSACTION WITH CONSISTENT SNAPSHOT")
        found: list[Rows] = []
        for query in queries:
            cursor.execute(query)
            found.append(cursor.fetchall())
        return found


def _total(schemas: Sequence[str]) -> str:
    return TOTAL.format(
        balances=" UNION ALL ".join(f"SELECT balance FROM {schema}account" for schema in schemas),
        moves=" UNION ALL ".join(f"SELECT transfer, kind, delta FROM {schema}ledger" for schema in schemas),
    )


def _books(accounts: Rows, ledger: Rows, notifications: Rows) -> Books:
    return Books(
        balances={row[0]: row[1] for row in accounts},
        moves=[Move(*row) for row in ledger],
        notified=[transfer for (transfer,) in notifications],
    )

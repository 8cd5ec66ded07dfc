"""How connections to each kind of server are made: a class per dialect, and the same bounds for all of them."""

from __future__ import annotations

from typing import Any, ClassVar, Final, NamedTuple, Protocol

from sqlalchemy import Engine
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from saga import transport
from saga.storage.sqlalchemy import threadengine
from saga.storage.sqlalchemy.pools import pass_over_the_dead
from saga.transport import Mode, Transport


class Bounds(NamedTuple):
    """Seconds after which a wait ends (SQL-6, SQL-7)."""

    connect: float
    statement: float
    lock: float
    idle: float | None
    """Of a transaction in which nothing happens."""

    @property
    def answer(self) -> float:
        """For the client, which gives the server time to say that it gave up."""
        return self.statement + 1


class Server(Protocol):
    """A kind of database that is reached through the network."""

    port: ClassVar[int]
    """Where it listens unless an address says otherwise."""
    single_statements: ClassVar[bool]
    """Whether a statement alone is a transaction that costs less than one with a COMMIT."""

    def engine(self, url: URL, **pool: Any) -> AsyncEngine:
        """Return the engine of the loop."""
        ...

    def thread_engine(self, url: URL, **pool: Any) -> Engine:
        """Return the engine of threads. Raises MissingExtra."""
        ...


class PostgreSQLServer:
    """PostgreSQL, through asyncpg or psycopg."""

    port: ClassVar[int] = 5432
    single_statements: ClassVar[bool] = True

    def __init__(self, bounds: Bounds, schema: str | None) -> None:
        self._bounds = bounds
        self._schema = schema

    def engine(self, url: URL, **pool: Any) -> AsyncEngine:
        bare, link = _link(url)
        return _engine(bare, self._arguments(bare, link), pool)

    def thread_engine(self, url: URL, **pool: Any) -> Engine:
        bare, link = _link(url)
        return threadengine.postgresql(
            bare,
            self._settings(),
            connect_seconds=self._bounds.connect,
            answer_seconds=self._bounds.answer,
            link=_libpq(link),
            **pool,
        )

    def _arguments(self, url: URL, link: Transport) -> dict[str, Any]:
        """Return the arguments of the driver's connections."""
        if url.get_driver_name() == "psycopg":
            from saga.storage.sqlalchemy import psycopglink  # an extra

            told = psycopglink.arguments(
                self._settings(),
                connect_seconds=self._bounds.connect,
                answer_seconds=self._bounds.answer,
            )
            return told | _libpq(link)
        return ({} if link.mode is None else {"ssl": link.context() or False}) | {
            "timeout": self._bounds.connect,
            "command_timeout": self._bounds.answer,
            "server_settings": self._settings(),
        }

    def _settings(self) -> dict[str, str]:
        """Return what the server is told of each connection."""
        settings = {
            "application_name": "saga",
            "default_transaction_isolation": "read committed",  # PG-4: also where a statement is a transaction
            "statement_timeout": str(int(self._bounds.statement * 1000)),
            "lock_timeout": str(int(self._bounds.lock * 1000)),
        }
        if self._bounds.idle is not None:
            settings["idle_in_transaction_session_timeout"] = str(int(self._bounds.idle * 1000))
        if self._schema is not None:
            settings["search_path"] = '"' + self._schema.replace('"', '""') + '"'
        return settings


class MySQLServer:
    """MySQL and MariaDB, through asyncmy; PyMySQL in threads."""

    port: ClassVar[int] = 3306
    single_statements: ClassVar[bool] = False  # to change the mode for one and back costs more than a COMMIT

    def __init__(self, bounds: Bounds, schema: str | None) -> None:
        self._bounds = bounds

    def engine(self, url: URL, **pool: Any) -> AsyncEngine:
        from saga.storage.sqlalchemy import mysqllink  # an extra

        mysqllink.silence()
        bare, link = _link(url)
        arguments = mysqllink.arguments(
            self._told(), connect_seconds=self._bounds.connect, answer_seconds=self._bounds.answer
        )
        return _engine(bare, arguments | {"ssl": link.context()}, pool)

    def thread_engine(self, url: URL, **pool: Any) -> Engine:
        bare, link = _link(url)
        return threadengine.mysql(
            bare,
            self._told,
            connect_seconds=self._bounds.connect,
            answer_seconds=self._bounds.answer,
            # by itself PyMySQL encrypts where the server can
            link={"ssl": link.context(), "ssl_disabled": link.mode is Mode.DISABLE},
            **pool,
        )

    def _told(self) -> str:
        """Return what the server is told of each connection."""
        from saga.storage.sqlalchemy import mysqllink  # an extra

        return mysqllink.settings(
            statement_seconds=self._bounds.statement,
            lock_seconds=self._bounds.lock,
            idle_seconds=self._bounds.idle,
        )


SERVERS: Final[dict[str, type[PostgreSQLServer | MySQLServer]]] = {
    "postgresql": PostgreSQLServer,
    "mysql": MySQLServer,
}


def _link(url: URL) -> tuple[URL, Transport]:
    """Return an address as its driver understands it, with the password, and what it says of the link."""
    link = transport.of(url.query, what="database")
    return url.difference_update_query(transport.WORDS).set(password=link.password(url.password)), link


def _libpq(link: Transport) -> dict[str, str]:
    """Return what libpq is told of the link, which reads the files by itself."""
    if link.mode is None:
        return {}
    link.context()  # says what is wrong with the files, which libpq would at each connection
    told = {"sslmode": str(link.mode)}
    if link.mode in (Mode.VERIFY_CA, Mode.VERIFY_FULL):
        told["sslrootcert"] = link.root or "system"
    if link.certificate is not None:
        told |= {"sslcert": link.certificate, "sslkey": link.key or link.certificate}
    return told


def _engine(url: URL, arguments: dict[str, Any], pool: dict[str, Any]) -> AsyncEngine:
    engine = create_async_engine(
        url,
        hide_parameters=True,
        isolation_level="READ COMMITTED",  # PG-4, MDB-3: set, not hoped for
        pool_use_lifo=True,
        connect_args=arguments,
        **pool,
    )
    pass_over_the_dead(engine.sync_engine)
    return engine

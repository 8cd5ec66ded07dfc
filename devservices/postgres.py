"""PostgreSQL for tests: one server given, in Docker or started here, with fresh databases and roles on request."""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import asyncpg

from devservices.base import Certificates, Origin, Unavailable
from devservices.lending import DatabaseServer
from devservices.local import LocalServer
from devservices.processes import ServerProcess, free_port, guard, primary_group

_DRIVER = "postgresql+asyncpg"
_CONNECT_SECONDS_MAX = 10.0
_Result = TypeVar("_Result")

# fsync stays on: crash tests must see what a real commit does. pg_stat_statements counts statements and commits.
_CONFIGURATION = """
port = {port}
listen_addresses = '127.0.0.1'
unix_socket_directories = '{directory}'
shared_preload_libraries = 'pg_stat_statements'
pg_stat_statements.max = 10000
max_connections = 200
shared_buffers = 128MB
fsync = on
synchronous_commit = on
log_timezone = 'UTC'
timezone = 'UTC'
"""


# Until they are gone, for what they still do would be done to the next one; 10 s at most.
_END_SESSIONS = """
DO $$ BEGIN
  FOR n IN 1..1000 LOOP
    PERFORM pg_terminate_backend(pid) FROM pg_stat_activity
      WHERE datname = current_database() AND pid <> pg_backend_pid();
    EXIT WHEN NOT FOUND;
    PERFORM pg_sleep(0.01);
    PERFORM pg_stat_clear_snapshot();
  END LOOP;
END $$
"""
# A schema or a setting of its own.
_CHANGED = """
SELECT EXISTS (SELECT 1 FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'public'))
  OR EXISTS (SELECT 1 FROM pg_db_role_setting JOIN pg_database ON pg_database.oid = setdatabase
             WHERE datname = current_database())
"""


class Postgres(DatabaseServer):
    """A PostgreSQL server that we may make databases and roles on. `url` names its maintenance database."""

    name: ClassVar[str] = "PostgreSQL"

    def __init__(self, url: str, origin: Origin) -> None:
        self.origin = origin
        self.url = _with_driver(url)
        self.version = self._read_version()
        super().__init__()

    def database_url(self, database: str, *, role: str | None = None, password: str | None = None) -> str:
        """Return the address of a database of this server, for the administrator or for another role."""
        parts = urlsplit(self.url)
        netloc = parts.netloc
        if role is not None:
            user = quote(role, safe="") + (f":{quote(password, safe='')}" if password else "")
            netloc = f"{user}@{netloc.rpartition('@')[2]}"
        return urlunsplit((parts.scheme, netloc, f"/{quote(database, safe='')}", parts.query, ""))

    def create_database(
        self, name: str | None = None, *, template: str | None = None, owner: str | None = None
    ) -> str:
        """Make a database (a fresh name unless one is given) and return its address."""
        name = name or f"saga_{secrets.token_hex(6)}"
        statement = f"CREATE DATABASE {quoted(name)} TEMPLATE {quoted(template or 'template0')}"
        self.execute(statement + (f" OWNER {quoted(owner)}" if owner else ""))
        return self.database_url(name)

    def drop_database(self, url_or_name: str) -> None:
        """Drop a database, also while connections to it are open. A missing one is fine."""
        name = database_name(url_or_name) if "://" in url_or_name else url_or_name
        self.execute(f"DROP DATABASE IF EXISTS {quoted(name)} WITH (FORCE)")

    def create_role(self, name: str | None = None, password: str | None = None) -> tuple[str, str]:
        """Make a role that may log in and nothing else; return its name and password for `database_url`."""
        name = name or f"saga_{secrets.token_hex(6)}"
        password = password or secrets.token_hex(12)
        self.execute(
            f"CREATE ROLE {quoted(name)} LOGIN PASSWORD '{password.replace(chr(39), chr(39) * 2)}'",
            f"GRANT {quoted(name)} TO CURRENT_USER",  # who is no superuser acts for roles that it is a member of
        )
        return name, password

    def drop_role(self, name: str) -> None:
        """Drop a role that owns nothing any more (drop its databases first). A missing one is fine."""
        self.execute(f"DROP ROLE IF EXISTS {quoted(name)}")

    def create_schema(self, database_url: str, name: str, *, owner: str | None = None) -> None:
        """Make a schema in a database, owned by a role; with an owner it becomes that role's search path there."""
        statements = [
            f"CREATE SCHEMA {quoted(name)}" + (f" AUTHORIZATION {quoted(owner)}" if owner else ""),
        ]
        if owner:
            database = quoted(database_name(database_url))
            statements.append(
                f"ALTER ROLE {quoted(owner)} IN DATABASE {database} SET search_path = {quoted(name)}"
            )
        self.execute(*statements, database_url=database_url)

    def execute(self, *statements: str, database_url: str | None = None) -> list[list[tuple[Any, ...]]]:
        """Run statements one by one, each in a transaction of its own, and return their rows.

        Works inside and outside a running event loop: it connects from a thread of its own.
        """
        return _in_thread(_execute(database_url or self.url, statements))

    def name_of(self, url: str) -> str:
        return database_name(url)

    def _filled(self, url: str) -> Mapping[str, bool]:
        return _in_thread(_filled(url))

    def _clean(self, url: str, *, tables: Collection[str], kept: Collection[str]) -> bool:
        return _in_thread(_clean(url, tables, kept))

    def _read_version(self) -> str:
        try:
            return str(self.execute("SHOW server_version")[0][0][0]).split()[0]
        except (OSError, TimeoutError, asyncpg.PostgresError) as error:
            raise Unavailable(f"PostgreSQL does not answer: {type(error).__name__}: {error}") from error


class LocalPostgres(LocalServer, Postgres):
    """A PostgreSQL server made from the programs of this machine in a temporary directory, for this process only.

    With certificates it asks roles for their password; without, nobody is asked for anything. `stop` is at once and
    without a checkpoint (`immediate`), as a crash of the machine's database service would.
    """

    stop_signal = signal.SIGQUIT
    stop_seconds = 10

    def __init__(self, certificates: Certificates | None = None) -> None:
        self._certificates = certificates
        self._programs = find_programs()
        self._user = _unprivileged_user()
        self._directory = guard().make_directory("saga-postgres-")
        self._process: ServerProcess | None = None
        try:
            port = free_port()
            self._initialise(port)
            self._launch()
            super().__init__(f"{_DRIVER}://postgres@127.0.0.1:{port}/postgres", Origin.LOCAL)
            self.execute("CREATE EXTENSION pg_stat_statements")
        except BaseException:
            self.close()
            raise

    def _initialise(self, port: int) -> None:
        if self._user is not None:
            shutil.chown(self._directory, self._user, self._user)
        self._run(
            "initdb", "-A", "trust", "-N", "-U", "postgres", "-E", "UTF8", "--no-locale", "-D", self._data
        )
        with (self._data / "postgresql.conf").open("a") as file:
            file.write(_CONFIGURATION.format(port=port, directory=self._directory))
            if self._certificates is not None:
                file.write(self._secure(self._certificates))

    def _secure(self, certificates: Certificates) -> str:
        """Return the configuration of TLS; the server wants its key to be its own."""
        lines = ["ssl = on"]
        for name, path in zip(("ssl_ca_file", "ssl_cert_file", "ssl_key_file"), certificates, strict=True):
            copy = self._directory / path.name
            copy.touch(mode=0o600)
            copy.write_bytes(path.read_bytes())
            if self._user is not None:
                shutil.chown(copy, self._user, self._user)
            lines.append(f"{name} = '{copy}'")
        (self._data / "pg_hba.conf").write_text(
            "host all postgres 127.0.0.1/32 trust\n"
            "hostssl all certified 127.0.0.1/32 cert\n"
            "hostssl all all 127.0.0.1/32 scram-sha-256\n"
        )
        return "\n".join([*lines, ""])

    def _launch(self) -> None:
        process = ServerProcess(
            [self._programs / "postgres", "-D", self._data],
            environment=self._environment(),
            log=self._directory / "server.log",
            directory=self._directory,
            user=self._user,
        )
        self._process = process
        pid_file = self._data / "postmaster.pid"

        def ready() -> bool:
            # A crash leaves the old file behind, so the first line must be this process.
            lines = pid_file.read_text().splitlines() if pid_file.exists() else []
            return len(lines) >= 8 and lines[0] == str(process.pid) and lines[7].strip() == "ready"

        process.wait_until(ready, timeout_seconds=60, what="PostgreSQL")

    @property
    def _data(self) -> Path:
        return self._directory / "data"

    def _environment(self) -> dict[str, str]:
        return {"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": str(self._directory)}

    def _run(self, program: str, *arguments: str | Path) -> None:
        result = subprocess.run(
            [self._programs / program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=self._directory,
            env=self._environment(),
            user=self._user,
            group=None if self._user is None else primary_group(self._user),
            extra_groups=None if self._user is None else [],
            check=False,
        )
        if result.returncode != 0:
            raise Unavailable(
                f"{program} failed with status {result.returncode}: {result.stderr.strip()[-500:]}"
            )


def find_programs() -> Path:
    """Return the directory of the newest installed server programs; Debian keeps them out of PATH."""
    versions = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]), reverse=True
    )
    if versions and (versions[0].parent / "initdb").exists():
        return versions[0].parent
    on_path = shutil.which("postgres")
    if on_path is not None and shutil.which("initdb") is not None:
        return Path(on_path).resolve().parent
    raise Unavailable("no PostgreSQL server programs on this machine (Debian package: postgresql)")


def quoted(identifier: str) -> str:
    """Quote an SQL identifier."""
    return '"' + identifier.replace('"', '""') + '"'


def database_name(url: str) -> str:
    """Return the database that an address names."""
    return urlsplit(url).path.removeprefix("/")


def _with_driver(url: str) -> str:
    return re.sub(r"^postgres(ql)?(\+\w+)?://", f"{_DRIVER}://", url)


def _unprivileged_user() -> str | None:
    """PostgreSQL refuses to run as root: then the package's own user runs it."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    raise Unavailable(
        "PostgreSQL cannot run as root and there is no user `postgres` or `nobody` on this machine"
    )


async def _execute(url: str, statements: Sequence[str]) -> list[list[tuple[Any, ...]]]:
    async with _connected(url) as connection:
        return [[tuple(row) for row in await connection.fetch(statement)] for statement in statements]


async def _filled(url: str) -> Mapping[str, bool]:
    async with _connected(url) as connection:
        return await _tables(connection)


async def _clean(url: str, tables: Collection[str], kept: Collection[str]) -> bool:
    async with _connected(url) as connection:
        await connection.execute(_END_SESSIONS)
        filled = await _tables(connection)
        statements = [f"DROP TABLE {quoted(name)} CASCADE" for name in filled if name not in tables]
        statements += [
            f"DELETE FROM {quoted(name)}"
            for name, rows in filled.items()
            if rows and name in tables and name not in kept
        ]
        if statements:
            await connection.execute("; ".join(statements))
        return not await connection.fetchval(_CHANGED)


async def _tables(connection: asyncpg.Connection[asyncpg.Record]) -> Mapping[str, bool]:
    found = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    names = [row[0] for row in found]
    parts = (f"EXISTS (SELECT 1 FROM {quoted(name)})" for name in names)
    return dict(zip(names, await connection.fetchrow("SELECT " + ", ".join(parts)) or (), strict=True))


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    plain = re.sub(r"^postgresql\+\w+://", "postgresql://", url)
    connection = await asyncpg.connect(plain, timeout=_CONNECT_SECONDS_MAX)
    try:
        yield connection
    finally:
        await connection.close(timeout=_CONNECT_SECONDS_MAX)


def _in_thread(work: Coroutine[Any, Any, _Result]) -> _Result:
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, work).result()

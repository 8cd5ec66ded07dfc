"""What MariaDB and MySQL have in common for tests: databases on request, and a server in a temporary directory."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import ssl
import subprocess
import time
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import pymysql
import pymysql.connections

from devservices.base import Certificates, Origin, Unavailable
from devservices.lending import DatabaseServer
from devservices.local import LocalServer
from devservices.processes import ServerProcess, free_port, guard, primary_group

_CONNECT_SECONDS_MAX = 10
_START_SECONDS_MAX = 120.0
_USER = "saga"

# Every commit reaches the disk: crash tests must see what a real one does. Pages are not written twice, since no test
# ends the machine. Nothing but the loopback interface.
_OPTIONS = (
    "--bind-address=127.0.0.1",
    "--innodb-flush-log-at-trx-commit=1",
    "--innodb-doublewrite=0",
    "--innodb-buffer-pool-size=128M",
    "--max-connections=300",
    "--skip-log-bin",
    "--character-set-server=utf8mb4",
)


class _Connection(pymysql.connections.Connection):  # type: ignore[misc]  # has no types
    """One that reads no authorities of the system to check nobody by them: that takes 70 ms each time."""

    def _create_ssl_ctx(self, sslp: Any) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context


class MySqlServer(DatabaseServer):
    """A server that we may make databases on. `url` names its maintenance database."""

    scheme: ClassVar[str]

    def __init__(self, url: str, origin: Origin) -> None:
        self.origin = origin
        self.url = urlunsplit(urlsplit(url)._replace(scheme=f"{self.scheme}+asyncmy"))
        self.version = self._read_version()
        super().__init__()

    @classmethod
    @abstractmethod
    def is_of(cls, version: str) -> bool:
        """Whether the server that says this of itself is of this kind."""

    def database_url(self, database: str, *, user: str | None = None, password: str = "") -> str:
        """Return the address of a database of this server, for the administrator or for another user."""
        parts = urlsplit(self.url)
        if user is not None:
            host = parts.netloc.rpartition("@")[2]
            parts = parts._replace(netloc=f"{quote(user, safe='')}:{quote(password, safe='')}@{host}")
        return urlunsplit(parts._replace(path=f"/{quote(database, safe='')}"))

    def create_user(self, name: str, database: str) -> str:
        """Make a user who may do anything in one database and nothing elsewhere; return the password."""
        password = secrets.token_hex(12)
        self.execute(
            f"CREATE USER '{name}'@'%' IDENTIFIED BY '{password}'",
            f"GRANT ALL PRIVILEGES ON {quoted(database)}.* TO '{name}'@'%'",
        )
        return password

    def drop_user(self, name: str) -> None:
        """Drop a user. A missing one is fine."""
        self.execute(f"DROP USER IF EXISTS '{name}'@'%'")

    def create_database(self, name: str | None = None, *, template: str | None = None) -> str:
        """Make a database (a fresh name unless one is given) and return its address."""
        name = name or f"saga_{secrets.token_hex(6)}"
        self.execute(f"CREATE DATABASE {quoted(name)}")
        if template is not None:
            self._copy(template, name)
        return self.database_url(name)

    def drop_database(self, url_or_name: str) -> None:
        """Drop a database; what transactions of it are still open is ended first. A missing one is fine."""
        name = database_name(url_or_name) if "://" in url_or_name else url_or_name
        self._end_sessions(name)
        self.execute(f"DROP DATABASE IF EXISTS {quoted(name)}")

    def set_password(self, password: str) -> None:
        """Give whoever logs in by `url` another password; the address has it from then on."""
        ((account,),) = self.execute("SELECT current_user()")[0]
        name, _, place = account.rpartition("@")
        self.execute(f"ALTER USER '{name}'@'{place}' IDENTIFIED BY '{password}'")
        parts = urlsplit(self.url)
        user = quote(unquote(parts.username or ""), safe="")
        host = parts.netloc.rpartition("@")[2]
        self.url = urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))

    def execute(self, *statements: str, database_url: str | None = None) -> list[list[tuple[Any, ...]]]:
        """Run statements one by one, each in a transaction of its own, and return their rows."""
        parts = urlsplit(database_url or self.url)
        with (
            _Connection(
                host=parts.hostname,
                port=parts.port or 3306,
                user=unquote(parts.username or ""),
                password=unquote(parts.password or ""),
                database=unquote(parts.path.removeprefix("/")) or None,
                autocommit=True,
                connect_timeout=_CONNECT_SECONDS_MAX,
            ) as connection,
            connection.cursor() as cursor,
        ):
            results = []
            for statement in statements:
                cursor.execute(statement)
                results.append(list(cursor.fetchall()))
            return results

    def name_of(self, url: str) -> str:
        return database_name(url)

    def _filled(self, url: str) -> Mapping[str, bool]:
        (tables,) = self.execute("SHOW TABLES", database_url=url)
        names = [name for (name,) in tables]
        rows = self.execute(*(f"SELECT 1 FROM {quoted(name)} LIMIT 1" for name in names), database_url=url)
        return {name: bool(found) for name, found in zip(names, rows, strict=True)}

    def _clean(self, url: str, *, tables: Collection[str], kept: Collection[str]) -> bool:
        self._end_sessions(database_name(url))
        filled = self._filled(url)
        *_, as_made = self.execute(
            "SET foreign_key_checks = 0",
            *(f"DROP TABLE {quoted(name)}" for name in filled if name not in tables),
            *(
                f"DELETE FROM {quoted(name)}"
                for name, rows in filled.items()
                if rows and name in tables and name not in kept
            ),
            "SELECT @@collation_database = @@collation_server",
            database_url=url,
        )
        return bool(as_made[0][0])

    def _end_sessions(self, database: str) -> None:
        """Until they are gone, for what they still do would be done to the next one; 10 s at most."""
        for _ in range(1000):
            found = self.execute(f"SELECT id FROM information_schema.processlist WHERE db = '{database}'")[0]
            if not found:
                return
            for (connection,) in found:
                with contextlib.suppress(pymysql.MySQLError):  # it has ended by itself
                    self.execute(f"KILL {connection}")
            time.sleep(0.01)

    def _copy(self, template: str, name: str) -> None:
        tables = self.execute(f"SHOW TABLES FROM {quoted(template)}")[0]
        statements = []
        for (table,) in tables:
            of, to = (f"{quoted(database)}.{quoted(table)}" for database in (template, name))
            statements += [f"CREATE TABLE {to} LIKE {of}", f"INSERT INTO {to} SELECT * FROM {of}"]
        self.execute(*statements)

    def _read_version(self) -> str:
        try:
            version = str(self.execute("SELECT version()")[0][0][0])
        except (OSError, pymysql.MySQLError) as error:
            raise Unavailable(f"{self.name} does not answer: {type(error).__name__}: {error}") from error
        if not self.is_of(version):
            raise Unavailable(f"the server there is not {self.name}; it calls itself {version}")
        return version.partition("-")[0]


class LocalMySqlServer(LocalServer, MySqlServer):
    """A server made from the programs of this machine in a temporary directory, for this process only.

    With certificates it speaks TLS to those who ask for it.
    """

    stop_seconds = 30

    def __init__(self, certificates: Certificates | None = None) -> None:
        self._find()
        self._user = _unprivileged_user()
        self._directory = guard().make_directory(f"saga-{self.scheme}-")
        self._secured = () if certificates is None else self._secure(certificates)
        self._process: ServerProcess | None = None
        self._port = free_port()
        try:
            if self._user is not None:
                shutil.chown(self._directory, self._user)
            self._initialise()
            self._write_users(password := secrets.token_hex(8))
            self._launch()
            super().__init__(f"{self.scheme}://{_USER}:{password}@127.0.0.1:{self._port}/mysql", Origin.LOCAL)
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _find(self) -> None:
        """Find the server's programs, or raise Unavailable."""

    @abstractmethod
    def _initialise(self) -> None:
        """Fill the data directory."""

    @abstractmethod
    def _command(self) -> Sequence[str | Path]:
        """Return the server's program with the options of its kind."""

    def _write_users(self, password: str) -> None:
        """Have the server make at its starts whom tests log in as: its own administrator may only use the socket."""
        user = f"'{_USER}'@'%'"
        lines = (
            f"CREATE USER IF NOT EXISTS {user} IDENTIFIED BY '{password}';",
            f"GRANT ALL PRIVILEGES ON *.* TO {user} WITH GRANT OPTION;",
        )
        self._init_file.write_text("\n".join(lines) + "\n")
        self._init_file.chmod(0o644)

    def _launch(self) -> None:
        process = ServerProcess(
            [
                *self._command(),
                f"--datadir={self._data}",
                f"--port={self._port}",
                f"--socket={self._directory / 's'}",
                f"--pid-file={self._directory / 'pid'}",
                f"--init-file={self._init_file}",
                *_OPTIONS,
                *self._secured,
            ],
            environment=self._environment(),
            log=self._directory / "server.log",
            directory=self._directory,
            user=self._user,
        )
        self._process = process
        process.wait_until(self._greets, timeout_seconds=_START_SECONDS_MAX, what=self.name)

    def _secure(self, certificates: Certificates) -> tuple[str, ...]:
        """Return the options of TLS, for copies that the server's user may read."""
        options = []
        for name, path in zip(("ca", "cert", "key"), certificates, strict=True):
            copy = self._directory / path.name
            copy.touch(mode=0o600)
            copy.write_bytes(path.read_bytes())
            if self._user is not None:
                shutil.chown(copy, self._user)
            options.append(f"--ssl-{name}={copy}")
        return tuple(options)

    def _greets(self) -> bool:
        """Whether it takes a log-in; one that it refuses is an answer, too."""
        try:
            pymysql.connect(host="127.0.0.1", port=self._port, user="nobody", connect_timeout=2).close()
        except pymysql.MySQLError as error:
            return error.args[0] not in (2003, 2013)
        return True

    @property
    def _data(self) -> Path:
        return self._directory / "data"

    @property
    def _init_file(self) -> Path:
        return self._directory / "users.sql"

    def _environment(self) -> dict[str, str]:
        return {"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": str(self._directory)}

    def _run(self, *command: str | Path) -> None:
        result = subprocess.run(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self._directory,
            env=self._environment(),
            user=self._user,
            group=None if self._user is None else primary_group(self._user),
            extra_groups=None if self._user is None else [],
            check=False,
        )
        if result.returncode != 0:
            program, end = Path(command[0]).name, result.stdout.strip()[-500:]
            raise Unavailable(f"{program} failed with status {result.returncode}: {end}")


def quoted(identifier: str) -> str:
    """Quote an SQL identifier."""
    return "`" + identifier.replace("`", "``") + "`"


def database_name(url: str) -> str:
    """Return the database that an address names."""
    return unquote(urlsplit(url).path.removeprefix("/"))


def _unprivileged_user() -> str | None:
    """These servers refuse to run as root: then a user without rights runs them."""
    if os.geteuid() != 0:
        return None
    for name in ("mysql", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    raise Unavailable(
        "the server cannot run as root and there is no user `mysql` or `nobody` on this machine"
    )

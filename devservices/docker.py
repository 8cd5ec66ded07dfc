"""The same services from containers, where a Docker engine answers."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from devservices.base import Origin, Unavailable
from devservices.kafka import VERSION, Kafka, wait_for_brokers
from devservices.mariadb import MariaDb
from devservices.mysql import MySql
from devservices.postgres import Postgres
from devservices.processes import free_port
from devservices.rabbitmq import RabbitMq

_POSTGRES_IMAGE = "postgres:17-alpine"
_MARIADB_IMAGE = "mariadb:11.8"
_MYSQL_IMAGE = "mysql:8.4"
_RABBITMQ_IMAGE = "rabbitmq:4-alpine"
_KAFKA_IMAGE = f"apache/kafka:{VERSION}"
_KAFKA_PORT = 9092
_PING_SECONDS_MAX = 2


@cache
def engine_problem() -> str | None:
    """Return why no Docker engine can be used, or None if one answers. Asked once per process."""
    try:
        # Ask the socket first: the client takes longer to fail, and leaves its own socket open when it does.
        _knock(os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock")
        import docker

        client = docker.from_env(timeout=_PING_SECONDS_MAX)
        try:
            client.ping()
        finally:
            client.close()
    except (
        Exception
    ) as error:  # the client raises what its transport raises; whatever it is, there is no engine
        return f"no Docker engine answers ({type(error).__name__})"
    return None


def _knock(address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme == "unix":
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_PING_SECONDS_MAX)
            probe.connect(parts.path)
    elif parts.scheme == "tcp":
        socket.create_connection((parts.hostname, parts.port or 2375), timeout=_PING_SECONDS_MAX).close()


def docker_postgres() -> Postgres:
    """Start PostgreSQL in a container."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from testcontainers.postgres import PostgresContainer

        container = PostgresContainer(_POSTGRES_IMAGE, driver="asyncpg").with_command(
            "postgres -c shared_preload_libraries=pg_stat_statements -c max_connections=200"
        )
        _start(container)
    server = _DockerPostgres(container.get_connection_url(), container.stop)
    server.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
    return server


def docker_mariadb() -> MariaDb:
    """Start MariaDB in a container."""
    return _DockerMariaDb(*_mysql_container(_MARIADB_IMAGE))


def docker_mysql() -> MySql:
    """Start MySQL in a container."""
    return _DockerMySql(*_mysql_container(_MYSQL_IMAGE))


def _mysql_container(image: str) -> tuple[str, Callable[[], None]]:
    """Start a server of either kind; return its administrator's address, and how to end it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from testcontainers.mysql import MySqlContainer

        container = MySqlContainer(image)
        _start(container)
    host, port = container.get_container_host_ip(), container.get_exposed_port(container.port)
    return f"mysql://root:{container.root_password}@{host}:{port}/mysql", container.stop


def docker_rabbitmq() -> RabbitMq:
    """Start RabbitMQ in a container."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from testcontainers.rabbitmq import RabbitMqContainer

        container = RabbitMqContainer(_RABBITMQ_IMAGE)
        _start(container)
    host, port = container.get_container_host_ip(), container.get_exposed_port(container.port)
    url = f"amqp://{container.username}:{container.password}@{host}:{port}/"
    return _DockerRabbitMq(url, container.stop)


def docker_kafka() -> Kafka:
    """Start Kafka in a container. Its port is chosen here, because a broker tells its clients where it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from testcontainers.core.container import DockerContainer

        port = free_port()
        settings = {
            "NODE_ID": "1",
            "PROCESS_ROLES": "broker,controller",
            "CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
            "CONTROLLER_LISTENER_NAMES": "CONTROLLER",
            "LISTENERS": f"PLAINTEXT://:{_KAFKA_PORT},CONTROLLER://:9093",
            "ADVERTISED_LISTENERS": f"PLAINTEXT://127.0.0.1:{port}",
            "LISTENER_SECURITY_PROTOCOL_MAP": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "AUTO_CREATE_TOPICS_ENABLE": "false",
            "OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
            "TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
            "TRANSACTION_STATE_LOG_MIN_ISR": "1",
            "GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
        }
        container = DockerContainer(_KAFKA_IMAGE).with_bind_ports(_KAFKA_PORT, port)
        for name, value in settings.items():
            container = container.with_env(f"KAFKA_{name}", value)
        _start(container)
    url = f"kafka://127.0.0.1:{port}"
    if not wait_for_brokers(url):
        container.stop()
        raise Unavailable(f"{_KAFKA_IMAGE} was started in Docker and does not answer")
    return _DockerKafka(url, container.stop)


class _DockerPostgres(Postgres):
    def __init__(self, url: str, end: Callable[[], None]) -> None:
        self._end = end
        super().__init__(url, Origin.DOCKER)

    def close(self) -> None:
        self._end()


class _DockerMariaDb(MariaDb):
    def __init__(self, url: str, end: Callable[[], None]) -> None:
        self._end = end
        super().__init__(url, Origin.DOCKER)

    def close(self) -> None:
        self._end()


class _DockerMySql(MySql):
    def __init__(self, url: str, end: Callable[[], None]) -> None:
        self._end = end
        super().__init__(url, Origin.DOCKER)

    def close(self) -> None:
        self._end()


class _DockerRabbitMq(RabbitMq):
    def __init__(self, url: str, end: Callable[[], None]) -> None:
        self._end = end
        super().__init__(url, Origin.DOCKER)

    def close(self) -> None:
        self._end()


class _DockerKafka(Kafka):
    def __init__(self, url: str, end: Callable[[], None]) -> None:
        self._end = end
        super().__init__(url, Origin.DOCKER, VERSION)

    def close(self) -> None:
        self._end()


def _start(container: Any) -> None:
    try:
        container.start()
    except Exception as error:  # no image, no network, no space: the next way is tried, with this reason
        raise Unavailable(
            f"Docker answers but starting {container.image} failed ({type(error).__name__})"
        ) from error

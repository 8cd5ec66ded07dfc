"""Chooses where a service comes from: a URL in the environment, else Docker, else programs of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, TypeVar

from devservices import docker
from devservices.base import Origin, Service, Unavailable
from devservices.kafka import Kafka, LocalKafka
from devservices.mariadb import LocalMariaDb, MariaDb
from devservices.mysql import LocalMySql, MySql
from devservices.postgres import LocalPostgres, Postgres
from devservices.rabbitmq import LocalRabbitMq, RabbitMq

_Kind = TypeVar("_Kind", bound=Service)

URL_VARIABLES: Final = {
    "mariadb": "SAGA_TEST_MARIADB_URL",
    "mysql": "SAGA_TEST_MYSQL_URL",
    "postgres": "SAGA_TEST_POSTGRES_URL",
    "rabbitmq": "SAGA_TEST_RABBITMQ_URL",
    "kafka": "SAGA_TEST_KAFKA_URL",
}


def start_postgres() -> Postgres:
    """Return a running PostgreSQL; raise Unavailable, saying what was tried, if there is none to be had."""
    return _provide("postgres", lambda url: Postgres(url, Origin.URL), docker.docker_postgres, LocalPostgres)


def start_rabbitmq() -> RabbitMq:
    """Return a running RabbitMQ; raise Unavailable, saying what was tried, if there is none to be had."""
    return _provide("rabbitmq", lambda url: RabbitMq(url, Origin.URL), docker.docker_rabbitmq, LocalRabbitMq)


def start_kafka() -> Kafka:
    """Return a running Kafka; raise Unavailable, saying what was tried, if there is none to be had."""
    return _provide("kafka", lambda url: Kafka(url, Origin.URL), docker.docker_kafka, LocalKafka)


def start_mariadb() -> MariaDb:
    """Return a running MariaDB; raise Unavailable, saying what was tried, if there is none to be had."""
    return _provide("mariadb", lambda url: MariaDb(url, Origin.URL), docker.docker_mariadb, LocalMariaDb)


def start_mysql() -> MySql:
    """Return a running MySQL; raise Unavailable, saying what was tried, if there is none to be had."""
    return _provide("mysql", lambda url: MySql(url, Origin.URL), docker.docker_mysql, LocalMySql)


PROVIDERS: Final[dict[str, Callable[[], Service]]] = {
    "mariadb": start_mariadb,
    "mysql": start_mysql,
    "postgres": start_postgres,
    "rabbitmq": start_rabbitmq,
    "kafka": start_kafka,
}


def _provide(
    name: str, given: Callable[[str], _Kind], in_docker: Callable[[], _Kind], local: Callable[[], _Kind]
) -> _Kind:
    variable = URL_VARIABLES[name]
    if url := os.environ.get(variable):
        try:
            return given(url)
        except Unavailable as error:  # a wrong address is a mistake to report, not a reason to look elsewhere
            raise Unavailable(f"{variable} is set, but {error}") from error
    reasons = [f"{variable} is not set"]
    if (problem := docker.engine_problem()) is not None:
        reasons.append(problem)
    else:
        try:
            return in_docker()
        except Unavailable as error:
            reasons.append(str(error))
    try:
        return local()
    except Unavailable as error:
        reasons.append(str(error))
    raise Unavailable("; ".join(reasons))

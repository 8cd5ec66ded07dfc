"""Servers for tests, demo and benchmarks: a given URL, else Docker, else programs of this machine (never shipped).

from devservices import start_postgres
with start_postgres() as server:
    server.url, server.version, server.create_database("orders")
"""

from devservices.base import Certificates, NotControllable, Origin, Service, Unavailable
from devservices.kafka import Kafka, LocalKafka
from devservices.mariadb import LocalMariaDb, MariaDb
from devservices.mysql import LocalMySql, MySql
from devservices.mysqlserver import LocalMySqlServer, MySqlServer
from devservices.postgres import LocalPostgres, Postgres
from devservices.provide import start_kafka, start_mariadb, start_mysql, start_postgres, start_rabbitmq
from devservices.rabbitmq import LocalRabbitMq, RabbitMq

__all__ = [
    "Certificates",
    "Kafka",
    "LocalKafka",
    "LocalMariaDb",
    "LocalMySql",
    "LocalMySqlServer",
    "LocalPostgres",
    "LocalRabbitMq",
    "MariaDb",
    "MySql",
    "MySqlServer",
    "NotControllable",
    "Origin",
    "Postgres",
    "RabbitMq",
    "Service",
    "Unavailable",
    "start_kafka",
    "start_mariadb",
    "start_mysql",
    "start_postgres",
    "start_rabbitmq",
]

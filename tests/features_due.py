"""Which rows of features.md are due, and on which stacks: the one table that `make features` reads."""

from __future__ import annotations

from typing import Final

SQLITE: Final = "sqlite"
POSTGRES_RABBITMQ: Final = "postgres-rabbitmq"
POSTGRES_KAFKA: Final = "postgres-kafka"
POSTGRES: Final = "postgres"
"""The database as broker, separate processes."""
SQLITE_SHARED: Final = "sqlite-shared"
"""The same on one file."""
MARIADB: Final = "mariadb"
MYSQL: Final = "mysql"
"""These two as databases; where a test has a broker, MariaDB is it, and beside MySQL it is in the process."""
MARIADB_RABBITMQ: Final = "mariadb-rabbitmq"
MARIADB_KAFKA: Final = "mariadb-kafka"
STACKS: Final = (SQLITE, POSTGRES_RABBITMQ)
DATABASE_ONLY: Final = (POSTGRES, SQLITE_SHARED)
EVERYWHERE: Final = (*STACKS, *DATABASE_ONLY)
KAFKA: Final = (POSTGRES_KAFKA, MARIADB_KAFKA)
DATABASES: Final = (*STACKS, MARIADB, MYSQL)
"""Each database once."""
ON_ANY: Final = (*EVERYWHERE, MARIADB, MARIADB_RABBITMQ, *KAFKA, MYSQL)
# The row's check touches neither a database nor a broker: one pure check proves it for every stack.
PURE: Final = ("pure",)

DUE: Final[dict[str, tuple[str, ...]]] = {
    # Declaring sagas
    "A-01": STACKS,
    "A-02": STACKS,
    "A-11": PURE,
    "A-13": STACKS,
    # The client
    "C-01": STACKS,
    "C-02": ON_ANY,
    "C-10": STACKS,
    "C-11": EVERYWHERE,  # every verb at every state of the pure engine; on each stack what closes without undo
    "C-12": EVERYWHERE,
    # Activities and participants
    "D-01": PURE,
    "D-02": STACKS,
    "D-03": STACKS,
    "D-04": STACKS,
    "D-05": STACKS,
    "D-09": DATABASES,  # on the loop, in a thread, in a batch; processes are not there yet
    "D-10": STACKS,
    "D-11": (*STACKS, *DATABASE_ONLY),
    "D-16": STACKS,
    "D-17": (POSTGRES_RABBITMQ, POSTGRES_KAFKA),  # the same program on both brokers
    "D-18": PURE,  # the document; the suite against a participant is not there yet
    # Compensation
    "E-01": STACKS,
    "E-02": STACKS,
    "E-04": EVERYWHERE,
    "E-05": EVERYWHERE,
    "E-06": EVERYWHERE,
    # a process killed at each crash point where that takes no time; at the commits of the way back on each stack
    "E-07": EVERYWHERE,
    # Outbox and messages
    "F-01": ON_ANY,
    "F-02": EVERYWHERE,  # order per key; the relays die and freeze where there are several, between two servers
    "F-03": STACKS,
    "F-04": STACKS,
    "F-05": (POSTGRES_RABBITMQ,),  # the in-process broker has no confirm that could be missing
    "F-06": EVERYWHERE,
    "F-07": STACKS,
    # a broker in the process dies with its consumer
    "F-08": tuple(each for each in ON_ANY if each not in (SQLITE, MYSQL)),
    "F-09": EVERYWHERE,
    "F-11": (
        *STACKS,
        MARIADB_RABBITMQ,
        MYSQL,
    ),  # partitions, other archives, erasing by attribute are not there yet
    # Brokers and databases
    "G-01": (SQLITE,),  # the in-process broker itself
    "G-02": (*DATABASE_ONLY, MARIADB, MYSQL),  # the database broker itself
    "G-03": (POSTGRES_RABBITMQ,),  # RabbitMQ itself
    "G-04": (POSTGRES_KAFKA,),  # Kafka itself
    "G-05": PURE,  # `check`; `plan` and `apply` are not there yet
    "G-06": PURE,  # "each capability switched off in turn on the memory adapter"
    "G-07": (*EVERYWHERE, POSTGRES_KAFKA, MARIADB, MYSQL),
    "G-08": DATABASES,
    "G-09": DATABASES,
    "G-10": (
        POSTGRES_RABBITMQ,
        MARIADB,
        MYSQL,
    ),  # a proxy cuts connections at COMMIT; SQLite has no connection to cut
    # Using it
    "I-01": STACKS,
    "I-02": (POSTGRES_RABBITMQ,),  # workers of a web server share a database and a broker
    "I-04": (POSTGRES_RABBITMQ,),  # a web server with several workers
    "I-05": (POSTGRES_RABBITMQ, POSTGRES_KAFKA),  # the brokers that FastStream shares with us
    "I-06": (SQLITE,),  # an environment owns its time, so its database is SQLite on every stack
    "I-07": PURE,  # programs that type checkers refuse
    "I-11": STACKS,
    # Operations
    "H-01": (SQLITE,),  # a command prints the same whatever the database is
    "H-03": EVERYWHERE,
    "H-13": EVERYWHERE,
    "I-08": PURE,  # settings are read before anything is connected
    # Security
    "L-01": EVERYWHERE,
    "L-02": EVERYWHERE,
    "L-05": PURE,  # every kind of server; credentials that change while running are not there yet
    "L-11": EVERYWHERE,
    "L-10": EVERYWHERE,
    # Scale and cost
    "K-01": EVERYWHERE,
    "K-04": (POSTGRES_RABBITMQ,),  # several processes need a database and a broker between them
    "K-05": STACKS,
}

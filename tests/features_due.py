"""Which rows of features.md are due, and on which stacks: the one table that `make features` reads."""

from __future__ import annotations

from typing import Final

SQLITE: Final = "sqlite"
POSTGRES_RABBITMQ: Final = "postgres-rabbitmq"
POSTGRES: Final = "postgres"
"""The database as broker, separate processes."""
SQLITE_SHARED: Final = "sqlite-shared"
"""The same on one file."""
STACKS: Final = (SQLITE, POSTGRES_RABBITMQ)
DATABASE_ONLY: Final = (POSTGRES, SQLITE_SHARED)
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
    "C-02": STACKS,
    "C-10": STACKS,
    "C-11": PURE,  # every verb at every state of the pure engine
    "C-12": STACKS,
    # Activities and participants
    "D-01": PURE,
    "D-02": STACKS,
    "D-03": STACKS,
    "D-04": STACKS,
    "D-05": STACKS,
    "D-10": STACKS,
    "D-11": (*STACKS, *DATABASE_ONLY),
    "D-16": STACKS,
    # Compensation
    "E-01": STACKS,
    "E-02": STACKS,
    "E-04": STACKS,
    "E-05": STACKS,
    "E-06": STACKS,
    "E-07": (
        SQLITE,
    ),  # a process killed at each crash point, as in K-04, on the stack where that takes no time
    # Outbox and messages
    "F-01": STACKS,
    "F-02": (POSTGRES_RABBITMQ,),  # several relays need a database and a broker between them
    "F-03": STACKS,
    "F-04": STACKS,
    "F-05": (POSTGRES_RABBITMQ,),  # the in-process broker has no confirm that could be missing
    "F-06": STACKS,
    "F-07": STACKS,
    "F-09": STACKS,
    # Brokers and databases
    "G-01": (SQLITE,),  # the in-process broker itself
    "G-02": DATABASE_ONLY,  # the database broker itself
    "G-03": (POSTGRES_RABBITMQ,),  # RabbitMQ itself
    "G-06": PURE,  # "each capability switched off in turn on the memory adapter"
    "G-07": STACKS,
    "G-08": STACKS,
    "G-09": STACKS,
    "G-10": (POSTGRES_RABBITMQ,),  # a proxy cuts connections at COMMIT; SQLite has no connection to cut
    # Using it
    "I-01": STACKS,
    "I-06": (SQLITE,),  # an environment owns its time, so its database is SQLite on every stack
    "I-07": PURE,  # programs that type checkers refuse
    "I-11": STACKS,
    # Operations
    "H-01": (SQLITE,),  # a command prints the same whatever the database is
    "H-03": STACKS,
    "H-13": STACKS,
    "I-08": PURE,
    # Security
    "L-01": (*STACKS, *DATABASE_ONLY),
    "L-02": (*STACKS, *DATABASE_ONLY),
    "L-11": (*STACKS, *DATABASE_ONLY),
    "L-10": (*STACKS, *DATABASE_ONLY),
    # Scale and cost
    "K-01": (*STACKS, *DATABASE_ONLY),
    "K-04": (POSTGRES_RABBITMQ,),  # several processes need a database and a broker between them
    "K-05": STACKS,
}

"""The database as broker: queues in tables that every service with the address shares, and nothing else to run.

Where it is the coordinator's own database, the coordinator's commit puts its commands into the queue by itself: there
is no second insert and no relay.
"""

from saga.brokers.database.broker import DATABASE, DatabaseBroker
from saga.brokers.database.consumer import DatabaseConsumer
from saga.brokers.database.options import DatabaseOptions

__all__ = ["DATABASE", "DatabaseBroker", "DatabaseConsumer", "DatabaseOptions"]

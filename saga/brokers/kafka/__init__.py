"""Kafka behind the broker port: a topic per channel, a group per topic, and offsets committed up to what is finished.

It stands on aiokafka, which does the protocol, the batches and the group. When to commit, what is in doubt, and when a
client is thrown away for a new one is decided here, since aiokafka's own waits have no bound that we could use
(docs/design/0002-kafka-against-the-broker-port.md, docs/design/0012-kafka.md).
"""

from saga.errors import MissingExtra

try:
    import aiokafka as _driver
except ModuleNotFoundError as _error:
    raise MissingExtra("Kafka needs the package aiokafka; install saga[kafka]") from _error

from saga.brokers.kafka.broker import KafkaBroker
from saga.brokers.kafka.options import KafkaOptions

del _driver

__all__ = ["KafkaBroker", "KafkaOptions"]

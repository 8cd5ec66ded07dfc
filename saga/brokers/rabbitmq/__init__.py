"""RabbitMQ behind the broker port: quorum queues, confirms, and a connection that comes back by itself.

It stands on aiormq, the AMQP driver inside aio-pika, which does the handshake, TLS, heartbeats and the reading of
frames. Channels, confirms, acks and the life of connections are our own (`channel`, `link`, `publisher`,
`consumer`): aio-pika's are a task per message, five times the cost, and report a lost connection as a cancellation
(docs/design/0004-own-amqp-channels.md).
"""

from saga.errors import MissingExtra

try:
    import aiormq as _driver
except ModuleNotFoundError as _error:
    raise MissingExtra("RabbitMQ needs the package aio-pika; install saga[rabbitmq]") from _error

from saga.brokers.rabbitmq.broker import ConnectionState, RabbitMQBroker
from saga.brokers.rabbitmq.options import RabbitMQOptions

del _driver

__all__ = ["ConnectionState", "RabbitMQBroker", "RabbitMQOptions"]

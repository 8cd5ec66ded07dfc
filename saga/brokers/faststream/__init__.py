"""FastStream's RabbitMQ or Kafka broker behind the broker port: activities in a FastStream service, on its connection.

Deliveries come through FastStream's subscribers and end in the same participant as those of our own adapters; what is
different here is who consumes and publishes (docs/design/0016-faststream.md).
"""

from saga.errors import MissingExtra

try:
    import faststream as _framework
except ModuleNotFoundError as _error:
    raise MissingExtra("FastStream is not there; install saga[faststream]") from _error

from saga.brokers.faststream.broker import FastStreamBroker

del _framework

__all__ = ["FastStreamBroker"]

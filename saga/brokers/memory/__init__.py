"""The in-process broker: reference adapter of the port, default of the embedded mode and of the simulation.

`MemoryQueues` is the broker's side (what survives a lost connection), `MemoryBroker` one process's connection
to it. Several brokers may share one `MemoryQueues`. Nothing here waits for anything but the Clock, and every
random decision comes from Ids, so that a simulation owns both. Faults are off unless `Faults` says otherwise.
"""

from saga.brokers.memory.broker import MEMORY, NO_FAULTS, Faults, MemoryBroker
from saga.brokers.memory.consumer import MemoryConsumer
from saga.brokers.memory.queues import MemoryQueues

__all__ = ["MEMORY", "NO_FAULTS", "Faults", "MemoryBroker", "MemoryConsumer", "MemoryQueues"]

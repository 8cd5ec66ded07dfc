"""A proxy in front of one Kafka broker that keeps its clients: where the broker says it is becomes the proxy."""

from __future__ import annotations

import struct
from typing import Final
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from tests.proxy import Direction, Proxy, _Connection

_HELD_BYTES_MIN: Final = 5
"""A shorter beginning of the address at the end of a chunk is chance: held back, an answer might never end."""


class KafkaProxy(Proxy):
    """Clients ask any broker where the brokers are, and then connect there. The address has the same length on the
    wire (host as text, port as a number), so it can be exchanged without understanding the answers."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._told = b"127.0.0.1" + struct.pack(">i", urlsplit(url).port or 9092)
        self._held: WeakKeyDictionary[_Connection, bytes] = WeakKeyDictionary()

    def _translate(self, connection: _Connection, chunk: bytes, direction: Direction) -> bytes:
        if direction is Direction.TO_SERVER or not chunk:
            return chunk
        whole = self._held.pop(connection, b"") + chunk
        whole = whole.replace(self._told, b"127.0.0.1" + struct.pack(">i", self.port))
        for length in range(len(self._told) - 1, _HELD_BYTES_MIN - 1, -1):
            if whole.endswith(self._told[:length]):
                self._held[connection] = whole[-length:]
                return whole[:-length]
        return whole

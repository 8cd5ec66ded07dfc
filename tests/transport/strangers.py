"""Servers that get as far as TLS: they begin as each kind does, show a certificate, and say nothing more.

A client that does not accept the certificate goes before that, so what it makes of it can be seen without the server.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

Greet = Callable[[socket.socket], Awaitable[None]]
"""On the bare socket, so that nothing of what is for TLS is read before it."""

_CLIENT_SSL: Final = 0x800
_MYSQL: Final = 0x0000_8200 | 0x0008_0000 | 0x0001
"""Capabilities: the protocol of 4.1, log-in by a plugin, long passwords."""


async def nothing(_link: socket.socket) -> None:
    """RabbitMQ and Kafka: TLS comes first."""


async def postgresql(link: socket.socket) -> None:
    """Asked for TLS, it says yes."""
    await _read(link, 8)
    await asyncio.get_running_loop().sock_sendall(link, b"S")


async def mysql(link: socket.socket) -> None:
    """It greets, and is asked for TLS."""
    capabilities = _MYSQL | _CLIENT_SSL
    greeting = (
        b"\x0a10.11.0-MariaDB\0"
        + struct.pack("<I", 7)
        + b"12345678\0"
        + struct.pack("<HBHHB", capabilities & 0xFFFF, 45, 2, capabilities >> 16, 21)
        + bytes(10)
        + b"123456789012\0mysql_native_password\0"
    )
    await asyncio.get_running_loop().sock_sendall(link, struct.pack("<I", len(greeting)) + greeting)
    await _read(link, 4 + 32)


@asynccontextmanager
async def listening(context: ssl.SSLContext, greet: Greet = nothing) -> AsyncIterator[int]:
    """Listen on loopback, and give the port."""
    loop = asyncio.get_running_loop()
    talks: set[asyncio.Task[None]] = set()

    async def talk(link: socket.socket) -> None:
        with link, suppress(OSError):
            await greet(link)
            transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, link, ssl=context)
            transport.abort()

    async def accept() -> None:
        while True:
            link, _ = await loop.sock_accept(door)
            link.setblocking(False)
            talks.add(loop.create_task(talk(link)))

    with socket.create_server(("127.0.0.1", 0)) as door:
        door.setblocking(False)
        talks.add(loop.create_task(accept()))
        try:
            yield door.getsockname()[1]
        finally:
            for task in talks:
                task.cancel()
            await asyncio.wait(talks)


async def _read(link: socket.socket, size: int) -> None:
    while size:
        found = await asyncio.get_running_loop().sock_recv(link, size)
        if not found:
            raise ConnectionError("gone before its request was complete")
        size -= len(found)

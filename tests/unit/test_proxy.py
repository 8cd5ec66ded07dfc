"""The TCP proxy does to the bytes what it says, and counts it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta

import pytest

from tests.proxy import Direction, Proxy, ProxyFactory

SHORT = 0.1  # long enough for bytes to arrive on this machine if they were going to


@pytest.fixture
def received() -> list[bytes]:
    """Everything that the server has read."""
    return []


@pytest.fixture
async def link(proxy: ProxyFactory, received: list[bytes]) -> AsyncIterator[Proxy]:
    """A proxy in front of a server that answers each line with `echo ` and the line."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                received.append(line)
                writer.write(b"echo " + line)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    yield await proxy(f"tcp://user:secret@127.0.0.1:{port}/path?x=1")
    server.close()


class Client:
    """A line-wise client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self._writer.write(part)
            await self._writer.drain()
            await asyncio.sleep(0.01)

    async def receive(self) -> bytes:
        async with asyncio.timeout(60):
            return await self._reader.readline()

    async def ask(self, line: bytes) -> bytes:
        await self.send(line)
        return await self.receive()

    async def hears_nothing(self) -> bool:
        try:
            async with asyncio.timeout(SHORT):
                return not await self._reader.readline() and False
        except TimeoutError:
            return True

    async def is_broken(self) -> bool:
        try:
            return await self.receive() == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self._writer.close()


Connect = Callable[[Proxy], Awaitable[Client]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Open clients that are closed after the test."""
    clients = []

    async def open_client(link: Proxy) -> Client:
        clients.append(Client(*await asyncio.open_connection(link.host, link.port)))
        return clients[-1]

    yield open_client
    for client in clients:
        client.close()


@pytest.fixture
async def client(link: Proxy, connect: Connect) -> Client:
    client = await connect(link)
    assert await client.ask(b"hello\n") == b"echo hello\n"
    return client


def test_the_address_keeps_all_but_host_and_port(link: Proxy) -> None:
    assert link.url == f"tcp://user:secret@127.0.0.1:{link.port}/path?x=1"


async def test_bytes_pass_and_an_end_is_passed_on(link: Proxy, client: Client) -> None:
    large = b"x" * 50_000 + b"\n"
    for _ in range(20):
        assert await client.ask(large) == b"echo " + large
    client.close()
    await eventually_closed(link)
    assert link.fired == {}


async def test_delay_shifts_the_stream_and_keeps_its_order(link: Proxy, client: Client) -> None:
    link.delay(timedelta(seconds=SHORT), Direction.TO_SERVER)
    started = asyncio.get_running_loop().time()
    await client.send(b"a\n", b"b\n", b"c\n", b"d\n", b"e\n")
    assert [await client.receive() for _ in range(5)] == [b"echo %c\n" % each for each in b"abcde"]
    took = asyncio.get_running_loop().time() - started
    assert SHORT <= took < 5 * SHORT  # every chunk is late by SHORT, not each after the other
    assert link.fired["delay"] >= 1


async def test_jam_holds_bytes_until_release(link: Proxy, client: Client, received: list[bytes]) -> None:
    link.jam(Direction.TO_SERVER)
    await client.send(b"late\n")
    assert await client.hears_nothing()
    assert b"late\n" not in received
    link.release()
    assert await client.receive() == b"echo late\n"
    assert link.fired["jam"] == 1


async def test_drop_swallows_both_ways_and_keeps_sockets_open(
    link: Proxy, client: Client, received: list[bytes]
) -> None:
    link.drop()
    await client.send(b"lost\n")
    assert await client.hears_nothing()
    assert b"lost\n" not in received
    assert link.open_connections == 1
    assert link.fired["drop"] == 1


async def test_heal_resets_connections_that_lost_bytes_and_serves_new_ones(
    link: Proxy, client: Client, connect: Connect
) -> None:
    link.drop()
    await client.send(b"lost\n")
    await link.wait_fired("drop")
    link.heal()
    assert await client.is_broken()
    assert await (await connect(link)).ask(b"new\n") == b"echo new\n"


async def test_heal_leaves_connections_alone_that_lost_nothing(link: Proxy, client: Client) -> None:
    link.drop()
    link.heal()
    assert await client.ask(b"still here\n") == b"echo still here\n"


async def test_one_way_drop_lets_the_server_work_unheard(
    link: Proxy, client: Client, received: list[bytes]
) -> None:
    link.drop(Direction.TO_CLIENT)
    await client.send(b"done\n")
    assert await client.hears_nothing()
    assert received[-1] == b"done\n"


async def test_reset_breaks_every_open_connection_and_serves_new_ones(
    link: Proxy, client: Client, connect: Connect
) -> None:
    other = await connect(link)
    assert await other.ask(b"x\n") == b"echo x\n"
    assert link.reset() == 2
    assert await client.is_broken()
    assert await other.is_broken()
    assert link.fired["reset"] == 2
    assert await (await connect(link)).ask(b"new\n") == b"echo new\n"


async def test_refuse_breaks_new_connections_only(link: Proxy, client: Client, connect: Connect) -> None:
    link.refuse()
    assert await (await connect(link)).is_broken()
    assert await client.ask(b"old\n") == b"echo old\n"
    assert link.fired["refuse"] == 1
    link.heal()
    assert await (await connect(link)).ask(b"new\n") == b"echo new\n"


async def test_cut_after_delivers_the_bytes_and_swallows_the_answer(
    link: Proxy, client: Client, received: list[bytes], connect: Connect
) -> None:
    link.cut_after(b"COMMIT")
    assert await client.ask(b"before\n") == b"echo before\n"
    await client.send(b"COM", b"MIT\n")  # the pattern may arrive in pieces
    assert await client.is_broken()
    assert received[-1] == b"COMMIT\n"
    assert link.fired["cut"] == 1
    assert await (await connect(link)).ask(b"COMMIT\n") == b"echo COMMIT\n"  # a cut fires once


async def test_cut_skips_as_many_matches_as_told(link: Proxy, client: Client) -> None:
    link.cut_after(b"COMMIT", skip=2)
    assert await client.ask(b"COMMIT\n") == b"echo COMMIT\n"
    assert await client.ask(b"COMMIT\n") == b"echo COMMIT\n"
    await client.send(b"COMMIT\n")
    assert await client.is_broken()


async def test_cut_before_swallows_the_bytes_themselves(
    link: Proxy, client: Client, received: list[bytes]
) -> None:
    link.cut_before(b"never", Direction.TO_SERVER)
    await client.send(b"never\n")
    assert await client.is_broken()
    assert b"never\n" not in received


async def test_a_server_that_is_down_looks_like_a_reset(proxy: ProxyFactory, connect: Connect) -> None:
    link = await proxy("tcp://127.0.0.1:1")
    assert await (await connect(link)).is_broken()


async def test_waiting_for_a_fault_that_does_not_fire_is_bounded(link: Proxy) -> None:
    with pytest.raises(TimeoutError):
        await link.wait_fired("cut", within=timedelta(seconds=0.05))


async def eventually_closed(link: Proxy) -> None:
    async with asyncio.timeout(60):
        while link.open_connections:  # noqa: ASYNC110 (the kernel closes; there is no event to wait for)
            await asyncio.sleep(0.01)

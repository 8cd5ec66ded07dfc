"""Fixtures that give tests a server, a fresh database or a fault proxy, and the summary that names what ran on what."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final, NoReturn, TypeVar

import pytest

import devservices
from devservices import Postgres, RabbitMq, Service, Unavailable
from tests.proxy import Proxy, ProxyFactory

pytest_plugins = ["pytester", "tests.plugins.features"]

_S = TypeVar("_S", bound=Service)

_SERVED: Final = pytest.StashKey[dict[str, str]]()
_MISSING: Final = pytest.StashKey[dict[str, str]]()


@pytest.fixture(scope="session")
def postgres_server(pytestconfig: pytest.Config) -> Iterator[Postgres]:
    """The PostgreSQL of this session. Tests that kill it start it again before they end."""
    server = _require(pytestconfig, "PostgreSQL", devservices.start_postgres)
    with server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq_server(pytestconfig: pytest.Config) -> Iterator[RabbitMq]:
    """The RabbitMQ of this session. Tests that kill it start it again before they end."""
    server = _require(pytestconfig, "RabbitMQ", devservices.start_rabbitmq)
    with server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: Postgres) -> Iterator[str]:
    """The address (`postgresql+asyncpg://`) of an empty database of this test's own."""
    url = postgres_server.create_database()
    yield url
    postgres_server.drop_database(url)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The address (`sqlite+aiosqlite://`) of a database file of this test's own; the file does not exist yet."""
    return f"sqlite+aiosqlite:///{tmp_path / 'saga.db'}"


@pytest.fixture
def rabbitmq_url(rabbitmq_server: RabbitMq) -> str:
    """The address of the session's RabbitMQ. Its queues are shared: a test names its own by a namespace of its own."""
    return rabbitmq_server.url


@pytest.fixture
async def proxy() -> AsyncIterator[ProxyFactory]:
    """`link = await proxy(url)`: a TCP proxy in front of a server; `link.url` is the address to connect to."""
    async with AsyncExitStack() as stack:

        async def open_link(url: str) -> Proxy:
            return await stack.enter_async_context(Proxy(url))

        yield open_link


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SERVED] = {}
    config.stash[_MISSING] = {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    served, missing = config.stash[_SERVED], config.stash[_MISSING]
    if not served and not missing:
        return
    terminalreporter.section("services")
    for description in served.values():
        terminalreporter.write_line(f"ran on {description}")
    lost = "failed" if _required() else "skipped"
    for name, reason in missing.items():
        terminalreporter.write_line(f"{name} was missing, its tests were {lost}: {reason}")


def _require(config: pytest.Config, name: str, provide: Callable[[], _S]) -> _S:
    """Start a service; without one, skip and say why, or fail where services are required (CI=true)."""
    if name in config.stash[_MISSING]:
        _give_up(name, config.stash[_MISSING][name])
    try:
        server = provide()
    except Unavailable as error:
        config.stash[_MISSING][name] = str(error)
        _give_up(name, str(error))
    config.stash[_SERVED][name] = server.description
    return server


def _give_up(name: str, reason: str) -> NoReturn:
    if _required():
        pytest.fail(f"{name} is required here (CI is set) but unavailable: {reason}", pytrace=False)
    pytest.skip(f"{name} is unavailable: {reason}")


def _required() -> bool:
    """In CI a service that is missing is a failure: nothing may pass there by not running."""
    return os.environ.get("CI", "").lower() in ("1", "true")

"""Fixtures that give tests a server, a fresh database or a fault proxy, and the summary that names what ran on what.

A run spread over workers (`pytest -n 3 --dist loadfile`) shares one server of each kind, which the controller starts;
every test has a database and queues of its own there. A test that breaks a server takes `own_postgres`,
`own_mariadb`, `own_rabbitmq` or `own_kafka`, which its worker has for itself.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import pytest
from hypothesis import settings as hypothesis_settings
from sqlalchemy import make_url

import devservices
from devservices import (
    Kafka,
    LocalKafka,
    LocalMariaDb,
    LocalMySql,
    LocalPostgres,
    LocalRabbitMq,
    MariaDb,
    MySql,
    Origin,
    Postgres,
    RabbitMq,
    Service,
    Unavailable,
)
from tests.proxy import Proxy, ProxyFactory
from tests.upgraded import upgraded

pytest_plugins = ["pytester", "tests.plugins.canary", "tests.plugins.features"]

_S = TypeVar("_S", bound=Service)
_K = TypeVar("_K", Postgres, RabbitMq, MariaDb, MySql, Kafka)

_SERVED: Final = pytest.StashKey[dict[str, str]]()
_MISSING: Final = pytest.StashKey[dict[str, str]]()
_SHARED: Final = pytest.StashKey[dict[str, str]]()
_STARTED: Final[dict[str, Callable[[], Service]]] = {
    Postgres.name: devservices.start_postgres,
    RabbitMq.name: devservices.start_rabbitmq,
    Kafka.name: devservices.start_kafka,
    MariaDb.name: devservices.start_mariadb,
    MySql.name: devservices.start_mysql,
}


hypothesis_settings.register_profile("saga", deadline=None)  # a busy machine makes no example wrong
hypothesis_settings.load_profile("saga")


@pytest.fixture(scope="session")
def postgres_server(pytestconfig: pytest.Config) -> Iterator[Postgres]:
    """The PostgreSQL of this session, perhaps shared with other workers: nobody breaks it."""
    with _require(
        pytestconfig, Postgres.name, _shared(pytestconfig, Postgres) or devservices.start_postgres
    ) as server:
        yield _with_password(server)


@pytest.fixture(scope="session")
def rabbitmq_server(pytestconfig: pytest.Config) -> Iterator[RabbitMq]:
    """The RabbitMQ of this session, perhaps shared with other workers: nobody breaks it."""
    with _require(
        pytestconfig, RabbitMq.name, _shared(pytestconfig, RabbitMq) or devservices.start_rabbitmq
    ) as server:
        yield server


@pytest.fixture(scope="session")
def kafka_server(pytestconfig: pytest.Config) -> Iterator[Kafka]:
    """The Kafka of this session, perhaps shared with other workers: nobody breaks it."""
    with _require(
        pytestconfig, Kafka.name, _shared(pytestconfig, Kafka) or devservices.start_kafka
    ) as server:
        yield server


@pytest.fixture(scope="session")
def mariadb_server(pytestconfig: pytest.Config) -> Iterator[MariaDb]:
    """The MariaDB of this session, perhaps shared with other workers: nobody breaks it."""
    with _require(
        pytestconfig, MariaDb.name, _shared(pytestconfig, MariaDb) or devservices.start_mariadb
    ) as server:
        yield _with_password(server)


@pytest.fixture(scope="session")
def mysql_server(pytestconfig: pytest.Config) -> Iterator[MySql]:
    """The MySQL of this session, perhaps shared with other workers: nobody breaks it."""
    with _require(
        pytestconfig, MySql.name, _shared(pytestconfig, MySql) or devservices.start_mysql
    ) as server:
        yield _with_password(server)


@pytest.fixture(scope="session")
def own_postgres(pytestconfig: pytest.Config, postgres_server: Postgres) -> Iterator[LocalPostgres]:
    """A PostgreSQL to be broken. Tests that kill it start it again before they end."""
    if isinstance(postgres_server, LocalPostgres):
        yield postgres_server
        return
    with _require(pytestconfig, "PostgreSQL to be broken", LocalPostgres) as server:
        _with_password(server)
        yield server


@pytest.fixture(scope="session")
def own_mariadb(pytestconfig: pytest.Config, mariadb_server: MariaDb) -> Iterator[LocalMariaDb]:
    """A MariaDB to be broken. Tests that kill it start it again before they end."""
    if isinstance(mariadb_server, LocalMariaDb):
        yield mariadb_server
        return
    with _require(pytestconfig, "MariaDB to be broken", LocalMariaDb) as server:
        yield _with_password(server)


@pytest.fixture(scope="session")
def own_mysql(pytestconfig: pytest.Config, mysql_server: MySql) -> Iterator[LocalMySql]:
    """A MySQL to be broken. Tests that kill it start it again before they end."""
    if isinstance(mysql_server, LocalMySql):
        yield mysql_server
        return
    with _require(pytestconfig, "MySQL to be broken", LocalMySql) as server:
        yield _with_password(server)


@pytest.fixture(scope="session")
def own_rabbitmq(pytestconfig: pytest.Config, rabbitmq_server: RabbitMq) -> Iterator[LocalRabbitMq]:
    """A RabbitMQ to be broken. Tests that kill it start it again before they end."""
    if isinstance(rabbitmq_server, LocalRabbitMq):
        yield rabbitmq_server
        return
    with _require(pytestconfig, "RabbitMQ to be broken", LocalRabbitMq) as server:
        yield server


@pytest.fixture(scope="session")
def own_kafka(pytestconfig: pytest.Config, kafka_server: Kafka) -> Iterator[LocalKafka]:
    """A Kafka to be broken. Tests that kill it start it again before they end."""
    if isinstance(kafka_server, LocalKafka):
        yield kafka_server
        return
    with _require(pytestconfig, "Kafka to be broken", LocalKafka) as server:
        yield server


@pytest.fixture(scope="session")
def require(pytestconfig: pytest.Config) -> Callable[[str, Callable[[], _S]], _S]:
    """`require(name, provide)` starts a service that few tests need, or skips as for the others."""
    return lambda name, provide: _require(pytestconfig, name, provide)


@pytest.fixture
def postgres_url(postgres_server: Postgres) -> Iterator[str]:
    """The address (`postgresql+asyncpg://`) of an empty database of this test's own."""
    with postgres_server.lent("empty", lambda url: None) as url:
        yield url


@pytest.fixture
def mariadb_url(mariadb_server: MariaDb) -> Iterator[str]:
    """The address (`mariadb+asyncmy://`) of an empty database of this test's own."""
    url = mariadb_server.create_database()
    yield url
    mariadb_server.drop_database(url)


@pytest.fixture
def mysql_url(mysql_server: MySql) -> Iterator[str]:
    """The address (`mysql+asyncmy://`) of an empty database of this test's own."""
    url = mysql_server.create_database()
    yield url
    mysql_server.drop_database(url)


@pytest.fixture
def url(stack: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a database with our tables, on the test's stack."""
    with upgraded(stack, request) as url:
        yield url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The address (`sqlite+aiosqlite://`) of a database file of this test's own; the file does not exist yet."""
    return f"sqlite+aiosqlite:///{tmp_path / 'saga.db'}"


@pytest.fixture
def rabbitmq_url(rabbitmq_server: RabbitMq) -> str:
    """The address of the session's RabbitMQ. Its queues are shared: a test names its own by a namespace of its own."""
    return rabbitmq_server.url


@pytest.fixture
def kafka_url(kafka_server: Kafka) -> str:
    """The address of the session's Kafka, shared in the same way."""
    return kafka_server.url


@pytest.fixture
async def proxy() -> AsyncIterator[ProxyFactory]:
    """`link = await proxy(url)`: a TCP proxy in front of a server; `link.url` is the address to connect to."""
    async with AsyncExitStack() as stack:

        async def open_link(url: str) -> Proxy:
            return await stack.enter_async_context(Proxy(url))

        yield open_link


def pytest_configure(config: pytest.Config) -> None:
    given = getattr(config, "workerinput", {}).get("services", {"shared": {}, "missing": {}})
    config.stash[_SERVED] = {}
    config.stash[_MISSING] = dict(given["missing"])
    config.stash[_SHARED] = given["shared"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Workers take files in this order, and none of the long ones must be left for the end, when others are idle."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        counts = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.path not in slow, -counts[item.path], item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """The controller of a run that is spread over workers starts the servers for all of them."""
    for name, provide in _STARTED.items():
        try:
            server = provide()
        except Unavailable as error:
            config.stash[_MISSING][name] = str(error)
            continue
        config.add_cleanup(server.close)
        if isinstance(server, LocalPostgres):
            # nobody breaks the shared one, so making hundreds of databases on it need not wait for the disk
            server.execute("ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")
        if isinstance(server, LocalMariaDb | LocalMySql):
            server.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 0")
        config.stash[_SERVED][name] = server.description
        config.stash[_SHARED][name] = _with_password(server).url


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    stash = node.config.stash
    node.workerinput["services"] = {"shared": stash[_SHARED], "missing": stash[_MISSING]}


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["services"] = {
            "served": session.config.stash[_SERVED],
            "missing": session.config.stash[_MISSING],
        }


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Back in the controller: what this worker had beside the shared servers."""
    found = getattr(node, "workeroutput", {}).get("services", {"served": {}, "missing": {}})
    node.config.stash[_SERVED].update(found["served"])
    node.config.stash[_MISSING].update(found["missing"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    served, missing = config.stash[_SERVED], config.stash[_MISSING]
    if not served and not missing:
        return
    terminalreporter.section("services")
    for description in dict.fromkeys(served.values()):
        terminalreporter.write_line(f"ran on {description}")
    lost = "failed" if _required() else "skipped"
    for name, reason in missing.items():
        terminalreporter.write_line(f"{name} was missing, its tests were {lost}: {reason}")


def _shared(config: pytest.Config, kind: type[_K]) -> Callable[[], _K] | None:
    """Return how to use the server that the controller has started for all workers."""
    url = config.stash[_SHARED].get(kind.name)
    return None if url is None else lambda: kind(url, Origin.URL)


def _with_password(server: _S) -> _S:
    """Let addresses of our own servers have a password that nothing may tell; PostgreSQL asks nobody for one."""
    from tests.plugins.watch import CANARY

    if isinstance(server, LocalMariaDb | LocalMySql):
        server.set_password(CANARY)
    if isinstance(server, LocalPostgres):
        server.url = make_url(server.url).set(password=CANARY).render_as_string(hide_password=False)
    return server


def _require(config: pytest.Config, name: str, provide: Callable[[], _S]) -> _S:
    """Start a service; without one, skip and say why, or fail where services are required (CI=true)."""
    if name in config.stash[_MISSING]:
        _give_up(name, config.stash[_MISSING][name])
    try:
        server = provide()
    except Unavailable as error:
        config.stash[_MISSING][name] = str(error)
        _give_up(name, str(error))
    if name not in config.stash[_SHARED]:
        config.stash[_SERVED][name] = server.description
    return server


def _give_up(name: str, reason: str) -> NoReturn:
    if _required():
        pytest.fail(f"{name} is required here (CI is set) but unavailable: {reason}", pytrace=False)
    pytest.skip(f"{name} is unavailable: {reason}")


def _required() -> bool:
    """In CI a service that is missing is a failure: nothing may pass there by not running."""
    return os.environ.get("CI", "").lower() in ("1", "true")

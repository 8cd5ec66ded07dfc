"""Servers of our own can be broken and come back, keep to loopback, and nothing of them survives us."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from devservices import (
    LocalKafka,
    LocalPostgres,
    LocalRabbitMq,
    MySqlServer,
    NotControllable,
    Origin,
    Postgres,
    Unavailable,
    kafka,
    provide,
    reaper,
)

ROOT = Path(__file__).parents[2]
LOOPBACK = "0100007F"


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_postgres_comes_back_with_its_data_on_the_same_address(own_postgres: LocalPostgres, how: str) -> None:
    url = own_postgres.create_database()
    own_postgres.execute("CREATE TABLE t (id int)", "INSERT INTO t VALUES (1)", database_url=url)
    getattr(own_postgres, how)()
    with pytest.raises(OSError):
        own_postgres.execute("SELECT 1")
    own_postgres.start()
    assert own_postgres.execute("SELECT id FROM t", database_url=url) == [[(1,)]]
    own_postgres.drop_database(url)


def test_a_paused_postgres_holds_its_answer_until_resumed(own_postgres: LocalPostgres) -> None:
    own_postgres.pause()
    try:
        states = {
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            for pid in tree(own_postgres.pid)
        }
    finally:
        own_postgres.resume()
    assert states == {"T"}
    assert own_postgres.execute("SELECT 1") == [[(1,)]]


def test_a_running_server_is_not_started_twice(own_postgres: LocalPostgres) -> None:
    with pytest.raises(NotControllable):
        own_postgres.start()


def test_databases_come_from_a_template_that_is_built_once(postgres_server: Postgres) -> None:
    builds = []

    def build(url: str) -> None:
        builds.append(url)
        postgres_server.execute("CREATE TABLE t (id int)", database_url=url)

    for _ in range(2):
        url = postgres_server.create_database(template=postgres_server.template("a table", build))
        assert postgres_server.execute("SELECT count(*) FROM t", database_url=url) == [[(0,)]]
        postgres_server.drop_database(url)
    assert len(builds) == 1


@pytest.mark.parametrize("kind", ["postgres", "mariadb", "mysql"])
def test_a_database_that_is_lent_is_as_it_was_made_and_nobody_else_works_in_it(
    kind: str, request: pytest.FixtureRequest
) -> None:
    server: Postgres | MySqlServer = request.getfixturevalue(f"{kind}_server")

    def build(url: str) -> None:
        server.execute(
            "CREATE TABLE t (id int)",
            "CREATE TABLE version (number int)",
            "INSERT INTO version VALUES (7)",
            database_url=url,
        )

    with server.lent(f"lent {kind}", build) as first:
        server.execute("INSERT INTO t VALUES (1)", "CREATE TABLE u (id int)", database_url=first)
        plain = {"postgres": "postgresql+psycopg"}.get(kind, "mysql+pymysql")
        left = create_engine(make_url(first).set(drivername=plain)).connect()
        left.execute(text("INSERT INTO t VALUES (2)"))
    with pytest.raises(DBAPIError):  # its session was ended before the rows went
        left.execute(text("INSERT INTO t VALUES (3)"))
    with server.lent(f"lent {kind}", build) as second, server.lent(f"lent {kind}", build) as third:
        assert second == first != third
        for url in (second, third):
            assert server.execute("SELECT id FROM t", "SELECT number FROM version", database_url=url) == [
                [],
                [(7,)],
            ]
        with pytest.raises(Exception, match="u"):
            server.execute("SELECT id FROM u", database_url=second)


def test_a_database_that_was_changed_beyond_its_tables_is_not_lent_again(postgres_server: Postgres) -> None:
    with postgres_server.lent("with a schema", lambda url: None) as first:
        postgres_server.create_schema(first, "accounts")
    with postgres_server.lent("with a schema", lambda url: None) as second:
        assert second != first


def test_a_role_owns_its_schema_and_sees_no_other(postgres_server: Postgres) -> None:
    url = postgres_server.create_database()
    name = url.rpartition("/")[2]
    roles = [postgres_server.create_role() for _ in range(2)]
    try:
        for role, _ in roles:
            postgres_server.create_schema(url, f"of_{role}", owner=role)
        role, password = roles[0]
        own_url = postgres_server.database_url(name, role=role, password=password)
        postgres_server.execute("CREATE TABLE t (id int)", database_url=own_url)
        found = postgres_server.execute(
            "SELECT schemaname FROM pg_tables WHERE tablename = 't'", database_url=own_url
        )
        assert found == [[(f"of_{role}",)]]
        with pytest.raises(Exception, match="permission denied"):
            postgres_server.execute(f'CREATE TABLE "of_{roles[1][0]}".t (id int)', database_url=own_url)
    finally:
        postgres_server.drop_database(url)
        for role, _ in roles:
            postgres_server.drop_role(role)


def test_statements_are_counted_and_commits_reach_the_disk(own_postgres: LocalPostgres) -> None:
    assert own_postgres.execute("SHOW fsync", "SHOW synchronous_commit") == [[("on",)], [("on",)]]
    assert own_postgres.execute("SELECT count(*) > 0 FROM pg_stat_statements") == [[(True,)]]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_rabbitmq_comes_back_on_the_same_address(own_rabbitmq: LocalRabbitMq, how: str) -> None:
    own_rabbitmq.rabbitmqctl("add_vhost", how)
    getattr(own_rabbitmq, how)()
    own_rabbitmq.start()
    assert how in own_rabbitmq.rabbitmqctl("list_vhosts").split()
    own_rabbitmq.rabbitmqctl("delete_vhost", how)


def test_a_server_listens_on_loopback_only(own_postgres: LocalPostgres, own_rabbitmq: LocalRabbitMq) -> None:
    assert listens_on([*tree(own_postgres.pid), *tree(own_rabbitmq.pid)]) == {LOOPBACK}


def test_nothing_survives_a_killed_owner() -> None:
    """Whoever started a server may be killed by SIGKILL: the reaper ends the server and removes its directory."""
    program = "; ".join(
        [
            "import os, devservices",
            "server = devservices.LocalPostgres()",
            "print(server.pid, server._directory, flush=True)",
            "os.read(0, 1)",
        ]
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    with owner:
        assert owner.stdout is not None
        pid, directory = owner.stdout.readline().split()
        owner.kill()
    deadline = time.monotonic() + 10
    while reaper.start_time(int(pid)) is not None or Path(directory).exists():
        assert time.monotonic() < deadline, "the server outlived its owner"
        time.sleep(0.05)


def test_run_gives_addresses_passes_the_status_on_and_cleans_up_after_a_signal(tmp_path: Path) -> None:
    script = "echo $SAGA_TEST_POSTGRES_URL $$; trap 'exit 3' TERM; sleep 60 & wait"
    runner = subprocess.Popen(
        [sys.executable, "-m", "devservices", "run", "postgres", "--", "bash", "-c", script],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    with runner:
        assert runner.stdout is not None
        assert runner.stdout.readline().startswith("services: PostgreSQL")
        url, pid = runner.stdout.readline().split()
        assert url.startswith("postgresql+asyncpg://")
        runner.send_signal(signal.SIGTERM)
        assert runner.wait(30) == 128 + signal.SIGTERM
    assert reaper.start_time(int(pid)) is None


def test_a_given_address_that_does_not_answer_is_an_error_and_not_a_reason_to_look_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAGA_TEST_RABBITMQ_URL", "amqp://127.0.0.1:1/")
    with pytest.raises(Unavailable, match="SAGA_TEST_RABBITMQ_URL is set, but RabbitMQ does not answer"):
        provide.start_rabbitmq()
    monkeypatch.setenv("SAGA_TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:1/postgres")
    with pytest.raises(Unavailable, match="SAGA_TEST_POSTGRES_URL is set, but PostgreSQL does not answer"):
        provide.start_postgres()
    monkeypatch.setenv("SAGA_TEST_KAFKA_URL", "kafka://127.0.0.1:1")
    with pytest.raises(Unavailable, match="SAGA_TEST_KAFKA_URL is set, but Kafka does not answer"):
        provide.start_kafka()


def test_kafka_without_java_or_maven_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="no java on this machine"):
        kafka.find_programs()
    (tmp_path / "java").touch(mode=0o755)
    with pytest.raises(Unavailable, match="no mvn on this machine to fetch Kafka with"):
        kafka.find_programs()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_kafka_comes_back_on_the_same_address_and_listens_on_loopback_only(
    own_kafka: LocalKafka, how: str
) -> None:
    getattr(own_kafka, how)()
    with pytest.raises(OSError):
        kafka.count_brokers(own_kafka.url)
    own_kafka.start()
    assert kafka.count_brokers(own_kafka.url) == 1
    assert listens_on(tree(own_kafka.pid)) == {LOOPBACK}


@pytest.fixture
def given_postgres(postgres_server: Postgres, monkeypatch: pytest.MonkeyPatch) -> Iterator[Postgres]:
    monkeypatch.setenv("SAGA_TEST_POSTGRES_URL", postgres_server.url)
    with provide.start_postgres() as server:
        yield server


def test_a_given_server_is_used_and_never_broken(given_postgres: Postgres, postgres_server: Postgres) -> None:
    assert (given_postgres.origin, given_postgres.version) == (Origin.URL, postgres_server.version)
    for verb in (given_postgres.kill, given_postgres.stop, given_postgres.start, given_postgres.pause):
        with pytest.raises(NotControllable):
            verb()
    given_postgres.close()
    assert postgres_server.execute("SELECT 1") == [[(1,)]]


def listens_on(pids: Sequence[int]) -> set[str]:
    """Return the addresses on which these processes take connections, as the kernel writes them."""
    inodes = {inode for pid in pids for inode in sockets(pid)}
    tables = [Path(f"/proc/net/{name}") for name in ("tcp", "tcp6")]
    lines = [
        line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]
    ]
    return {line[1].partition(":")[0] for line in lines if line[3] == "0A" and line[9] in inodes}


def tree(pid: int) -> list[int]:
    return reaper.descendants(pid)


def sockets(pid: int) -> set[str]:
    """Return the inodes of a process's sockets; what it closes meanwhile is left out."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(link)
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


def test_a_free_port_is_below_those_of_outgoing_connections() -> None:
    from devservices.processes import free_port

    port = free_port()
    assert 15_000 <= port < 32_000
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))

"""`saga db`: what it prints, the statuses it exits with, and what it never shows."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saga.cli import build
from tests.plugins.canary import python_path

ROOT = Path(__file__).parents[2]
SECRET = "s3cr3t-canary"


def saga(*arguments: str, **environment: str) -> tuple[int, str]:
    """Return exit status and everything printed. The commands run a loop of their own, so tests are plain functions."""
    result = CliRunner().invoke(build(), list(arguments), env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(params=["sqlite", "postgres-rabbitmq"])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(stack: str, request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("sqlite_url" if stack == "sqlite" else "postgres_url"))


@pytest.mark.feature("G-09")
def test_check_upgrade_check(stack: str, url: str) -> None:
    status, output = saga("db", "check", "--database", url)
    assert (status, "table saga_instance is missing" in output) == (1, True)
    assert saga("db", "upgrade", "--database", url) == (0, "the database is up to date\n")
    assert saga("db", "upgrade", "--database", url) == (0, "the database is up to date\n")
    assert saga("db", "check", "--database", url) == (0, "the database fits this release\n")


@pytest.mark.feature("H-01")
@pytest.mark.stack("sqlite")
def test_differences_are_a_document_with_json(sqlite_url: str) -> None:
    status, output = saga("db", "check", "--database", sqlite_url, "--json")
    assert (status, "table saga_instance is missing" in json.loads(output)["differences"]) == (1, True)
    assert saga("db", "upgrade", "--database", sqlite_url, "--json")[0] == 0
    status, output = saga("db", "check", "--database", sqlite_url, "--json")
    assert (status, json.loads(output)) == (0, {"differences": []})


@pytest.mark.feature("G-09")
@pytest.mark.stack("sqlite")
def test_upgrade_brings_a_dropped_index_back(sqlite_url: str) -> None:
    saga("db", "upgrade", "--database", sqlite_url)
    with sqlite3.connect(sqlite_url.partition(":///")[2]) as connection:
        connection.execute("DROP INDEX ix_saga_outbox_part")
    connection.close()
    assert saga("db", "check", "--database", sqlite_url) == (
        1,
        "index ix_saga_outbox_part on saga_outbox is missing\n",
    )
    assert saga("db", "upgrade", "--database", sqlite_url)[0] == 0
    assert saga("db", "check", "--database", sqlite_url)[0] == 0


@pytest.mark.feature("G-09")
@pytest.mark.stack("sqlite")
def test_upgrade_says_what_it_cannot_mend(sqlite_url: str) -> None:
    with sqlite3.connect(sqlite_url.partition(":///")[2]) as connection:
        connection.execute("CREATE TABLE saga_lease (something text)")
    connection.close()
    status, output = saga("db", "upgrade", "--database", sqlite_url)
    assert (status, "column epoch on saga_lease is missing" in output) == (1, True)


def test_the_address_comes_from_the_environment_unless_it_is_given(sqlite_url: str, tmp_path: Path) -> None:
    other = f"sqlite:///{tmp_path / 'other.db'}"
    assert saga("db", "upgrade", SAGA_DATABASE=sqlite_url)[0] == 0
    assert saga("db", "check", SAGA_DATABASE=sqlite_url)[0] == 0
    assert saga("db", "check", "--database", other, SAGA_DATABASE=sqlite_url)[0] == 1


@pytest.mark.feature("G-09")
@pytest.mark.parametrize(
    ("dialect", "line"),
    [("postgresql", "id BIGSERIAL NOT NULL"), ("sqlite", "PRIMARY KEY AUTOINCREMENT")],
)
@pytest.mark.stack("sqlite", "postgres-rabbitmq")
def test_sql_is_printed_without_a_connection(dialect: str, line: str) -> None:
    status, output = saga("db", "sql", "--dialect", dialect)
    assert status == 0
    assert output.startswith("BEGIN;")
    assert output.rstrip().endswith("COMMIT;")
    assert line in output
    address = {"postgresql": f"postgresql://u:{SECRET}@nowhere.invalid/x", "sqlite": "sqlite:///nowhere.db"}
    assert saga("db", "sql", "--database", address[dialect]) == (0, output)


@pytest.mark.parametrize(
    "arguments",
    [
        ("db", "check"),
        ("db", "sql"),
        ("db", "sql", "--dialect", "oracle"),
        ("db", "check", "--database", "no address"),
        ("db", "check", "--database", "sqlite://"),
        ("db", "check", "--database", "oracle://u:p@h/x"),
        ("db", "mend"),
    ],
)
def test_wrong_usage_and_wrong_settings_exit_with_2(arguments: tuple[str, ...]) -> None:
    assert saga(*arguments, SAGA_DATABASE="")[0] == 2


@pytest.mark.parametrize(
    ("address", "status"),
    [
        (f"postgresql://u:{SECRET}@127.0.0.1:1/x", 1),  # nobody listens
        (f"postgresql://u:{SECRET}@@127.0.0.1:1x/x", 2),  # no port
        (f"postgresql://u:{SECRET}:1@[::1/x", 2),
        (f"oracle://u:{SECRET}@127.0.0.1/x", 2),
        (f"{SECRET}", 2),
    ],
)
def test_a_password_is_never_shown(address: str, status: int, caplog: pytest.LogCaptureFixture) -> None:
    found, output = saga("db", "check", "--database", address)
    assert found == status
    assert SECRET not in output + caplog.text
    assert "saga: " in output
    assert SECRET not in saga("db", "check", "--help", SAGA_DATABASE=address)[1]


@pytest.mark.stack("postgres-rabbitmq")
def test_a_refused_log_in_is_a_wrong_setting_and_shows_no_password(postgres_url: str) -> None:
    server, _, _ = postgres_url.rpartition("/")
    status, output = saga("db", "check", "--database", f"{server}/no_such_database")
    assert status == 2
    assert "3D000" in output


def test_without_the_package_of_the_extra_one_line_says_so(tmp_path: Path) -> None:
    """The library is installed without its extra: the program exists and can only say what it needs."""
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('No module named typer', name='typer')")
    done = subprocess.run(
        [sys.executable, "-c", "from saga.cli import main; main()"],
        env={**os.environ, "PYTHONPATH": python_path(tmp_path, ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "saga: the command line needs a package more: pip install 'saga[cli]'\n"

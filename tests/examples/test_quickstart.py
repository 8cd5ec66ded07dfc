"""Row I-01: 25 lines, one file, no service: killed in the middle and run again, it finishes. Two URLs make it big."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from devservices import Postgres, RabbitMq
from tests.plugins.canary import python_path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "quickstart.py"
SECONDS_MAX = 60.0
FIND = """
from importlib.util import find_spec
for each in filter(None, map(find_spec, ("saga", "asyncpg", "aio_pika", "typer"))):
    print(each.origin)
"""
SAID = ["booking hotel", "booking flight to Lisbon", "flight to Lisbon booked"]


@pytest.fixture(params=["sqlite", "postgres-rabbitmq"])
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def urls(stack: str, request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The two URLs that make the difference between the stacks; none for the embedded one."""
    if stack == "sqlite":
        yield {}
        return
    postgres: Postgres = request.getfixturevalue("postgres_server")
    rabbitmq: RabbitMq = request.getfixturevalue("rabbitmq_server")
    database = postgres.create_database()
    _run([sys.executable, "-m", "saga.cli", "db", "upgrade", "--database", database], ROOT, {})
    yield {"DATABASE": database, "BROKER": rabbitmq.url}
    postgres.drop_database(database)


@pytest.mark.feature("I-01", acceptance=True, scale=1.0)
def test_quickstart_killed_in_the_middle_and_run_again_finishes(urls: dict[str, str], tmp_path: Path) -> None:
    """What was done stays done: the second run does not book the hotel again."""
    _check_kill_and_run_again(Path(sys.executable), tmp_path, {**urls, "PYTHONPATH": python_path(ROOT)})


@pytest.mark.slow
@pytest.mark.feature("I-01", acceptance=True, scale=1.0)
@pytest.mark.stack("sqlite")
def test_quickstart_runs_from_the_built_wheel_in_an_empty_environment(tmp_path: Path) -> None:
    """With the core dependencies and nothing else: an extra that crept into the core would be missed here."""
    wheels = tmp_path / "wheels"
    _run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)], ROOT, {})
    (wheel,) = wheels.glob("*.whl")
    environment = tmp_path / "environment"
    _run([sys.executable, "-m", "venv", "--without-pip", str(environment)], tmp_path, {})
    python = environment / "bin" / "python"
    _link_core_dependencies(python)
    _install(wheel, python)
    found = _run([str(python), "-c", FIND], tmp_path, {"PYTHONPATH": python_path()}).split()
    assert len(found) == 1
    assert found[0].startswith(str(environment))
    empty = tmp_path / "empty"
    empty.mkdir()
    _check_kill_and_run_again(python, empty, {"PYTHONPATH": python_path()})


@pytest.mark.feature("I-01")
@pytest.mark.stack("pure")
def test_quickstart_has_25_lines_and_makes_its_tables_itself() -> None:
    text = SCRIPT.read_text()
    assert text.count("\n") <= 25
    assert "sqlite:///saga.db" in text
    assert "create" not in text


def _check_kill_and_run_again(python: Path, directory: Path, environment: dict[str, str]) -> None:
    first = subprocess.Popen(
        [python, SCRIPT],
        cwd=directory,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert first.stdout is not None
        said = [first.stdout.readline().rstrip() for _ in range(2)]
    finally:
        first.kill()  # in the middle of the second booking, which takes a second
        status = first.wait(SECONDS_MAX)
        assert first.stdout is not None
        said += first.stdout.read().splitlines()
        first.stdout.close()
    assert (status, said) == (-signal.SIGKILL, SAID[:2])
    # a copy of the command may run the handler once more, and its transaction is rolled back: what counts is the order
    again = _run([str(python), str(SCRIPT)], directory, environment).splitlines()
    assert list(dict.fromkeys(again)) == SAID[1:]
    # and a third time: the trip is over, and its result is kept
    third = _run([str(python), str(SCRIPT)], directory, environment).splitlines()
    # The killed one's relay had not deleted its row: once the lease has run out, a later one may send that command
    # again, as if for the first time. Its handler then prints once more, and the barrier rolls it back (P3).
    third = [line for line in third if line != SAID[1]]
    assert third == SAID[2:]


def _run(command: list[str], directory: Path, environment: dict[str, str]) -> str:
    ran = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


# --- an environment made without a package registry -------------------------------------------


def _install(wheel: Path, python: Path) -> None:
    uv = [sys.executable, "-m", "uv", "--offline", "--no-config", "pip", "install", "--quiet"]
    _run([*uv, "--no-deps", "--no-cache", "--python", str(python), str(wheel)], wheel.parent, {})


def _link_core_dependencies(python: Path) -> None:
    """Link the packages that the core needs, and what those need, from the environment of the tests."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(_run([str(python), "-c", code], python.parent, {}).strip())
    linked: set[str] = set()
    for distribution in _needed("saga"):
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and top not in linked:
                linked.add(top)
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))


def _needed(root: str) -> list[metadata.Distribution]:
    """Return what a package needs without extras, directly or not, except itself."""
    found: dict[tuple[str, str], metadata.Distribution] = {}
    rest = [(root, "")]
    while rest:
        name, extra = rest.pop()
        if (name, extra) in found:
            continue
        found[name, extra] = distribution = metadata.distribution(name)
        for line in distribution.requires or ():
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                rest += [(need.name, each) for each in ("", *need.extras)]
    unique = {distribution.name: distribution for (name, _), distribution in found.items() if name != root}
    return list(unique.values())

"""`saga coordinator | participant`: finds the app, stops gracefully at one signal and at once at the second."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saga.cli import build
from tests.plugins.canary import python_path

ROOT = Path(__file__).parents[2]

APPS = '''
import asyncio

from saga.errors import MissingCapability, SchemaMismatch


class Polite:
    """Stops when asked and says that it handed everything back."""

    async def run_coordinator(self, stop, grace):
        print("coordinator is up", flush=True)
        await stop.wait()
        print(f"handed back within {grace.total_seconds():g} s", flush=True)

    async def run_participant(self, stop, grace):
        print("participant is up", flush=True)
        await stop.wait()
        print("handed back", flush=True)


class Deaf(Polite):
    """Goes on after the first signal."""

    async def run_coordinator(self, stop, grace):
        print("coordinator is up", flush=True)
        await stop.wait()
        print("still busy", flush=True)
        await asyncio.Event().wait()


class Misfit(Polite):
    async def run_coordinator(self, stop, grace):
        raise SchemaMismatch("The database does not fit: table x is missing. Run: saga db upgrade")

    async def run_participant(self, stop, grace):
        raise MissingCapability("The broker cannot delay messages.")


class shelf:
    polite = Polite()


polite, deaf, misfit, number = Polite(), Deaf(), Misfit(), 7
'''


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with the module `shop_apps`, which is found because processes start in it."""
    (tmp_path / "shop_apps.py").write_text(APPS)
    (tmp_path / "shop_broken.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("shop_apps", "shop_broken"):
        sys.modules.pop(name, None)


@contextmanager
def started(shop: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "saga.cli", *arguments],
        cwd=shop,
        env={**os.environ, "PYTHONPATH": python_path(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(
    ("role", "number"), [("coordinator", signal.SIGTERM), ("participant", signal.SIGINT)]
)
def test_the_first_signal_lets_the_app_hand_everything_back(
    shop: Path, role: str, number: signal.Signals
) -> None:
    with started(shop, role, "shop_apps:polite", "--grace", "7") as process:
        assert next_line(process) == f"{role} is up"
        process.send_signal(number)
        output, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert output.startswith("handed back")
    assert ("within 7 s" in output) == (role == "coordinator")
    assert "Traceback" not in errors


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_ends_the_process_at_once(shop: Path, number: signal.Signals, status: int) -> None:
    with started(shop, "coordinator", "shop_apps:deaf") as process:
        assert next_line(process) == "coordinator is up"
        process.send_signal(number)
        assert next_line(process) == "still busy"
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert "ending at once" in errors
    assert "Traceback" not in errors


def test_with_json_each_log_line_is_an_object_and_names_its_saga(shop: Path) -> None:
    (shop / "shop_sagas.py").write_text(TELLING)
    with started(shop, "coordinator", "shop_sagas:app", "--json", "--log-level", "debug") as process:
        assert next_line(process) == "told"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    lines = [json.loads(line) for line in errors.splitlines()]
    about = next(line for line in lines if line["logger"] == "saga.participant")
    assert about["time"].endswith("+00:00")
    assert {name: about[name] for name in ("level", "text", "saga", "saga_id", "attempt")} == {
        "level": "WARNING",
        "text": "reserve waits",
        "saga": "purchase",
        "saga_id": "o-1",
        "attempt": 2,
    }
    failed = next(line for line in lines if "traceback" in line)
    assert failed["traceback"].endswith("ValueError: x")


TELLING = """
import logging

class App:
    async def run_coordinator(self, stop, grace):
        about = {"saga": "purchase", "saga_id": "o-1", "attempt": 2}
        logging.getLogger("saga.participant").warning("%s waits", "reserve", extra=about)
        try:
            raise ValueError("x")
        except ValueError:
            logging.getLogger("shop").exception("it failed")
        print("told", flush=True)
        await stop.wait()

app = App()
"""


@pytest.mark.parametrize("role", ["coordinator", "participant"])
def test_with_json_the_error_that_ends_a_process_is_an_object(shop: Path, role: str) -> None:
    with started(shop, role, "shop_apps:misfit", "--json") as process:
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert json.loads(errors)["error"]["class"] in ("SchemaMismatch", "MissingCapability")


def saga(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(build(), list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize(
    ("role", "lines"),
    [
        (
            "coordinator",
            "saga: SchemaMismatch [SG204] The database does not fit: table x is missing. Run: saga db upgrade",
        ),
        ("participant", "saga: MissingCapability [SG203] The broker cannot delay messages."),
    ],
)
def test_a_start_that_fails_prints_class_code_and_advice_and_exits_with_1(
    shop: Path, monkeypatch: pytest.MonkeyPatch, role: str, lines: str
) -> None:
    monkeypatch.chdir(shop)
    assert saga(role, "shop_apps:misfit") == (1, lines)


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("shop_apps", "is not of the form MODULE:APP"),
        (":app", "is not of the form MODULE:APP"),
        ("shop_nothing:app", "there is no module 'shop_nothing'"),
        ("shop_nothing.deeper:app", "there is no module 'shop_nothing'"),
        ("shop_apps:nothing", "module 'shop_apps' has no 'nothing'"),
        ("shop_apps:shelf.nothing", "module 'shop_apps' has no 'shelf.nothing'"),
        ("shop_apps:number", "'shop_apps:number' is not an app"),
    ],
)
def test_a_place_without_an_app_is_named_and_exits_with_2(
    shop: Path, monkeypatch: pytest.MonkeyPatch, place: str, line: str
) -> None:
    monkeypatch.chdir(shop)
    monkeypatch.setenv("COLUMNS", "300")
    status, output = saga("coordinator", place)
    assert status == 2
    assert line in output


def test_a_package_that_the_app_itself_misses_keeps_its_traceback(
    shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shop)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        saga("coordinator", "shop_broken:app")


def test_an_app_may_be_an_attribute_of_an_attribute(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saga.cli.processes import load

    monkeypatch.chdir(shop)
    assert type(load("shop_apps:shelf.polite")).__name__ == "Polite"


def test_an_unknown_log_level_exits_with_2(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shop)
    assert saga("coordinator", "shop_apps:polite", "--log-level", "loud")[0] == 2

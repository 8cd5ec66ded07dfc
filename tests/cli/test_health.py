"""`--health`: a file or a port tells probes whether the process reaches database and broker and consumes."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from saga.cli import health
from saga.clock import SystemClock
from saga.running import Health

pytestmark = pytest.mark.stack("sqlite")

UP, DOWN = Health(True, True, True), Health(True, False, True)
clock = SystemClock()


class Asked:
    """An app that says what the test wants."""

    def __init__(self) -> None:
        self.health = DOWN
        self.asked = 0

    async def __call__(self) -> Health:
        self.asked += 1
        return self.health

    async def again(self) -> None:
        """Wait until the answer was told once more."""
        wanted = self.asked + 2
        while self.asked < wanted:
            await clock.sleep(0.005)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    monkeypatch.setattr(health, "SECONDS", 0.01)
    return Asked()


async def test_the_file_is_there_while_the_process_is_ready(asked: Asked, tmp_path: Path) -> None:
    path = tmp_path / "ready"
    path.write_text("of a process that was killed")
    async with health.told(str(path), asked):
        await asked.again()
        assert not path.exists()
        asked.health = UP
        await asked.again()
        assert json.loads(path.read_bytes()) == {
            "ready": True,
            "database": True,
            "broker": True,
            "consuming": True,
        }
        asked.health = DOWN
        await asked.again()
        assert not path.exists()
        asked.health = UP
        await asked.again()
    assert not path.exists(), "the process has ended"


async def test_the_port_answers_live_and_ready(asked: Asked) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with health.told(str(port), asked):
        assert get(port, "/live")[0] == 200
        await asked.again()
        assert get(port, "/ready") == (
            503,
            {"ready": False, "database": True, "broker": False, "consuming": True},
        )
        asked.health = UP
        await asked.again()
        assert get(port, "/ready")[0] == 200
        assert get(port, "/secrets")[0] == 404
    with pytest.raises(urllib.error.URLError):
        get(port, "/live")


def get(port: int, path: str) -> tuple[int, dict[str, bool]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())

"""Row G-07: an address finds the adapter that another package has installed, by the entry point of its scheme."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from saga import App, ConfigurationError
from saga.clock import TaskSpawner

pytestmark = [pytest.mark.stack("pure"), pytest.mark.feature("G-07")]

PIGEONS = """
class Pigeons:
    def __init__(self, address, **ports):
        self.address, self.ports = address, ports
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`install(package)`: a distribution with a module and an entry point, as pip leaves it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(package: str) -> None:
        (tmp_path / f"{package}.py").write_text(PIGEONS)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[saga.brokers]\npigeon = {package}:Pigeons\n")
        importlib.invalidate_caches()

    yield make
    for name in ("loft", "dovecote"):
        sys.modules.pop(name, None)


def made(address: str) -> Any:
    app = App(broker=address)
    return app.make_broker(TaskSpawner(), None)


def test_an_address_finds_the_adapter_of_its_scheme(install: Any) -> None:
    install("loft")
    broker = made("pigeon://home/7?wing=left")
    assert type(broker).__name__ == "Pigeons"
    assert broker.address == "pigeon://home/7?wing=left"
    assert set(broker.ports) == {"clock", "ids", "spawner"}


def test_a_scheme_that_nobody_has_is_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigurationError, match=r"No broker for 'pigeon'.*entry points 'saga.brokers'"):
        made("pigeon://home")


def test_two_adapters_of_one_scheme_are_refused_by_name(install: Any) -> None:
    install("loft")
    install("dovecote")
    with pytest.raises(ConfigurationError, match=r"dovecote:Pigeons, loft:Pigeons\. Remove one"):
        made("pigeon://home")

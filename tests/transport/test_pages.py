"""L-05, G-05: addresses on the pages are understood and checked as the pages say; every code stands in the table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from saga import App
from saga.brokers.rabbitmq import topology
from saga.clock import TaskSpawner
from tests.transport.certificates import Authorities

ROOT = Path(__file__).parents[2]
PAGES = ("production", "databases", "brokers")

pytestmark = pytest.mark.stack("pure")


def addresses() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        text = (ROOT / "docs" / f"{page}.md").read_text()
        for name, address in re.findall(r"^SAGA_(DATABASE|BROKER)=(\S+)$", text, re.MULTILINE):
            yield name.lower(), address


@pytest.mark.feature("L-05")
@pytest.mark.parametrize(("name", "address"), list(addresses()))
async def test_an_address_on_a_page_is_one_that_production_takes(
    name: str, address: str, authorities: Authorities, tmp_path: Path
) -> None:
    (tmp_path / "database").write_text("secret")
    (tmp_path / "broker").write_text("secret")
    mine = authorities.issue("shop")
    for path in (authorities.root, mine.certificate, mine.key):
        (tmp_path / path.name.replace("ours", "ca")).write_bytes(path.read_bytes())
    given = address.replace("/etc/shop/", f"{tmp_path}/").replace("/run/secrets/", f"{tmp_path}/")
    app = (
        App(given, broker="memory://", production=True)
        if name == "database"
        else App(broker=given, production=True)
    )
    app.check_links()
    spawner = TaskSpawner()
    database = app.make_database(spawner)
    broker = app.make_broker(spawner, database)
    await broker.close()
    if database is not None:
        await database.dispose()
    await spawner.close()


@pytest.mark.feature("G-05")
def test_every_code_of_a_finding_stands_in_the_table() -> None:
    rows = re.findall(
        r"^\| `([a-z-]+)` \| (?:note|warn|refuse)", (ROOT / "docs" / "brokers.md").read_text(), re.MULTILINE
    )
    source = "".join(path.read_text() for path in (ROOT / "saga" / "brokers").rglob("topology.py"))
    codes = {
        *re.findall(r"[Ff]inding\(\s*\"([a-z-]+)\"", source),
        *topology._CODES.values(),
        "queue-argument",
    }
    assert len(codes) > 15
    assert set(rows) == codes

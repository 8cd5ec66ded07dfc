"""The pages' examples are run as they stand, each page's files in a folder of its own, and print what the page says."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import costs
from saga.engine.effects import IncidentKind
from tests.plugins.canary import python_path

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.stack("sqlite")


@pytest.mark.parametrize(
    ("page", "program", "others"),
    [
        ("getting-started", "shop", {"production"}),
        ("production", "try_it", {"warehouse", "shop", "services"}),
        ("compensation", "trip", set()),
        ("effects", "shop", set()),
        ("events", "orders", set()),
        ("retention", "keep", set()),
        ("synchronous", "sell", {"shop"}),
        ("web", "try_it", {"shop", "web"}),
    ],
)
def test_the_examples_of_a_page_run(page: str, program: str, others: set[str], tmp_path: Path) -> None:
    said = write_out(page, {program, *others}, tmp_path)
    assert run(tmp_path, f"{program}.py") == said
    if others:
        assert run(tmp_path, "-c", f"import {', '.join(sorted(others))}") == ""


@pytest.mark.stack("postgres-rabbitmq")
def test_the_examples_of_the_page_about_faststream_run(rabbitmq_url: str, tmp_path: Path) -> None:
    said = write_out("faststream", {"accounts", "pay"}, tmp_path)
    told = run(tmp_path, "pay.py", BROKER_URL=rabbitmq_url, SAGA_NAMESPACE=f"page-{secrets.token_hex(4)}")
    logged = re.compile(r"\d{4}-\d\d-\d\d ")  # FastStream's own
    assert "".join(line for line in told.splitlines(keepends=True) if not logged.match(line)) == said


def test_what_stacks_cost_is_what_was_measured() -> None:
    """`python -m benchmarks costs` prints the table from the results that are kept."""
    assert costs.table(costs.read()) in (ROOT / "docs" / "stacks.md").read_text()


def test_every_kind_of_incident_stands_in_the_table_with_what_to_do() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| .+ \| .+ \|$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE
    )
    assert set(IncidentKind) <= set(rows)


def write_out(page: str, named: set[str], folder: Path) -> str:
    """Write a page's files into a folder, and return what it says that they print."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    blocks = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", text, re.DOTALL))
    assert set(blocks) == named
    assert len(blocks) == text.count("```python"), "a block without the name of its file"
    for name, code in blocks.items():
        (folder / f"{name}.py").write_text(code)
    (said,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    return str(said)


def run(folder: Path, *arguments: str, **named: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": python_path(ROOT), **named},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

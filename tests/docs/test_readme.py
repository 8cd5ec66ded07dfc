"""What the documents say is run: the README's example, its commands, and the names that the pages mention."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from saga.storage.sqlalchemy.tables import metadata
from tests.plugins.canary import python_path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]

pytestmark = pytest.mark.stack("sqlite")


def test_the_first_example_runs_as_it_stands_in_an_empty_folder(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "transfer.py").write_text(code)
    run = subprocess.run(
        [sys.executable, "transfer.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": python_path(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stdout) == (0, "1200 put on grace\n"), run.stderr


def test_every_make_target_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"`make ([a-z-]+)", page.read_text()) + re.findall(
            r"^make ([a-z-]+)", page.read_text(), re.MULTILINE
        )
        assert set(named) <= targets, page.name


def test_every_path_that_a_page_names_exists() -> None:
    for page in PAGES:
        for path in re.findall(
            r"`((?:saga|tests|docs|examples|benchmarks|devservices)/[\w./-]+)`", page.read_text()
        ):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_every_table_that_a_page_names_exists() -> None:
    for page in (ROOT / "ARCHITECTURE.md", ROOT / "docs" / "operations.md"):
        named = set(re.findall(r"`(saga_[a-z_]+)`", page.read_text())) - {"saga_id"}  # what a log line has
        assert named <= set(metadata.tables), page.name

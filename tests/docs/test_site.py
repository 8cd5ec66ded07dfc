"""The site of `make docs` builds without a warning: every page is in it, and every link leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.stack("pure")


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    (command,) = re.findall(r"-m (sphinx .*) docs build/docs", (ROOT / "Makefile").read_text())
    options = command.replace("build/doctrees", str(tmp_path / "doctrees")).split()
    built = subprocess.run(
        [sys.executable, "-m", *options, "docs", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (built.returncode, built.stderr) == (0, "")
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in ROOT.glob("docs/**/*.md")}
    assert pages <= {path.relative_to(tmp_path / "site") for path in tmp_path.glob("site/**/*.html")}

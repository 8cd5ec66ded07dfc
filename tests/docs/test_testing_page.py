"""The page about testing is run as a user would run it: its files side by side in a folder, by pytest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from saga.testing import FaultKind, plugin

PAGE = Path(__file__).parents[2] / "docs" / "testing.md"
TESTS = 7

pytestmark = [pytest.mark.stack("sqlite"), pytest.mark.feature("I-06")]


def test_every_example_runs(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p pytest_asyncio.plugin -s")
    monkeypatch.syspath_prepend(pytester.path)
    pytester.makeini(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n"
    )
    blocks = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == PAGE.read_text().count("```python"), "a block without the name of its file"
    for name, code in blocks:
        (pytester.path / f"{name}.py").write_text(code)
    result = pytester.runpytest_inprocess(plugins=[plugin])
    result.assert_outcomes(passed=TESTS)
    table = result.stdout.str()
    told = re.search(r"Printed, its report is a table:\n\n(.*?)\n\nA failing", PAGE.read_text(), re.DOTALL)
    assert told is not None
    for line in told[1].splitlines():
        if line.strip() != "...":
            words = r"\s+".join(re.escape(word) for word in line.split())
            words = re.sub(r"\b\d+\\s\+s\b", r"\\d+\\s+s", words)  # a retry's delay is drawn by chance
            assert re.search(rf"(?:^|\.){words}\s*$", table, re.MULTILINE), f"not in the table: {line}"


def test_every_fault_stands_in_the_table() -> None:
    listed = set(re.findall(r"`(\w+)\(step", PAGE.read_text()))
    assert {kind.value for kind in FaultKind} <= listed | {"crash_uncommitted"}

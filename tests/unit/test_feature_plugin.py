"""The plugin that decides whether a row of features.md is proved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.features_due import DUE, PURE, STACKS
from tests.plugins import features
from tests.plugins.features import RowReport, main, open_reason, table, together
from tests.stacks import BROKERS

pytestmark = pytest.mark.usefixtures("project")

INI = """
[pytest]
markers =
    feature(row, acceptance=False, scale=1.0): row
    stack(*names): stacks
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setitem(DUE, "T-01", STACKS)
    monkeypatch.setitem(DUE, "T-02", PURE)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # loading them takes longer than the tests
    pytester.makefile(".ini", pytest=INI)
    return pytester


def run(pytester: pytest.Pytester, source: str, *options: str) -> dict[str, Any]:
    pytester.makepyfile("import pytest\n" + source)
    path = pytester.path / "features.json"
    plugins = ("-p", "tests.plugins.features")
    pytester.runpytest_inprocess(*plugins, "--features-json", str(path), *options)
    report: dict[str, Any] = json.loads(path.read_text())
    return report


BOTH_STACKS = """
@pytest.mark.feature("T-01", acceptance=True, scale=0.1)
@pytest.mark.parametrize("stack", ["sqlite", "postgres-rabbitmq"])
def test_it(stack): {body}
"""


def test_a_row_whose_acceptance_check_passes_on_every_stack_is_proved(pytester: pytest.Pytester) -> None:
    row = run(pytester, BOTH_STACKS.format(body="pass"))["T-01"]
    assert row == {
        "passed": 2, "failed": 0, "skipped": 0, "acceptance": True, "scale": 0.1,
        "stacks": ["postgres-rabbitmq", "sqlite"],
    }  # fmt: skip
    assert open_reason("T-01", row) is None


def test_a_stack_on_which_it_was_skipped_is_missing(pytester: pytest.Pytester) -> None:
    row = run(pytester, BOTH_STACKS.format(body="stack == 'sqlite' or pytest.skip('no server')"))["T-01"]
    assert (row["passed"], row["skipped"], row["acceptance"], row["stacks"]) == (1, 1, False, ["sqlite"])
    assert open_reason("T-01", row) == "no acceptance check passed on postgres-rabbitmq"


@pytest.mark.parametrize(
    "fixture",
    ["pytest.skip('no server')", "raise OSError", "yield; raise OSError"],
    ids=["skip in set-up", "error in set-up", "error in teardown"],
)
def test_a_fixture_that_skips_or_breaks_takes_the_proof_away(pytester: pytest.Pytester, fixture: str) -> None:
    source = f"@pytest.fixture(autouse=True)\ndef server(): {fixture}\n" + BOTH_STACKS.format(body="pass")
    row = run(pytester, source)["T-01"]
    assert row["passed"] == 0
    assert not row["acceptance"]
    assert row["skipped" if "skip" in fixture else "failed"] == 2


def test_an_ordinary_test_counts_but_proves_nothing(pytester: pytest.Pytester) -> None:
    row = run(pytester, "@pytest.mark.feature('T-01')\n@pytest.mark.stack('sqlite')\ndef test_it(): pass")[
        "T-01"
    ]
    assert (row["passed"], row["acceptance"], row["stacks"], row["scale"]) == (1, False, [], 0.0)


def test_a_failed_test_beside_a_passed_acceptance_check_keeps_the_row_open(pytester: pytest.Pytester) -> None:
    source = BOTH_STACKS.format(body="pass") + "@pytest.mark.feature('T-01')\ndef test_other(): assert False"
    row = run(pytester, source)["T-01"]
    assert row["acceptance"]
    assert open_reason("T-01", row) == "1 failed"


def test_a_pure_check_holds_on_every_stack_where_a_pure_check_is_due(pytester: pytest.Pytester) -> None:
    source = """
@pytest.mark.feature("T-01", acceptance=True)
@pytest.mark.feature("T-02", acceptance=True)
@pytest.mark.stack("pure")
def test_it(): pass
"""
    report = run(pytester, source)
    assert report["T-02"]["stacks"] == ["postgres-rabbitmq", "sqlite"]
    assert open_reason("T-02", report["T-02"]) is None
    assert report["T-01"]["stacks"] == ["pure"]
    assert open_reason("T-01", report["T-01"]) == "no acceptance check passed on postgres-rabbitmq, sqlite"


def test_a_stack_fixture_names_the_stack(pytester: pytest.Pytester) -> None:
    source = """
@pytest.fixture(params=["sqlite", "postgres-rabbitmq"])
def stack(request): return request.param
@pytest.mark.feature("T-01", acceptance=True)
def test_it(stack): pass
"""
    assert run(pytester, source)["T-01"]["stacks"] == ["postgres-rabbitmq", "sqlite"]


def test_a_check_that_names_no_stack_proves_none(pytester: pytest.Pytester) -> None:
    row = run(pytester, "@pytest.mark.feature('T-01', acceptance=True)\ndef test_it(): pass")["T-01"]
    assert not row["acceptance"]


@pytest.mark.parametrize(("times", "proved"), [(0, False), (2, False), (3, True)])
def test_every_declared_fault_must_fire_three_times(
    pytester: pytest.Pytester, times: int, proved: bool
) -> None:
    source = f"""
@pytest.mark.feature("T-02", acceptance=True)
@pytest.mark.stack("pure")
def test_it(faults):
    faults.declare("kill", "drop")
    faults.fired("kill", 5)
    for _ in range({times}): faults.fired("drop")
"""
    row = run(pytester, source)["T-02"]
    assert row["acceptance"] is proved
    assert (open_reason("T-02", row) is None) is proved


SPREAD = ("-p", "xdist", "-n", "2")
"""Options that give each of the two tests below a worker of its own."""


def test_what_workers_have_recorded_is_put_together(pytester: pytest.Pytester) -> None:
    source = """
@pytest.mark.feature("T-01", acceptance=True, scale=0.1)
@pytest.mark.parametrize("stack", ["sqlite", "postgres-rabbitmq"])
def test_it(stack, faults):
    faults.fired("drop", 3 if stack == "sqlite" else times)
"""
    whole = run(pytester, "times = 3\n" + source)["T-01"]
    assert run(pytester, "times = 3\n" + source, *SPREAD)["T-01"] == whole
    assert whole["stacks"] == ["postgres-rabbitmq", "sqlite"]
    assert not run(pytester, "times = 2\n" + source, *SPREAD)["T-01"]["acceptance"]


def test_a_worker_that_died_takes_the_whole_report_with_it(pytester: pytest.Pytester) -> None:
    """What failed there is not known any more."""
    with pytest.raises(FileNotFoundError):
        run(pytester, BOTH_STACKS.format(body="stack == 'sqlite' or __import__('os')._exit(1)"), *SPREAD)


def test_the_feature_option_selects_the_tests_of_a_row(pytester: pytest.Pytester) -> None:
    source = "".join(f"@pytest.mark.feature('T-0{n}')\ndef test_{n}(): pass\n" for n in (1, 2))
    report = run(pytester, source + "def test_none(): pass", "--feature", "T-02")
    assert (report["T-01"]["passed"], report["T-02"]["passed"]) == (0, 1)


@pytest.mark.parametrize("mark", ["feature()", "feature(1)", "feature('A-01', accept=True)"])
def test_a_mark_with_a_typing_error_is_refused(pytester: pytest.Pytester, mark: str) -> None:
    pytester.makepyfile(f"import pytest\n@pytest.mark.{mark}\ndef test_it(): pass")
    result = pytester.runpytest_inprocess("-p", "tests.plugins.features")
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def report_of(**changes: Any) -> RowReport:
    base: dict[str, Any] = {
        "passed": 2, "failed": 0, "skipped": 0, "acceptance": True, "scale": 0.1, "stacks": list(STACKS),
    }  # fmt: skip
    return {**base, **changes}  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"passed": 0}, "no test"),
        ({"failed": 1}, "1 failed"),
        ({"acceptance": False}, "the acceptance check was skipped somewhere, or a fault fired too rarely"),
        ({"scale": 0.01}, "scale 0.01 is below 0.02"),
        ({"stacks": ["sqlite"]}, "no acceptance check passed on postgres-rabbitmq"),
    ],
)
def test_a_row_is_open_for_a_reason(changes: dict[str, Any], reason: str) -> None:
    assert open_reason("T-01", report_of(**changes)) == reason


def test_the_table_counts_rows_without_any_test_as_open() -> None:
    lines, open_rows = table({"T-01": report_of()})
    assert open_rows == len(DUE) - 1
    assert any(line.startswith("T-01") and line.endswith("proved") for line in lines)


def test_two_runs_of_different_tests_prove_a_row_together() -> None:
    """A run without an acceptance check of the row (scale 0) takes nothing away; one that failed does."""
    one = report_of(stacks=["sqlite"], scale=1.0)
    other = report_of(stacks=["postgres-rabbitmq"])
    none = report_of(acceptance=False, stacks=[], scale=0.0)
    whole = together([{"T-01": one}, {"T-01": other, "T-02": none}, {"T-01": none}])
    assert whole["T-01"] == report_of(passed=6, stacks=sorted(STACKS))
    assert open_reason("T-01", whole["T-01"]) is None
    assert not whole["T-02"]["acceptance"]
    failed = report_of(failed=1, acceptance=False)
    assert open_reason("T-01", together([{"T-01": one}, {"T-01": failed}])["T-01"]) == "1 failed"


def test_check_fails_while_a_due_row_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(features, "DUE", {"T-01": STACKS})
    path = tmp_path / "features.json"
    path.write_text(json.dumps({"T-01": report_of(failed=1)}))
    assert main([str(path)]) == 0
    assert main([str(path), "--check"]) == 1
    path.write_text(json.dumps({"T-01": report_of()}))
    assert main([str(path), "--check"]) == 0
    assert "1 of 1 due rows proved, 0 open" in capsys.readouterr().out


def test_the_due_table_knows_the_stacks_and_pure() -> None:
    known = {*BROKERS, "pure"}
    assert {stack for stacks in DUE.values() for stack in stacks} <= known
    assert {row for row in DUE if not row.startswith("T-")} >= {"A-01", "I-11", "K-05"}

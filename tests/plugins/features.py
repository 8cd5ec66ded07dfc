"""Counts which rows of features.md are proved: the markers, `--feature`, and `build/features.json`.

A test says `@pytest.mark.feature("A-01")`; the row's acceptance check says `acceptance=True` and, if it is a small
form, by which factor it shrinks counts and durations (`scale=0.1`). The stack a test ran on is its parameter or
fixture `stack`, or `@pytest.mark.stack("sqlite")`; `stack("pure")` says that no stack is touched. A test that injects
faults takes the fixture `faults`, declares them and reports each one that fired.

As a program, `python -m tests.plugins.features [--check] [build/features.json ...]` prints the table of the due rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, TypedDict

import pytest

from tests.features_due import DUE, PURE, STACKS

SCALE_MIN: Final = 0.02
FIRED_MIN: Final = 3


class RowReport(TypedDict):
    """One row as it stands in features.json. `acceptance` is True only if the check passed wherever it ran."""

    passed: int
    failed: int
    skipped: int
    acceptance: bool
    scale: float
    stacks: list[str]


class Faults:
    """What a test injects. Each declared fault must fire, or the row that the test proves stays open."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._declared: list[str] = []

    def declare(self, *names: str) -> None:
        """Name the faults that this test is about, before anything can fire."""
        self._declared += [name for name in names if name not in self._declared]

    def fired(self, name: str, n: int = 1) -> None:
        """Report that a fault fired `n` times more. An undeclared one counts as declared from now on."""
        self.declare(name)
        self.counts[name] += n

    def too_rare(self) -> list[str]:
        """Return the declared faults that fired less often than a row needs, each with its count."""
        return [
            f"{name} fired {self.counts[name]}x" for name in self._declared if self.counts[name] < FIRED_MIN
        ]


@dataclass
class _Acceptance:
    """What the acceptance checks of one row did on one stack."""

    passed: int = 0
    not_passed: int = 0
    scale: float = 1.0

    def add(self, other: _Acceptance) -> None:
        """Add what another check, or the same in another process, did."""
        self.passed += other.passed
        self.not_passed += other.not_passed
        self.scale = min(self.scale, other.scale)


@dataclass
class _Row:
    outcomes: Counter[str] = field(default_factory=Counter)
    acceptance: dict[str, _Acceptance] = field(default_factory=dict)
    rare_faults: list[str] = field(default_factory=list)

    def dump(self) -> dict[str, Any]:
        """Return what was recorded, for `add` in another process."""
        return {
            "outcomes": dict(self.outcomes),  # `asdict` of Python 3.11 spoils a Counter
            "acceptance": {stack: asdict(each) for stack, each in self.acceptance.items()},
            "rare_faults": self.rare_faults,
        }

    def add(self, other: Mapping[str, Any]) -> None:
        """Add what another process has recorded of this row."""
        self.outcomes.update(other["outcomes"])
        self.rare_faults += other["rare_faults"]
        for stack, each in other["acceptance"].items():
            self.acceptance.setdefault(stack, _Acceptance()).add(_Acceptance(**each))

    def report(self, row: str) -> RowReport:
        good = [name for name, each in self.acceptance.items() if each.passed and not each.not_passed]
        everywhere = bool(good) and len(good) == len(self.acceptance) and not self.rare_faults
        return {
            "passed": self.outcomes["passed"],
            "failed": self.outcomes["failed"],
            "skipped": self.outcomes["skipped"],
            "acceptance": everywhere,
            "scale": min((each.scale for each in self.acceptance.values()), default=0.0),
            "stacks": sorted(_spread(row, good)),
        }


class FeaturePlugin:
    """Collects the outcome of every marked test of a run."""

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}
        self.lost_workers = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        item.stash[_OUTCOME] = "passed"
        result = yield
        marks = list(item.iter_markers("feature"))
        if marks:
            self._record(item, marks)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.when == "call" or report.outcome != "passed":
            # A failing teardown after a passed call is a failure; a skip never hides one.
            item.stash[_OUTCOME] = "failed" if item.stash[_OUTCOME] == "failed" else report.outcome
        if report.when == "call":
            item.stash[_STACK] = _stack_in_use(item)
            item.stash[_FAULTS] = _fixture(item, "faults")
        return report

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """In a worker of a spread run: hand over what was recorded."""
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["features"] = json.dumps({row: each.dump() for row, each in self._rows.items()})

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """In the controller of a spread run: take over what a worker has recorded."""
        recorded = getattr(node, "workeroutput", {}).get("features")
        if recorded is None:
            self.lost_workers += 1
            return
        for row, each in json.loads(recorded).items():
            self._rows.setdefault(row, _Row()).add(each)

    def report(self) -> dict[str, RowReport]:
        """Return every due row, and every row that a test names, in order."""
        rows = sorted({*DUE, *self._rows})
        return {row: self._rows.get(row, _Row()).report(row) for row in rows}

    def rare_faults(self) -> list[str]:
        """Return a line for each fault that did not fire often enough."""
        return [f"{row}: {fault}" for row, each in sorted(self._rows.items()) for fault in each.rare_faults]

    def _record(self, item: pytest.Item, marks: Iterable[pytest.Mark]) -> None:
        outcome = item.stash[_OUTCOME]
        stacks = item.stash.get(_STACK, ()) or _stack_in_use(item)
        faults = item.stash.get(_FAULTS, None)
        for mark in marks:
            row = self._rows.setdefault(mark.args[0], _Row())
            row.outcomes[outcome] += 1
            if not mark.kwargs.get("acceptance", False):
                continue
            for stack in stacks:
                good = outcome == "passed"
                one = _Acceptance(int(good), int(not good), float(mark.kwargs.get("scale", 1.0)))
                row.acceptance.setdefault(stack, _Acceptance()).add(one)
            if isinstance(faults, Faults):
                row.rare_faults += [
                    f"{rare} in {item.name}, {FIRED_MIN} needed" for rare in faults.too_rare()
                ]


_OUTCOME: Final = pytest.StashKey[str]()
_STACK: Final = pytest.StashKey[tuple[str, ...]]()
_FAULTS: Final = pytest.StashKey[object]()
_PLUGIN: Final = pytest.StashKey[FeaturePlugin]()


@pytest.fixture
def faults() -> Faults:
    """The faults of this test: `faults.declare("drop")`, then `faults.fired("drop")` each time it happened."""
    return Faults()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("features")
    group.addoption(
        "--feature", action="append", default=[], metavar="A-01", help="run only the tests of this row"
    )
    group.addoption(
        "--features-json", type=Path, metavar="PATH", help="write which rows are proved to this file"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_PLUGIN] = FeaturePlugin()
    config.pluginmanager.register(config.stash[_PLUGIN], "saga-features")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("feature"):
            _check_mark(item, mark)
    wanted = {row for option in config.getoption("feature") for row in option.split(",")}
    if not wanted:
        return
    chosen = [item for item in items if any(mark.args[0] in wanted for mark in item.iter_markers("feature"))]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    plugin, path = config.stash[_PLUGIN], config.getoption("features_json")
    if lines := plugin.rare_faults():
        terminalreporter.section("faults that fired too rarely")
        for line in lines:
            terminalreporter.write_line(line)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if plugin.lost_workers:  # and with them what failed there
        path.unlink(missing_ok=True)
        terminalreporter.write_line(f"features: {plugin.lost_workers} workers died, {path} is not written")
    else:
        path.write_text(json.dumps(plugin.report(), indent=2) + "\n")


def open_reason(row: str, report: RowReport | None) -> str | None:
    """Return why a due row is open, or None if it is proved."""
    if report is None or not any((report["passed"], report["failed"], report["skipped"])):
        return "no test"
    if report["failed"]:
        return f"{report['failed']} failed"
    missing = sorted(_due_stacks(row) - set(report["stacks"]))
    if missing:
        return f"no acceptance check passed on {', '.join(missing)}"
    if not report["acceptance"]:
        return "the acceptance check was skipped somewhere, or a fault fired too rarely"
    if report["scale"] < SCALE_MIN:
        return f"scale {report['scale']:g} is below {SCALE_MIN:g}"
    return None


def table(reports: Mapping[str, RowReport]) -> tuple[list[str], int]:
    """Return the lines of the table of all due rows, and how many of them are open."""
    lines, open_rows = [f"{'row':<6}{'passed':>7}{'failed':>7}{'skipped':>8}{'scale':>7}  state"], 0
    for row in sorted(DUE):
        report = reports.get(row)
        reason = open_reason(row, report)
        open_rows += reason is not None
        counts = report or {"passed": 0, "failed": 0, "skipped": 0, "scale": 0.0}
        lines.append(
            f"{row:<6}{counts['passed']:>7}{counts['failed']:>7}{counts['skipped']:>8}{counts['scale']:>7g}  "
            + ("proved" if reason is None else f"open: {reason}")
        )
    lines.append(f"features: {len(DUE) - open_rows} of {len(DUE)} due rows proved, {open_rows} open")
    return lines, open_rows


def together(runs: Sequence[Mapping[str, RowReport]]) -> dict[str, RowReport]:
    """Return what several runs, each of other tests, have proved of each row."""
    rows = sorted({row for run in runs for row in run})
    return {row: _sum(row, [run[row] for run in runs if row in run]) for row in rows}


def _sum(row: str, reports: Sequence[RowReport]) -> RowReport:
    checked = [report for report in reports if report["scale"]]
    stacks = {stack for report in reports for stack in report["stacks"]}
    return {
        "passed": sum(report["passed"] for report in reports),
        "failed": sum(report["failed"] for report in reports),
        "skipped": sum(report["skipped"] for report in reports),
        "acceptance": bool(checked) and all(report["acceptance"] for report in checked),
        "scale": min((report["scale"] for report in checked), default=0.0),
        "stacks": sorted(_spread(row, stacks)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.plugins.features")
    parser.add_argument("paths", nargs="*", type=Path, default=[Path("build/features.json")])
    parser.add_argument("--check", action="store_true", help="exit with 1 when a due row is open")
    options = parser.parse_args(arguments)
    runs: list[dict[str, RowReport]] = []
    for path in options.paths:
        try:
            runs.append(json.loads(path.read_text()))
        except FileNotFoundError:
            print(f"features: {path} does not exist; `make features` writes it", file=sys.stderr)
            return 2
    lines, open_rows = table(together(runs))
    print("\n".join(lines))
    return 1 if options.check and open_rows else 0


def _due_stacks(row: str) -> set[str]:
    return set(STACKS) if DUE.get(row) == PURE else set(DUE.get(row, STACKS))


def _spread(row: str, stacks: Iterable[str]) -> set[str]:
    """A pure check touches no stack, so where a pure check is due, it holds on every one of them."""
    found = set(stacks)
    if "pure" not in found:
        return found
    return (found - {"pure"}) | set(STACKS) if DUE.get(row, PURE) == PURE else found


def _stack_in_use(item: pytest.Item) -> tuple[str, ...]:
    """Return the stacks that this item counts for: its parameter or fixture `stack`, else its marker."""
    callspec = getattr(item, "callspec", None)
    value = callspec.params.get("stack") if callspec is not None else None
    value = value if value is not None else _fixture(item, "stack")
    if value is not None:
        return (str(getattr(value, "name", value)),)
    return tuple(name for mark in item.iter_markers("stack") for name in mark.args)


def _fixture(item: pytest.Item, name: str) -> Any:
    # After the teardown the attribute is there and holds None.
    return (getattr(item, "funcargs", None) or {}).get(name)


def _check_mark(item: pytest.Item, mark: pytest.Mark) -> None:
    unknown = set(mark.kwargs) - {"acceptance", "scale"}
    if len(mark.args) != 1 or not isinstance(mark.args[0], str) or unknown:
        raise pytest.UsageError(
            f'{item.nodeid}: write @pytest.mark.feature("A-01") or feature("A-01", acceptance=True, scale=0.1)'
        )


if __name__ == "__main__":
    sys.exit(main())

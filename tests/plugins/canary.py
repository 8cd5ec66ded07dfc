"""A word that stands in payloads and secrets of tests, and that nothing may tell: a test fails in whose output it is.

Watched are, in every test of a run, what is logged and what pytest captured of the output, and the logs of the Python
processes that a test starts (see `started/sitecustomize.py`). Our own loggers tell all they have, at DEBUG; with the
fixture `canary` SQLite's driver does too, through which tests, unlike us, also send payloads in the open. What else a
test finds there it shows to `canary.check`. What pytest itself keeps of the log is what it would keep without us:
warnings, or what the test asks `caplog` for.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.plugins.watch import CANARY, DRIVER, Watch

STARTED: Final = Path(__file__).with_name("started")


class Canary(Watch):
    """The watch of a run, in this process and in those that it starts."""

    def __init__(self) -> None:
        super().__init__()
        self.level_before = logging.getLogger().level
        self.folder = Path(tempfile.mkdtemp(prefix="canary-"))

    def check(self, where: str, *shown: Any) -> None:
        """Look for the word in what people would see, by text and by representation."""
        if any(CANARY in text for each in shown for text in (str(each), repr(each))):
            self.found(where)

    def taken(self) -> list[str]:
        """Return where it was found since the last call."""
        hits, self.hits = self.hits, []
        for entry in os.scandir(self.folder):
            told = Path(entry.path)
            hits += [f"{where}, in a process that was started" for where in told.read_text().splitlines()]
            told.unlink()
        return hits


def python_path(*folders: Path) -> str:
    """Return the PYTHONPATH of a process with these folders, watched like all others."""
    return os.pathsep.join(map(str, (*folders, STARTED)))


_CANARY: Final = pytest.StashKey[Canary]()


def watch_of(config: pytest.Config) -> Canary:
    """Return the watch of this run, for a fixture that shows it what a test has left."""
    return config.stash[_CANARY]


@pytest.fixture
def canary(request: pytest.FixtureRequest) -> Iterator[Canary]:
    """The watch of this run, with every logger at DEBUG; the test fails if the word is found anywhere."""
    watch = watch_of(request.config)
    before = watch.records
    logging.getLogger(DRIVER).setLevel(logging.NOTSET)
    yield watch
    logging.getLogger(DRIVER).setLevel(logging.WARNING)
    assert watch.records > before, "something was logged, or nothing was watched"


@pytest.fixture(scope="session", autouse=True)
def watched_processes(pytestconfig: pytest.Config) -> Iterator[None]:
    """Let Python processes that tests start be watched. Not what pytest itself starts to run tests: it has a watch."""
    before = os.environ.get("PYTHONPATH")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CANARY_HITS", str(watch_of(pytestconfig).folder))
        patch.setenv("PYTHONPATH", python_path(*([Path(before)] if before else [])))
        yield


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_CANARY] = Canary()
    root = logging.getLogger()
    root.addHandler(config.stash[_CANARY])
    root.setLevel(logging.DEBUG)
    logging.getLogger(DRIVER).setLevel(logging.WARNING)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Leave what pytest keeps as it was: `caplog` sets its handler's level where a test asks it to."""
    plugin: Any = session.config.pluginmanager.getplugin("logging-plugin")
    for kept in (plugin.caplog_handler, plugin.report_handler):
        kept.setLevel(logging.WARNING)


def pytest_unconfigure(config: pytest.Config) -> None:
    root = logging.getLogger()
    root.removeHandler(config.stash[_CANARY])
    root.setLevel(config.stash[_CANARY].level_before)
    shutil.rmtree(config.stash[_CANARY].folder, ignore_errors=True)


@pytest.hookimpl(wrapper=True, trylast=True)  # innermost, so that whoever counts outcomes sees this one
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    found = item.config.stash[_CANARY].taken()
    found += [
        name for name, content in report.sections if name.endswith(str(report.when)) and CANARY in content
    ]
    if found and report.passed:
        report.outcome = "failed"
        report.longrepr = "the canary, which stands for payloads and secrets, was told in " + "; ".join(
            found[:10]
        )
    return report

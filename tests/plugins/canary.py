"""A word that stands in payloads and secrets of tests, and that nothing may tell: a test fails in whose output it is.

Watched are, in every test of a run, what is logged and what pytest captured of the output. Our own loggers tell all
they have, at DEBUG; with the fixture `canary` SQLite's driver does too, through which tests, unlike us, also send
payloads in the open. What else a test finds there it shows to `canary.check`. What pytest itself keeps of the
log is what it would keep without us: warnings, or what the test asks `caplog` for.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from typing import Any, Final

import pytest

CANARY: Final = "canary-4f1d9c"
DRIVER: Final = "aiosqlite"
"""Tells every call with its arguments, those of a test's own engine too. SQLAlchemy holds its own loggers back."""


class Canary(logging.Handler):
    """Finds the word in log records: message, arguments, `extra` and traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.hits: list[str] = []
        self.records = 0
        self.level_before = logging.getLogger().level

    def emit(self, record: logging.LogRecord) -> None:
        self.records += 1
        told = [record.getMessage(), str(record.__dict__)]
        if record.exc_info:
            told.append(logging.Formatter().formatException(record.exc_info))
        if any(CANARY in each for each in told):
            self.hits.append(f"the log {record.name} at {record.levelname}: {record.msg!r}")

    def check(self, where: str, *shown: Any) -> None:
        """Look for the word in what people would see, by text and by representation."""
        if any(CANARY in text for each in shown for text in (str(each), repr(each))):
            self.hits.append(where)

    def taken(self) -> list[str]:
        """Return where it was found since the last call."""
        hits, self.hits = self.hits, []
        return hits


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

"""A word that stands in payloads and secrets of tests, and that nothing may tell: a test fails in whose output it is.

Watched are, in every test of a run, what is logged and what pytest captured of the output; with the fixture `canary`
every logger tells all it has, at DEBUG. What else a test finds in the open it shows to `canary.check`.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from typing import Any, Final

import pytest

CANARY: Final = "canary-4f1d9c"


class Canary(logging.Handler):
    """Finds the word in log records: message, arguments, `extra` and traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.hits: list[str] = []
        self.records = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.records += 1
        told = [record.getMessage(), *(str(value) for value in record.__dict__.values())]
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


@pytest.fixture
def canary(request: pytest.FixtureRequest) -> Iterator[Canary]:
    """The watch of this run, with every logger at DEBUG; the test fails if the word is found anywhere."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.DEBUG)
    watch = request.config.stash[_CANARY]
    before = watch.records
    yield watch
    root.setLevel(level)
    assert watch.records > before, "something was logged, or nothing was watched"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_CANARY] = Canary()
    logging.getLogger().addHandler(config.stash[_CANARY])


def pytest_unconfigure(config: pytest.Config) -> None:
    logging.getLogger().removeHandler(config.stash[_CANARY])


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

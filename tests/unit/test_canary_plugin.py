"""The watch over the test run: it hears what nobody prints, and pytest keeps what it would keep without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugins.watch import CANARY

ROOT = Path(__file__).parents[2]
TESTS = f"""
import logging, subprocess, sys

log = logging.getLogger("saga.somewhere")

def test_text_at_debug(): log.debug("%s", "{CANARY}")
def test_extra(): log.info("x", extra={{"note": "{CANARY}"}})
def test_traceback():
    try:
        raise ValueError("{CANARY}")
    except ValueError:
        log.debug("x", exc_info=True)
def test_a_process_that_it_starts(capfd):
    code = "import logging; logging.basicConfig(level='INFO'); a = logging.getLogger('a'); "
    done = subprocess.run([sys.executable, "-c", code + "a.debug('%s', '{CANARY}'); a.info('x')"])
    assert done.returncode == 0
    assert capfd.readouterr().err == "INFO:a:x\\n"
def test_a_process_that_configures_nothing_prints_its_warnings(capfd):
    code = "import logging; a = logging.getLogger('a'); a.info('x'); a.warning('y')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert capfd.readouterr().err == "y\\n"
def test_silence(): log.debug("x")
def test_caplog_has_warnings(caplog):
    log.info("no")
    log.warning("yes")
    assert caplog.messages == ["yes"]
def test_caplog_has_what_it_asks_for(caplog):
    caplog.set_level(logging.DEBUG, "saga.somewhere")
    log.debug("yes")
    assert caplog.messages == ["yes"]
"""


def test_a_word_told_anywhere_fails_its_test_and_no_other(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, or the watch of this run would hear it too."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess("-p", "tests.plugins.canary", "-p", "no:randomly")
    result.assert_outcomes(failed=4, passed=4)
    result.stdout.fnmatch_lines(["*was told in the log saga.somewhere at DEBUG*"])
    result.stdout.fnmatch_lines(["*was told in the log a at DEBUG*in a process that was started*"])

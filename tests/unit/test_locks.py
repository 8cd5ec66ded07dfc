"""The two lock files: `make demo` installs the small one, and the big one then comes into the same environment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.stack("pure")


def packages(lock: str) -> set[str]:
    """Return every package of a lock file with its hashes."""
    return set(
        re.findall(r"^\S+==[^\n]*(?:\n +--hash=\S+(?: \\)?)+", (ROOT / lock).read_text(), re.MULTILINE)
    )


def test_what_the_library_needs_is_the_same_in_both() -> None:
    core = packages("requirements-core.lock")
    assert core
    assert core <= packages("requirements.lock"), "run `make lock`"

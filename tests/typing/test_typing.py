"""Row I-07: wrong programs are refused by mypy and by pyright at the lines that are wrong, right ones are accepted.

A case is one file in `refused/`, in which each line that ends with `# error` must be reported by both checkers and no
other line by either; or one in `accepted/`, in which nothing may be reported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Final

import pytest

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
REFUSED: Final = sorted((HERE / "refused").glob("*.py"))
ACCEPTED: Final = sorted((HERE / "accepted").glob("*.py"))
WRONG_LINES_MIN: Final = 60
CHECKERS: Final = ("mypy", "pyright")

pytestmark = [pytest.mark.stack("pure"), pytest.mark.feature("I-07"), pytest.mark.slow]

Reported = dict[str, dict[int, list[str]]]
"""What a checker reports: file name to line to messages."""


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reported]:
    """Each checker's report of the whole folder, from one run."""
    place = tmp_path_factory.mktemp("checkers")
    return {"mypy": _mypy(place), "pyright": _pyright(place)}


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("case", REFUSED, ids=lambda path: path.stem)
def test_a_wrong_program_is_refused_where_it_is_wrong(
    case: Path, checker: str, reported: dict[str, Reported]
) -> None:
    wanted = _marked(case)
    assert wanted, "a refused program marks what is wrong in it"

    found = reported[checker][case.name]

    assert set(found) == wanted, f"{checker} says: {dict(found)}"


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("case", ACCEPTED, ids=lambda path: path.stem)
def test_a_right_program_is_accepted(case: Path, checker: str, reported: dict[str, Reported]) -> None:
    assert reported[checker][case.name] == {}


@pytest.mark.feature("I-07", acceptance=True)
def test_enough_wrong_programs_are_refused_by_both_checkers(reported: dict[str, Reported]) -> None:
    refused = [
        (case.name, line)
        for case in REFUSED
        for line in _marked(case)
        if all(line in reported[checker][case.name] for checker in CHECKERS)
    ]

    assert len(refused) >= WRONG_LINES_MIN


def _marked(case: Path) -> set[int]:
    lines = case.read_text().splitlines()
    return {number for number, line in enumerate(lines, 1) if line.rstrip().endswith("# error")}


def _mypy(place: Path) -> Reported:
    """Run without the pydantic plug-in, which by default lets a model's constructor take anything."""
    output = _run(
        *("mypy", "--strict", "--config-file", os.devnull, "--cache-dir", str(place / "mypy")),
        *("--no-error-summary", "--show-absolute-path", "--no-pretty", "--python-version", "3.11"),
        *map(str, [*REFUSED, *ACCEPTED]),
    )
    found: Reported = defaultdict(lambda: defaultdict(list))
    for line in output.splitlines():
        if match := re.match(r"(.+?):(\d+):(?:\d+:)? error: (.*)", line):
            found[Path(match[1]).name][int(match[2])].append(match[3])
    return found


def _pyright(place: Path) -> Reported:
    config = place / "pyrightconfig.json"
    config.write_text(
        json.dumps(
            {
                "include": [os.path.relpath(HERE / each, place) for each in ("refused", "accepted")],
                "extraPaths": [str(ROOT)],
                "pythonVersion": "3.11",
                "typeCheckingMode": "strict",
                # The programs are excerpts: what they build is not used, what they import may be.
                "reportUnusedFunction": False,
                "reportUnusedExpression": False,
                # Follow-up noise on the very lines that are wrong already.
                "reportUnknownMemberType": False,
                "reportUnknownVariableType": False,
                "reportUnknownArgumentType": False,
            }
        )
    )
    output = _run("pyright", "--outputjson", "--pythonpath", sys.executable, "--project", str(config))
    found: Reported = defaultdict(lambda: defaultdict(list))
    for each in json.loads(output)["generalDiagnostics"]:
        if each["severity"] == "error":
            line = each["range"]["start"]["line"] + 1
            found[Path(each["file"]).name][line].append(each["message"])
    return found


def _run(program: str, *arguments: str) -> str:
    environment = {**os.environ, "MYPYPATH": str(ROOT), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", program, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in (0, 1), f"{program} broke: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout

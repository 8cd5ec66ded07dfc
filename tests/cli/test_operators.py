"""Every operators' command in both forms against its golden file; `UPDATE_GOLDEN=1` writes them anew."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from pathlib import Path
from typing import Final

import pytest
from typer.testing import CliRunner

from saga.cli import build, operate
from saga.cli.output import visible
from tests.cli import shop

GOLDEN: Final = Path(__file__).parent / "golden"
UUIDS: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TIMES: Final = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?(\+00:00)?")
LINES: Final = re.compile(r"(cli/shop\.py):\d+")
WAITS: Final = re.compile(r'("retry_ms": )\d+')
AGES: Final = re.compile(r"(oldest_seconds\W+|oldest for )[\d.]+")

pytestmark = pytest.mark.stack("sqlite")

WHY = ("--reason", "ticket 4711", "--actor", "anna", "--yes")
COMMANDS: Final[dict[str, tuple[int, tuple[str, ...]]]] = {
    "list": (0, ("list",)),
    "list-filtered": (0, ("list", "--state", "compensated", "--id-prefix", "po", "--saga", "purchase")),
    "list-page": (0, ("list", "--limit", "2")),
    "list-step": (0, ("list", "--step", "charge")),
    "show-completed": (0, ("show", "good")),
    "show-compensated": (0, ("show", "poor")),
    "show-needs-attention": (0, ("show", "stuck")),
    "show-waiting": (0, ("show", "busy")),
    "show-payloads": (0, ("show", "stuck", "--payloads")),
    "show-nothing": (1, ("show", "nobody")),
    "incidents": (0, ("incidents",)),
    "dead-letters-list": (0, ("dead-letters", "list")),
    "dead-letters-redrive": (1, ("dead-letters", "redrive", "--all", "--yes")),  # no queue in this process
    "outbox": (0, ("outbox",)),
    "start": (0, ("start", "purchase", '{"item":"pen"}', "--id", "new")),
    "start-again": (0, ("start", "purchase", '{"item":"book","trouble":""}', "--id", "good")),
    "start-refused": (1, ("start", "purchase", '{"item":4711}', "--id", "bad")),
    "cancel": (0, ("cancel", "busy", *WHY)),
    "cancel-past-pivot": (0, ("cancel", "good", *WHY)),
    "retry": (0, ("retry", "stuck", *WHY)),
    "retry-not-allowed": (1, ("retry", "good", *WHY)),
    "mark-done": (0, ("mark-done", "stuck", "--evidence", "statement 17", "--actor", "anna", "--yes")),
    "skip": (0, ("skip", "stuck", *WHY)),
    "skip-preview": (0, ("skip", "--all", "--state", "needs_attention", "--preview")),
    "terminate": (0, ("terminate", "busy", "--force", *WHY)),
    "terminate-unforced": (1, ("terminate", "busy", *WHY)),
    "abandon": (0, ("abandon", "stuck", *WHY)),
    "abandon-many": (1, ("abandon", "--all", "--saga", "purchase", *WHY)),
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shop") / "shop.db"
    asyncio.run(shop.fill(f"sqlite:///{path}"))
    return path


@pytest.fixture
def database(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy, so that no command sees what another did."""
    path = tmp_path / "shop.db"
    shutil.copy(filled, path)
    monkeypatch.setattr(operate, "SETTLE_SECONDS", 0.0)
    monkeypatch.setenv("SHOP_DATABASE", f"sqlite:///{path}")
    monkeypatch.setenv("SAGA_APP", "tests.cli.shop:app")
    return str(path)


def run(*arguments: str, input: str | None = None) -> tuple[int, str]:
    """Return exit status and everything printed."""
    result = CliRunner().invoke(build(), list(arguments), input=input)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def stable(text: str) -> str:
    """Return the text without what differs from run to run."""
    text = UUIDS.sub("<uuid>", text)
    text = TIMES.sub("<time>", text)
    text = LINES.sub(r"\1:<line>", text)
    text = WAITS.sub(r"\1<ms>", text)
    return AGES.sub(r"\1<age>", text)


@pytest.mark.feature("H-01", acceptance=True)
@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_its_golden_file(database: str, name: str, form: str) -> None:
    status, arguments = COMMANDS[name]
    got_status, got = run(*arguments, *(["--json"] if form == "json" else []))
    golden = GOLDEN / f"{name}.{form}"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(stable(got))
    assert stable(got) == golden.read_text()
    assert got_status == status
    if form == "json":
        json.loads(got)
    assert "canary" not in got, "no payload without --payloads"
    assert "\x1b" not in got
    assert "\x07" not in got


@pytest.mark.feature("L-11")
def test_what_a_failure_said_is_shown_only_when_asked(database: str) -> None:
    """L-11: the text of an exception counts as payload; class, file and line stand everywhere else."""
    for form in ((), ("--json",)):
        without = run("show", "busy", *form)[1]
        assert "canary-payload" not in without
        assert "canary-payload" in run("show", "busy", "--payloads", *form)[1]
    assert "RuntimeError at cli/shop.py:" in run("show", "busy", "--json")[1]


@pytest.mark.feature("H-01")
def test_a_dead_letter_shows_its_body_only_when_asked_and_inert(database: str) -> None:
    [letter] = json.loads(run("dead-letters", "list", "--json")[1])["dead_letters"]
    status, without = run("dead-letters", "show", letter["id"])
    assert (status, "\nbody:" in without) == (0, False)
    assert re.search(r"\ndetail: +body: json_invalid", without), "what is wrong with it, and where"
    status, with_body = run("dead-letters", "show", letter["id"], "--payloads")
    assert (status, "red\\x1b[31m\\x07" in with_body) == (0, True)


@pytest.mark.feature("H-01")
@pytest.mark.parametrize("verb", ["cancel", "mark-done", "skip", "terminate", "abandon"])
def test_a_destructive_verb_asks_and_no_is_no(database: str, verb: str) -> None:
    id, more = ("busy", ["--force"]) if verb == "terminate" else ("stuck", [])
    if verb == "cancel":
        id = "busy"
    before = run("list", "--json")[1]
    status, printed = run(verb, id, "--reason", "test", *more, input="n\n")
    assert (status, f"{verb} purchase {id}?" in printed) == (1, True)
    assert run("list", "--json")[1] == before


@pytest.mark.feature("H-01")
@pytest.mark.parametrize(
    "arguments",
    [("cancel",), ("cancel", "busy", "--all"), ("retry", "busy", "--force"), ("list", "--below", "no-uuid")],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(database: str, arguments: tuple[str, ...]) -> None:
    assert run(*arguments)[0] == 2


@pytest.mark.feature("H-01")
@pytest.mark.parametrize(
    ("arguments", "status", "code", "kind"),
    [
        (("list", "--nothing"), 2, "usage", "NoSuchOption"),
        (("nothing",), 2, "usage", "UsageError"),
        (("list", "--below", "no-uuid"), 2, "usage", "BadParameter"),
        (("list", "--app", "no_module:app"), 2, "usage", "BadParameter"),
        (("start", "purchase", "@no-file"), 2, "usage", "BadParameter"),
        (("show", "nobody"), 1, "SG307", "SagaNotFound"),
        (("start", "nothing", "{}"), 1, "SG104", "UnknownSaga"),
        (("db", "check", "--database", "oracle://u:canary@h/x"), 2, "SG201", "ConfigurationError"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else None,
)
def test_with_json_a_failure_is_one_object_on_standard_error(
    database: str, arguments: tuple[str, ...], status: int, code: str, kind: str
) -> None:
    result = CliRunner().invoke(build(), [*arguments, "--json"])
    error = json.loads(result.stderr)["error"]
    assert (result.exit_code, result.stdout) == (status, "")
    assert (error["code"], error["class"]) == (code, kind)
    assert error["text"]
    assert "canary" not in result.stderr


@pytest.mark.feature("H-01")
def test_a_verb_that_is_not_confirmed_says_so_in_json_too(database: str) -> None:
    result = CliRunner().invoke(build(), ["abandon", "stuck", "--reason", "test", "--json"], input="n\n")
    question, _, document = result.stderr.partition("{")
    assert (result.exit_code, "abandon purchase stuck?" in question) == (1, True)
    assert json.loads("{" + document)["error"]["code"] == "aborted"


@pytest.mark.feature("H-01")
def test_a_page_names_the_next_one(database: str) -> None:
    seen: list[str] = []
    below: list[str] = []
    while True:
        page = json.loads(run("list", "--limit", "2", "--json", *below)[1])
        seen += [each["id"] for each in page["instances"]]
        if page["next"] is None:
            break
        below = ["--below", page["next"]]
    assert seen == [shop.ESCAPES, "busy", "stuck", "poor", "good"]


@pytest.mark.feature("H-01")
def test_input_comes_from_a_file_or_from_standard_input(database: str, tmp_path: Path) -> None:
    (tmp_path / "order.json").write_text('{"item":"ink"}')
    assert run("start", "purchase", f"@{tmp_path}/order.json", "--id", "f")[0] == 0
    assert run("start", "purchase", "-", "--id", "f", input='{"item":"ink"}')[0] == 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 漢", "plain ü 漢"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\u202eevil", "\\u202eevil"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_could_act_in_a_terminal_is_made_visible(text: str, shown: str) -> None:
    assert visible(text) == shown

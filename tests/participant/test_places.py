"""L-11: for an exception's text stands where it was raised, in the code of those who can mend it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saga.errors import PayloadInvalid
from saga.participant.places import place
from saga.payloads import codec
from tests.participant.harness import Rig, limited, make_command

pytestmark = [pytest.mark.feature("L-11"), pytest.mark.stack("pure")]

LINES = Path(__file__).read_text().splitlines()


def line_of(mark: str) -> str:
    (number,) = [n for n, line in enumerate(LINES, 1) if line.endswith(f"# {mark}")]
    return f"participant/test_places.py:{number}"


def helper() -> None:
    raise KeyError("x")  # in a helper


def calls_helper() -> None:
    helper()


def calls_a_library() -> None:
    json.loads("{")  # calls a library


def calls_ours() -> None:
    codec(int, what="x").decode(b"{")  # calls ours


def chained() -> None:
    try:
        helper()
    except KeyError as error:
        raise ValueError from error  # raised from another


def group() -> None:
    raise ExceptionGroup("g", [ValueError("a")])  # a group


@pytest.mark.parametrize(
    ("act", "mark"),
    [
        (calls_helper, "in a helper"),
        (calls_a_library, "calls a library"),
        (calls_ours, "calls ours"),
        (chained, "raised from another"),
        (group, "a group"),
    ],
)
def test_the_place_is_the_innermost_line_of_the_handlers_own_package(
    act: Callable[[], Any], mark: str
) -> None:
    with pytest.raises(Exception) as caught:
        act()
    assert place(caught.value) == line_of(mark)


def test_an_exception_that_was_never_raised_has_no_place() -> None:
    assert place(ValueError("x")) == ""


async def test_a_failed_reply_names_class_code_and_place_beside_its_texts(stateless: Rig) -> None:
    participant = limited()

    @participant.activity(no_compensation="test")
    async def act(text: str) -> None:
        raise PayloadInvalid("the text")  # in a handler

    await stateless.start(participant)
    (reply,) = await stateless.ask(make_command("act", data=b'"x"'))

    said = {key: reply.data[key] for key in ("error", "code", "at")}
    assert said == {"error": "PayloadInvalid", "code": "SG302", "at": line_of("in a handler")}
    assert "the text" not in str(said)

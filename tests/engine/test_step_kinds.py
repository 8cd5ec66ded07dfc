"""Row A-11: which kinds of steps may stand where, against an oracle that knows only a regular expression."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

import pytest
from pydantic import BaseModel

from saga.compensation.kinds import StepKind, StepShape, check_kinds
from saga.definition.activity import Activity, Participant
from saga.definition.builder import Saga
from saga.errors import DefinitionError

pytestmark = pytest.mark.stack("pure")

SEED: Final = 20260714


class Order(BaseModel):
    number: str


def random_step(draw: random.Random) -> StepShape:
    kind = draw.choice([*StepKind, StepKind.COMPENSATABLE])
    undoable = draw.random() < (0.7 if kind is StepKind.COMPENSATABLE else 0.05)
    reason = "reversed by hand" if draw.random() < (0.1 if undoable else 0.3) else None
    return StepShape(f"s{draw.randrange(10**9)}", kind, undoable, reason)


def oracle(steps: list[StepShape]) -> bool:
    """Backward part, at most one pivot with a forward part behind it; no step both undone and excused."""
    letters = []
    for step in steps:
        if step.has_compensation and step.no_compensation:
            letters.append("!")
        elif step.kind is StepKind.COMPENSATABLE:
            letters.append("c" if step.has_compensation or step.no_compensation else "!")
        else:
            letters.append({"pivot": "p", "retriable": "r", "read_only": "o"}[step.kind.value])
    return re.fullmatch("[co]*(p[ro]*)?", "".join(letters)) is not None


@pytest.mark.feature("A-11", acceptance=True, scale=1.0)
def test_the_checker_agrees_with_an_oracle_on_10_000_random_step_lists() -> None:
    draw = random.Random(SEED)
    verdicts = {True: 0, False: 0}
    for _ in range(10_000):
        steps = [random_step(draw) for _ in range(draw.choice([1, 1, 2, 2, 3, 4, 6]))]
        allowed = oracle(steps)
        assert (check_kinds(steps) is None) is allowed, steps
        verdicts[allowed] += 1
    assert min(verdicts.values()) > 1_000, "a one-sided draw would prove nothing"


@pytest.mark.feature("A-11")
def test_registration_agrees_with_the_oracle_too() -> None:
    draw = random.Random(SEED)
    verdicts = {True: 0, False: 0}
    for _ in range(1_000):
        letters = draw.choices("CCNXOPR", k=draw.randrange(1, 5))
        steps = [_activity(letter) for letter in letters]
        shapes = [
            StepShape(activity.name, activity.kind, activity.has_compensation, activity.no_compensation)
            for activity in steps
        ]
        allowed = oracle(shapes)
        verdicts[allowed] += 1
        assert (_advice_against(steps) is None) is allowed, letters
    assert min(verdicts.values()) > 100


def _advice_against(steps: Sequence[Activity[Order, Order, ...]]) -> str | None:
    """Register a saga of these steps; return the advice if it is refused."""
    saga = Saga("orders", Order)
    try:
        for index, activity in enumerate(steps):
            saga = saga.step(activity, name=f"s{index}")
        saga.compile()
    except DefinitionError as error:
        return error.text
    return None


_shop: Final = Participant("shop", start_to_close=timedelta(seconds=5))
_known: Final[dict[str, Activity[Order, Order, ...]]] = {}


def _activity(letter: str) -> Activity[Order, Order, ...]:
    kinds = {"P": StepKind.PIVOT, "R": StepKind.RETRIABLE, "O": StepKind.READ_ONLY}
    if letter not in _known:
        _known[letter] = _shop.contract(
            f"do_{letter}",
            Order,
            Order,
            compensated=letter == "C",
            kind=kinds.get(letter, StepKind.COMPENSATABLE),
            no_compensation="nothing to undo" if letter == "N" else None,
        )
    return _known[letter]


@pytest.mark.feature("A-11")
@pytest.mark.parametrize(
    ("letters", "says"),
    [
        ("PP", "second pivot"),
        ("RP", "before the pivot"),
        ("PC", "after the pivot"),
        ("X", "has no compensation"),
    ],
)
def test_a_refusal_names_the_step_and_the_remedy(letters: str, says: str) -> None:
    advice = _advice_against([_activity(letter) for letter in letters])

    assert advice is not None
    assert says in advice
    assert "'s" in advice

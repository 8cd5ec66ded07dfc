"""References: what a path can reach, what fits where, and that nothing can be computed from one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any, Literal, NewType

import pytest
from pydantic import BaseModel, Field, RootModel

from saga.definition.activity import Participant
from saga.definition.refs import SAGA_INPUT, Ref, check, evaluate, make, sources, to_data
from saga.errors import DefinitionError

pytestmark = [pytest.mark.stack("pure"), pytest.mark.feature("A-02")]


class Colour(StrEnum):
    RED = "red"


Number = NewType("Number", int)


class Inner(BaseModel):
    text: str
    count: Annotated[int, Field(gt=0)]


@dataclass
class Plain:
    inner: Inner
    size: int = 3


class Names(RootModel[list[str]]):
    pass


class Output(BaseModel):
    inner: Inner
    plain: Plain
    names: Names
    maybe: str | None
    colour: Colour
    word: Literal["a", "b"]
    number: Number
    whole: int
    yes: bool


act: Any = Participant("p", start_to_close=timedelta(seconds=1)).contract("act", type(None), Output)
TYPES = {SAGA_INPUT: Inner, "act": Output}


def test_a_path_goes_through_models_and_dataclasses() -> None:
    ref = act.out.plain.inner.count

    assert repr(ref) == "act.out.plain.inner.count"
    assert repr(act.at("second").out.whole) == "act.at('second').out.whole"
    assert evaluate(ref, {"act": {"plain": {"inner": {"count": 7}}}}) == 7
    assert to_data(ref) == {"ref": ["act", "plain", "inner", "count"]}
    assert sources(ref) == {"act"}


@pytest.mark.parametrize(
    "path",
    [
        lambda: act.out.nonsense,
        lambda: act.out.inner.nonsense,
        lambda: act.out.whole.real,
        lambda: act.out.maybe.upper,
        lambda: act.out.names.root,
        lambda: act.out.model_dump,
    ],
)
def test_a_wrong_path_is_refused_where_it_is_written(path: Callable[[], Any]) -> None:
    with pytest.raises(DefinitionError) as caught:
        path()

    assert "without a field" in caught.value.text


@pytest.mark.parametrize(
    "compute",
    [
        lambda ref: f"{ref}",
        lambda ref: str(ref),
        lambda ref: ref + 1,
        lambda ref: 1 + ref,
        lambda ref: ref == 1,
        lambda ref: ref > 1,
        lambda ref: bool(ref),
        lambda ref: list(ref),
        lambda ref: ref[0],
        lambda ref: ref(),
        lambda ref: ref % 2,
        lambda ref: 1 in ref,
    ],
)
def test_nothing_can_be_computed_from_a_reference(compute: Callable[[Any], Any]) -> None:
    """Else its text, or the comparison of two objects, would quietly become a constant."""
    with pytest.raises(DefinitionError) as caught:
        compute(act.out.whole)

    assert "act.out.whole stands for a value" in caught.value.text


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (lambda: act.out.whole, int),
        (lambda: act.out.whole, float),
        (lambda: act.out.whole, int | None),
        (lambda: act.out.whole, Annotated[int, Field(gt=3)]),
        (lambda: act.out.maybe, str | None),
        (lambda: act.out.maybe, str | int | None),
        (lambda: act.out.colour, str),
        (lambda: act.out.word, str),
        (lambda: act.out.word, Literal["a", "b", "c"]),
        (lambda: act.out.number, int),
        (lambda: act.out.inner, Inner),
        (lambda: act.out.inner, Any),
        (lambda: make(Inner, text="x", count=1), Inner),
        (lambda: make(Plain, inner=act.out.inner), Plain),
        (lambda: make(Inner, text=act.out.colour, count=act.out.whole), Inner),
    ],
)
def test_what_fits(given: Callable[[], Any], wanted: Any) -> None:
    check(given(), wanted, TYPES, what="x")


class Wider(Inner):
    more: str


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (lambda: act.out.whole, str),
        (lambda: act.out.maybe, str),
        (lambda: act.out.yes, int),
        (lambda: act.out.word, Literal["a"]),
        (lambda: act.out.inner, Wider),
        (lambda: act.out, Inner),
        (lambda: Ref("nowhere", (), int), int),
        (lambda: make(Inner, text="x", count=0), Inner),
        (lambda: make(Inner, text="x", count="1"), Inner),
        (lambda: make(Inner, text="x"), Inner),  # type: ignore[call-arg]
        (lambda: make(Plain, size=1), Plain),  # type: ignore[call-arg]
        (lambda: make(Inner, text="x", count=1, more="y"), Inner),
        (lambda: make(Inner, text=act.out.whole, count=1), Inner),
    ],
)
def test_what_does_not_fit(given: Callable[[], Any], wanted: Any) -> None:
    with pytest.raises(DefinitionError):
        check(given(), wanted, TYPES, what="x")


def test_a_subclass_does_not_fit_its_base() -> None:
    """PYD-5: its further fields would be refused where the value is read; payload types are final."""
    with pytest.raises(DefinitionError):
        check(Ref("w", (), Wider), Inner, {"w": Wider}, what="x")


def test_the_type_counts_that_the_source_has_not_the_one_the_reference_brought() -> None:
    """A reference taken from another saga's input names a field that may be of another type here."""
    with pytest.raises(DefinitionError):
        check(Ref(SAGA_INPUT, ("text",), int), int, TYPES, what="x")


def test_a_constant_is_kept_as_it_was_when_it_was_written() -> None:
    names = ["a"]
    made: Any = make(Names, root=names)
    names.append("b")

    assert evaluate(made, {}) == {"root": ["a"]}


def test_a_constant_that_is_no_json_value_is_refused() -> None:
    with pytest.raises(DefinitionError) as caught:
        make(Inner, text=object(), count=1)

    assert "neither a reference nor a JSON value" in caught.value.text


def test_a_reference_inside_another_value_is_refused() -> None:
    with pytest.raises(DefinitionError) as caught:
        make(Names, root=[act.out.maybe])

    assert "not inside other values" in caught.value.text


def test_fields_are_named() -> None:
    with pytest.raises(DefinitionError, match="SG101"):
        make(Plain, Inner(text="x", count=1))

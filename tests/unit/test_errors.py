"""What an error shows: `str()` holds class, code, saga and step only; texts are attributes; codes are stable."""

from __future__ import annotations

import traceback
from datetime import timedelta

import pytest

import saga
from saga import errors
from saga.errors import PayloadInvalid, SagaCompensated, SagaError, StartConflict
from saga.outcomes import Refused, RetryAfter

pytestmark = pytest.mark.stack("pure")

SECRET = "4111-1111-1111-1111"


def all_errors() -> list[type[SagaError]]:
    found, todo = [], [SagaError]
    while todo:
        each = todo.pop()
        found.append(each)
        todo += each.__subclasses__()
    return [each for each in found if each.__module__.startswith("saga.")]


def test_an_error_shows_class_code_saga_and_step_only() -> None:
    error = PayloadInvalid(f"The input is {SECRET}.", saga="transfer", step="withdraw", saga_id=SECRET)

    assert str(error) == "PayloadInvalid [SG302] saga=transfer step=withdraw"
    assert str(StartConflict()) == "StartConflict [SG303]"
    assert (error.text, error.saga_id) == (f"The input is {SECRET}.", SECRET)


def test_what_a_business_said_is_never_in_the_text_of_an_error() -> None:
    for error in (
        Refused(SECRET, {"card": SECRET}),
        SagaCompensated(saga="transfer", reason=SECRET, details=SECRET, undone=(SECRET,)),
        RetryAfter(timedelta(seconds=1)),
    ):
        shown = "".join(traceback.format_exception(error))
        assert SECRET not in shown
        assert SECRET not in repr(error)


def test_our_own_advice_is_shown_in_a_traceback() -> None:
    error = StartConflict("Use another id.", saga="transfer")

    assert "Use another id." in "".join(traceback.format_exception(error))


def test_without_a_text_the_advice_is_the_first_line_of_the_docstring() -> None:
    assert StartConflict().text == "This id was started before with another input."
    assert all((each.__doc__ or "").strip() for each in all_errors())


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [each.code for each in all_errors()]

    assert len(codes) == len(set(codes))
    assert all(code.startswith("SG") and len(code) == 5 for code in codes)


def test_codes_are_stable() -> None:
    """Operators and dashboards match on them; a code may be added, never moved."""
    known = {
        "DefinitionError": "SG101",
        "DefinitionChanged": "SG103",
        "UnknownSaga": "SG104",
        "MissingCapability": "SG203",
        "SchemaMismatch": "SG204",
        "InsecureLink": "SG207",
        "PayloadTooLarge": "SG301",
        "PayloadInvalid": "SG302",
        "StartConflict": "SG303",
        "SagaNotFound": "SG307",
        "PastPivot": "SG308",
        "ResultTimeout": "SG312",
        "SagaCompensated": "SG401",
        "Refused": "SG402",
        "RetryAfter": "SG403",
        "StorageUnavailable": "SG501",
        "BrokerUnavailable": "SG503",
        "MessageInvalid": "SG505",
    }

    assert {each.__name__: each.code for each in all_errors() if each.__name__ in known} == known


def test_every_error_is_a_public_name() -> None:
    ours = {each.__name__ for each in all_errors() if each.__module__ == errors.__name__}

    assert ours <= set(saga.__all__)

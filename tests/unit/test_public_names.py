"""The public names: nothing is exported by accident, nothing disappears unnoticed."""

from __future__ import annotations

import pytest

import saga

pytestmark = [pytest.mark.stack("pure"), pytest.mark.feature("I-07")]

# Adding a name is one line here and a line in CHANGELOG.md; removing one needs a deprecation first.
NAMES = (
    "COMPENSATABLE",
    "PIVOT",
    "READ_ONLY",
    "RETRIABLE",
    "Activity",
    "ActivityContext",
    "App",
    "Client",
    "Description",
    "EventContext",
    "Filter",
    "Handle",
    "InDoubt",
    "Inbox",
    "Inquiry",
    "Participant",
    "Refused",
    "Result",
    "RetryAfter",
    "RetryPolicy",
    "Saga",
    "StepKind",
    "arguments",
    "make",
    "AlreadyClosed",
    "AlreadyOpen",
    "BrokerFull",
    "BrokerUnavailable",
    "ConfigurationError",
    "DeadLetterNotFound",
    "DefinitionChanged",
    "DefinitionError",
    "DuplicateActivity",
    "InsecureLink",
    "MessageInvalid",
    "MissingCapability",
    "MissingExtra",
    "PastCompensation",
    "PastPivot",
    "PayloadInvalid",
    "PayloadTooLarge",
    "ResultTimeout",
    "ReasonRequired",
    "SagaAbandoned",
    "SagaCompensated",
    "SagaEnded",
    "SagaError",
    "SagaNotFound",
    "SchemaMismatch",
    "SessionIsManaged",
    "SagaTerminated",
    "SeveralFound",
    "StartConflict",
    "StorageBusy",
    "StorageUnavailable",
    "SyncClient",
    "TopologyMismatch",
    "UnknownSaga",
    "UnsupportedDatabase",
    "VerbNotAllowed",
    "WouldDeadlock",
    "WrongDatabase",
)


def test_the_public_names_are_these() -> None:
    assert sorted(saga.__all__) == sorted(NAMES)
    assert len(set(saga.__all__)) == len(saga.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(saga, name)

    assert value.__doc__

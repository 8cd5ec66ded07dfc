"""Sagas and distributed transactions over message queues: the public names."""

from typing import Final

from saga.app import App
from saga.client import Client, Description, Handle
from saga.compensation.kinds import StepKind
from saga.definition.activity import Activity, Participant
from saga.definition.builder import Saga
from saga.definition.refs import arguments, make
from saga.errors import (
    AlreadyClosed,
    AlreadyOpen,
    BrokerFull,
    BrokerUnavailable,
    ConfigurationError,
    DefinitionChanged,
    DefinitionError,
    DuplicateActivity,
    MessageInvalid,
    MissingCapability,
    MissingExtra,
    PastCompensation,
    PastPivot,
    PayloadInvalid,
    PayloadTooLarge,
    ResultTimeout,
    SagaCompensated,
    SagaEnded,
    SagaError,
    SagaNotFound,
    SchemaMismatch,
    SessionIsManaged,
    StartConflict,
    StorageBusy,
    StorageUnavailable,
    TopologyMismatch,
    UnknownSaga,
    UnsupportedDatabase,
    WouldDeadlock,
    WrongDatabase,
)
from saga.outcomes import ActivityContext, Refused, Result, RetryAfter
from saga.retry import RetryPolicy

COMPENSATABLE: Final = StepKind.COMPENSATABLE
PIVOT: Final = StepKind.PIVOT
RETRIABLE: Final = StepKind.RETRIABLE
READ_ONLY: Final = StepKind.READ_ONLY

__all__ = [
    "COMPENSATABLE",
    "PIVOT",
    "READ_ONLY",
    "RETRIABLE",
    "Activity",
    "ActivityContext",
    "AlreadyClosed",
    "AlreadyOpen",
    "App",
    "BrokerFull",
    "BrokerUnavailable",
    "Client",
    "ConfigurationError",
    "DefinitionChanged",
    "DefinitionError",
    "Description",
    "DuplicateActivity",
    "Handle",
    "MessageInvalid",
    "MissingCapability",
    "MissingExtra",
    "Participant",
    "PastCompensation",
    "PastPivot",
    "PayloadInvalid",
    "PayloadTooLarge",
    "Refused",
    "Result",
    "ResultTimeout",
    "RetryAfter",
    "RetryPolicy",
    "Saga",
    "SagaCompensated",
    "SagaEnded",
    "SagaError",
    "SagaNotFound",
    "SchemaMismatch",
    "SessionIsManaged",
    "StartConflict",
    "StepKind",
    "StorageBusy",
    "StorageUnavailable",
    "TopologyMismatch",
    "UnknownSaga",
    "UnsupportedDatabase",
    "WouldDeadlock",
    "WrongDatabase",
    "arguments",
    "make",
]

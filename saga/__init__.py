"""Sagas and distributed transactions over message queues: the public names."""

from typing import Final

from saga.app import App
from saga.blocking import SyncClient
from saga.client import Client, Handle
from saga.compensation.kinds import InDoubt, StepKind
from saga.definition.activity import Activity, Participant
from saga.definition.builder import Saga
from saga.definition.inbox import Inbox
from saga.definition.refs import arguments, make
from saga.errors import (
    AlreadyClosed,
    AlreadyOpen,
    BrokerFull,
    BrokerUnavailable,
    ConfigurationError,
    DeadLetterNotFound,
    DefinitionChanged,
    DefinitionError,
    DuplicateActivity,
    InsecureLink,
    MessageInvalid,
    MissingCapability,
    MissingExtra,
    PastCompensation,
    PastPivot,
    PayloadInvalid,
    PayloadTooLarge,
    ReasonRequired,
    ResultTimeout,
    SagaAbandoned,
    SagaCompensated,
    SagaEnded,
    SagaError,
    SagaNotFound,
    SagaTerminated,
    SchemaMismatch,
    SessionIsManaged,
    SeveralFound,
    StartConflict,
    StorageBusy,
    StorageUnavailable,
    TopologyMismatch,
    UnknownSaga,
    UnsupportedDatabase,
    VerbNotAllowed,
    WouldDeadlock,
    WrongDatabase,
)
from saga.outcomes import ActivityContext, EventContext, Inquiry, Refused, Result, RetryAfter
from saga.retry import RetryPolicy
from saga.storage.base import Filter
from saga.views import Description

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
    "DeadLetterNotFound",
    "DefinitionChanged",
    "DefinitionError",
    "Description",
    "DuplicateActivity",
    "EventContext",
    "Filter",
    "Handle",
    "InDoubt",
    "Inbox",
    "Inquiry",
    "InsecureLink",
    "MessageInvalid",
    "MissingCapability",
    "MissingExtra",
    "Participant",
    "PastCompensation",
    "PastPivot",
    "PayloadInvalid",
    "PayloadTooLarge",
    "ReasonRequired",
    "Refused",
    "Result",
    "ResultTimeout",
    "RetryAfter",
    "RetryPolicy",
    "Saga",
    "SagaAbandoned",
    "SagaCompensated",
    "SagaEnded",
    "SagaError",
    "SagaNotFound",
    "SagaTerminated",
    "SchemaMismatch",
    "SessionIsManaged",
    "SeveralFound",
    "StartConflict",
    "StepKind",
    "StorageBusy",
    "StorageUnavailable",
    "SyncClient",
    "TopologyMismatch",
    "UnknownSaga",
    "UnsupportedDatabase",
    "VerbNotAllowed",
    "WouldDeadlock",
    "WrongDatabase",
    "arguments",
    "make",
]

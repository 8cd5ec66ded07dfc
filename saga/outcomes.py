"""What a handler may say: a result with undo data, a refusal, or when to try again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Generic, TypeVar

from saga.errors import SagaError

O = TypeVar("O")  # noqa: E741 - O for output, beside I for input
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Result(Generic[O, U]):
    """An activity's output together with data that only its own compensation will see."""

    output: O
    undo: U


class Refused(SagaError):
    """The business says no: no retry, and the saga compensates.

    Raised by a handler; a batch handler returns it in the place of the item's output. `reason` is a short code that
    callers may branch on; `details` is any JSON value. Neither is ever logged by the library.
    """

    code = "SG402"

    def __init__(self, reason: str, details: Any = None) -> None:
        super().__init__()
        self.reason = reason
        self.details = details


class RetryAfter(SagaError):
    """Try this step again, not before `delay`. Counts as a failed attempt."""

    code = "SG403"

    def __init__(self, delay: timedelta) -> None:
        super().__init__()
        self.delay = delay


class Inquiry(StrEnum):
    """What an inquiry found out; an activity's output, where it has one, says that it is done (row D-11)."""

    DONE = "done"
    """It has run; for activities without output."""
    NOT_DONE = "not_done"
    """It has not, as far as the other side knows: an attempt that is still on its way is told as a late effect."""
    UNKNOWN = "unknown"
    """Still nobody can tell: asked again later."""


@dataclass(frozen=True, slots=True)
class ActivityContext:
    """What a handler may know of the command it serves."""

    operation_key: str
    """The command id: the same on every retry and copy, to be passed to external systems as idempotency key (P2)."""
    namespace: str
    saga: str
    saga_id: str
    run_id: str
    step: str
    attempt: int
    """1 for the first try; for logs, never for keys."""
    forward_key: str
    """In an undo: the operation key of the action that it undoes. Elsewhere the same as `operation_key`."""


@dataclass(frozen=True, slots=True)
class EventContext:
    """What a consumer may know of its event: the CloudEvents attributes, and where it came from."""

    id: str
    """The same on every copy; what an effect outside the database is to be known by."""
    source: str
    type: str
    topic: str
    subject: str | None
    """The publisher's ordering key, where it gave one."""
    time: datetime | None
    """When the publisher says that it happened; aware."""
    attempt: int
    """1 for the first try; for logs, never for keys."""
    attributes: Mapping[str, str]
    """The publisher's own extension attributes; numbers and truth values as JSON has them."""

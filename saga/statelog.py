"""One log line per state change, told after its commit, and what every line about a command has in `extra` (H-13).

Logger `saga.state`: the way forward at DEBUG, the way back at INFO, what needs a person at WARNING. A line holds names,
ids, numbers and class names; no payload, no text of an exception, no code of a refusal. The library sets no handler and
no level. What is written in a caller's own transaction is not told: whether it is committed is the caller's to know.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Any, Final, NamedTuple
from uuid import UUID

from saga.engine.state import Status
from saga.messages import Command

log: Final[logging.Logger] = logging.getLogger("saga.state")

ONWARD: Final = frozenset({Status.RUNNING, Status.COMPLETED})


ABOUT: Final = (
    *("namespace", "saga", "saga_id", "run_id", "event", "step", "direction", "attempt", "command_id"),
    *("status", "error"),
)
"""Names under which a record's `extra` has what it is about."""


class StateChange(NamedTuple):
    """What happened to an instance, and the status that it led to."""

    run_id: UUID
    saga: str
    saga_id: str
    event: str
    step: str | None
    direction: str | None
    attempt: int | None
    command_id: str | None
    status: Status
    error: str


def all_wanted() -> bool:
    """Whether anybody reads the lines of the way forward; asked once per batch, so that nothing is kept for nobody."""
    return log.isEnabledFor(logging.DEBUG)


def tell(namespace: str, changes: Iterable[StateChange], lost: Collection[UUID] = ()) -> None:
    """Write a line for each change that was committed; `lost` names the runs whose part of the batch was not."""
    for change in changes:
        level = _level(change.status)
        if change.run_id in lost or not log.isEnabledFor(level):
            continue
        known = change._asdict() | {
            "namespace": namespace,
            "run_id": str(change.run_id),
            "status": str(change.status),
        }
        command = "" if change.step is None else f" of {change.step} {change.direction} {change.attempt}"
        error = f" ({change.error})" if change.error else ""
        log.log(
            level,
            "%s %r: %s%s%s -> %s",
            change.saga,
            change.saga_id,
            change.event,
            command,
            error,
            known["status"],
            extra=known,
        )


def about(command: Command) -> dict[str, Any]:
    """Return the `extra` of a line about a command."""
    return {
        "namespace": command.namespace,
        "saga": command.saga,
        "saga_id": command.sagaid,
        "run_id": command.runid,
        "step": command.step,
        "direction": command.direction,
        "attempt": command.attempt,
        "command_id": command.commandid,
    }


def _level(status: Status) -> int:
    if status in ONWARD:
        return logging.DEBUG
    return logging.WARNING if status is Status.NEEDS_ATTENTION else logging.INFO

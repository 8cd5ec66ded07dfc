"""What is answered for each way a handler can end: the one table of row D-04.

| The handler                                      | outcome | final        |
|--------------------------------------------------|---------|--------------|
| returned a value of its declared type            | done    |              |
| returned anything else, or too much              | failed  | not retried  |
| raised Refused (or returned it, in a batch)      | refused |              |
| raised RetryAfter                                | failed  | retried, not before |
| raised what `non_retryable` names                | failed  | not retried  |
| raised PayloadInvalid or PayloadTooLarge         | failed  | not retried  |
| raised anything else, BaseException included     | failed  | retried      |
| had not ended at `start_to_close`                | failed  | retried (`timeout`) |
| was not called: input invalid                    | failed  | not retried (`payload_invalid`) |
| was not called: the deadline had passed          | failed  | retried (`deadline`) |
| was not called: nobody has it here               | failed  | retried (`unknown_activity`) |

Whether a retry comes is the coordinator's schedule; "not retried" ends it. Texts of exceptions are data of the
reply: kept as payload, never logged. Class, our code, file and line stand everywhere else (L-11).
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from pydantic_core import PydanticSerializationError, to_json

from saga import messages
from saga.errors import PayloadInvalid, PayloadTooLarge, SagaError
from saga.messages import BODY_BYTES_MAX, NULL, Command, Outcome
from saga.outcomes import Refused, RetryAfter
from saga.participant.places import place
from saga.statelog import about

TEXT_BYTES_MAX: Final = 4 * 1024
FRAMES_MAX: Final = 20
log: Final[logging.Logger] = logging.getLogger("saga.participant")

DONE: Final = Outcome.DONE.value
REFUSED: Final = Outcome.REFUSED.value
FAILED: Final = Outcome.FAILED.value
NOTHING_TO_UNDO: Final = Outcome.NOTHING_TO_UNDO.value
HAD_RUN: Final = Outcome.HAD_RUN.value
LATE_EFFECT: Final = Outcome.LATE_EFFECT.value
PAYLOAD_INVALID: Final = "payload_invalid"
CANCELLED: Final = "cancelled"
"""Outcome of a barrier row whose action will never run; never on the wire."""
ATTEMPTED: Final = "attempted"
"""Outcome of a barrier row whose call outside the database was begun; never on the wire (row D-11)."""
CLOSED: Final = "closed"
"""Outcome of such a row that was settled without knowing how the call ended; never on the wire."""


class Answer(NamedTuple):
    """What goes into a reply."""

    outcome: str
    data: bytes = NULL


def failed(error: str, *, retryable: bool = True, retry_after_ms: int | None = None, **texts: str) -> Answer:
    """Return the answer of a failed attempt; `error` is a class name or one of our codes."""
    kept = {name: _cut(text) for name, text in texts.items() if text}
    return Answer(
        FAILED, to_json({"error": error, "retryable": retryable, "retry_after_ms": retry_after_ms, **kept})
    )


TIMEOUT: Final = failed("timeout")
DEADLINE: Final = failed("deadline")
POISON: Final = failed("poison")
# Retried, because during a rolling deployment the next delivery may meet a process that has the activity; the step's
# schedule bounds it. The parked copy is for the operator who reads why.
UNKNOWN_ACTIVITY: Final = failed("unknown_activity")
# A participant without a database keeps no barrier, so it cannot promise that the action never ran or never will: the
# pivot stays unknown, visibly (E-05).
NO_BARRIER: Final = failed(messages.NO_BARRIER)
OUTCOME_UNKNOWN: Final = failed(messages.OUTCOME_UNKNOWN)
UNDONE: Final = Answer(DONE)
EMPTY: Final = Answer(NOTHING_TO_UNDO)
HANGING: Final = Answer(REFUSED, to_json({"code": CANCELLED, "details": None}))


def payload_invalid(error: PayloadInvalid) -> Answer:
    """Return the answer to a command whose input is not of the declared type; its text holds paths, no values."""
    return failed(PAYLOAD_INVALID, retryable=False, message=error.text)


def output_invalid(error: PayloadInvalid | PayloadTooLarge) -> Answer:
    """Return the answer where the handler returned something else than it declares, or too much."""
    too_large = isinstance(error, PayloadTooLarge)
    return failed("payload_too_large" if too_large else "output_invalid", retryable=False, message=error.text)


def refused(refusal: Refused, handler: str) -> Answer:
    """Return a refusal. Details that are no JSON or too large are dropped: the refusal itself must get through."""
    try:
        data = to_json({"code": refusal.reason, "details": refusal.details})
    except (PydanticSerializationError, ValueError, RecursionError):
        data = b""
    if not data or len(data) > BODY_BYTES_MAX:
        log.warning("%s refused with details that cannot be sent; they are left out", handler)
        data = to_json({"code": str(refusal.reason)[:200], "details": None})
    return Answer(REFUSED, data)


def raised(
    error: BaseException, non_retryable: Sequence[type[BaseException]], handler: str, command: Command
) -> Answer:
    """Return the answer to what a handler raised, by the table above, and log a failure."""
    if isinstance(error, Refused):
        return refused(error, handler)
    retry_after_ms = None
    if isinstance(error, RetryAfter):
        retry_after_ms = max(0, int(error.delay.total_seconds() * 1000))
    final = isinstance(error, (*non_retryable, PayloadInvalid, PayloadTooLarge))
    name, at = type(error).__name__, place(error)
    log.info("%s failed with %s at %s", handler, name, at or "no place of its own", extra=about(command))
    return failed(
        name,
        retryable=not final,
        retry_after_ms=retry_after_ms,
        code=error.code if isinstance(error, SagaError) else "",
        at=at,
        message=_chain(error),
        traceback=_trace(error),
    )


def forward_data(output: bytes, undo: bytes) -> bytes:
    """Return the data of a `done` reply to a forward command."""
    return b'{"output":' + output + b',"undo":' + undo + b"}"


def _chain(error: BaseException) -> str:
    """Return the messages of an exception and of its causes, the outermost first."""
    parts: list[str] = []
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen and len(parts) < FRAMES_MAX:
        seen.add(id(cause))
        parts.append(f"{type(cause).__name__}: {_text(cause)}")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return " <- ".join(parts)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a broken __str__ of the user's must not cost the reply
        return "(no text)"


def _trace(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error, limit=-FRAMES_MAX))[-2 * TEXT_BYTES_MAX :]
    except Exception:
        return ""


def _cut(text: Any) -> str:
    raw = str(text).encode("utf-8", "replace")
    return raw[:TEXT_BYTES_MAX].decode("utf-8", "ignore")

"""What can reach an instance: a reply, a timer, a verb; each knows how to become an engine event at `now_ms`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, assert_never
from uuid import UUID

from saga.engine.events import (
    AbandonRequested,
    ActivityCompleted,
    ActivityFailed,
    ActivityRefused,
    CancelRequested,
    CompensationCompleted,
    CompensationFailed,
    CompensationRefused,
    Event,
    FenceFoundEffect,
    LateEffect,
    MarkDoneRequested,
    RetryRequested,
    SkipRequested,
    TerminateRequested,
    TimerFired,
)
from saga.engine.verbs import Verb
from saga.messages import Outcome, Reply

DONE: Final = Outcome.DONE.value


@dataclass(slots=True, eq=False)
class ReplyArrival:
    """A reply from a participant. `done` is called once it is committed, whatever it changed."""

    run_id: UUID
    reply: Reply
    done: Callable[[], None]
    pending_id: int | None = None
    """Set if it was stored beside the instance and comes from there (P29)."""

    def event(self, now_ms: int) -> Event:
        """Return what the participant answered."""
        return reply_event(self.reply, now_ms)


@dataclass(slots=True, eq=False)
class TimerArrival:
    """The instance's wake-up time passed."""

    run_id: UUID
    broker_forgot: bool = False

    def event(self, now_ms: int, may_resend: bool) -> Event:
        """Return the wake-up; `may_resend` says whether the redrive budget has room."""
        return TimerFired(at_ms=now_ms, may_resend=may_resend, broker_forgot=self.broker_forgot)


@dataclass(slots=True, eq=False)
class VerbArrival:
    """A person ordered something. `request_id` names the order, so that it is done once (P31)."""

    run_id: UUID
    request_id: UUID
    verb: Verb
    actor: str
    reason: str
    force: bool = False

    def event(self, now_ms: int, set_apart: bool) -> Event:
        """Return the order; `set_apart` says that the instance's row needs attention though its state does not."""
        match self.verb:
            case Verb.CANCEL:
                return CancelRequested(at_ms=now_ms, reason=self.reason)
            case Verb.RETRY:
                return RetryRequested(at_ms=now_ms, set_apart=set_apart)
            case Verb.MARK_DONE:
                return MarkDoneRequested(at_ms=now_ms)
            case Verb.SKIP:
                return SkipRequested(at_ms=now_ms)
            case Verb.TERMINATE:
                return TerminateRequested(at_ms=now_ms, force=self.force)
            case Verb.ABANDON:
                return AbandonRequested(at_ms=now_ms, set_apart=set_apart)
            case _:
                assert_never(self.verb)


Arrival = ReplyArrival | TimerArrival | VerbArrival


def reply_event(reply: Reply, now_ms: int) -> Event:
    """Return the fact that a reply reports."""
    forward = reply.direction == "forward"
    if reply.outcome == DONE:
        kind = ActivityCompleted if forward else CompensationCompleted
        return kind(at_ms=now_ms, command_id=reply.commandid, attempt=reply.attempt)
    known: dict[str, Any] = {"at_ms": now_ms, "command_id": reply.commandid, "attempt": reply.attempt}
    data = reply.data if isinstance(reply.data, dict) else {}
    match reply.outcome:
        case Outcome.NOTHING_TO_UNDO:
            return CompensationCompleted(**known, nothing=True)
        case Outcome.HAD_RUN:
            return FenceFoundEffect(**known)
        case Outcome.LATE_EFFECT:
            round = data.get("round")
            known_round = round if isinstance(round, int) and round >= 0 else 0
            return LateEffect(
                at_ms=now_ms,
                command_id=reply.commandid,
                step=reply.step,
                round=known_round,
                certain=data.get("certain") is not False,
            )
        case Outcome.REFUSED:
            code = _name(data.get("code", ""))
            return ActivityRefused(**known, code=code) if forward else CompensationRefused(**known, code=code)
        case _:
            error = _error(data)
            after = data.get("retry_after_ms")
            wait = after if isinstance(after, int) and after >= 0 else None
            if not forward:
                return CompensationFailed(**known, error=error, retry_after_ms=wait)
            return ActivityFailed(
                **known, error=error, retryable=data.get("retryable") is not False, retry_after_ms=wait
            )


def _name(said: Any) -> str:
    """Return a code or class name as it is kept: short, and without the NUL that PostgreSQL takes in no text."""
    return str(said)[:200].replace("\0", "")


def _error(said: dict[str, Any]) -> str:
    """Return class, our code, and file and line of a failure: what may be shown where its text may not (L-11)."""
    error, code, at = (_name(said.get(key) or "") for key in ("error", "code", "at"))
    return error + (f" [{code}]" if code else "") + (f" at {at}" if at else "")

"""Engine inputs: facts, in the past tense. Times are milliseconds of database time since the instance was created."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Event:
    """Something happened at `at_ms`."""

    at_ms: int


@dataclass(slots=True, kw_only=True)
class SagaStarted(Event):
    """The instance was created."""


@dataclass(slots=True, kw_only=True)
class Answer(Event):
    """A participant answered the command `command_id`."""

    command_id: str
    attempt: int


@dataclass(slots=True, kw_only=True)
class ActivityCompleted(Answer):
    """The step's effect is committed."""


@dataclass(slots=True, kw_only=True)
class ActivityRefused(Answer):
    """The business said no."""

    code: str


@dataclass(slots=True, kw_only=True)
class ActivityFailed(Answer):
    """This attempt ended with an error and left no effect."""

    error: str
    retryable: bool = True
    retry_after_ms: int | None = None


@dataclass(slots=True, kw_only=True)
class CompensationCompleted(Answer):
    """The step is undone, or (`nothing`) it had never run and never will."""

    nothing: bool = False


@dataclass(slots=True, kw_only=True)
class CompensationRefused(Answer):
    """The undo said that it cannot be done."""

    code: str


@dataclass(slots=True, kw_only=True)
class CompensationFailed(Answer):
    """This attempt of the undo ended with an error and left no effect."""

    error: str
    retry_after_ms: int | None = None


@dataclass(slots=True, kw_only=True)
class FenceFoundEffect(Answer):
    """The pivot in doubt had run: its participant answered the fence with the stored output."""


@dataclass(slots=True, kw_only=True)
class LateEffect(Event):
    """The action of `step` ran outside the database and ended after its undo of `round` had begun (P27).

    Told by the action, or by that undo: `command_id` is of either.
    """

    command_id: str
    step: str
    round: int = 0
    certain: bool = True
    """False: a call failed after the undo had begun, and nobody knows whether it left an effect."""


@dataclass(slots=True, kw_only=True)
class TimerFired(Event):
    """The wake-up time of the instance passed. `may_resend` is False while the redrive budget is used up (P4)."""

    may_resend: bool = True
    broker_forgot: bool = False
    """The broker lost what it held (a broker that is not durable restarted): send the outstanding command again now."""


@dataclass(slots=True, kw_only=True)
class CancelRequested(Event):
    """Somebody asked to stop and undo."""

    reason: str = ""


@dataclass(slots=True, kw_only=True)
class RetryRequested(Event):
    """Somebody asked to try what waits or stands still now."""

    set_apart: bool = False
    """The instance was set apart as poison: the row says so, its state does not."""


@dataclass(slots=True, kw_only=True)
class MarkDoneRequested(Event):
    """Somebody undid the failed step by hand."""


@dataclass(slots=True, kw_only=True)
class SkipRequested(Event):
    """Somebody decided that the failed step stays as it is, not undone."""


@dataclass(slots=True, kw_only=True)
class TerminateRequested(Event):
    """Somebody asked to stop at once, without undo; `force` where effects stand."""

    force: bool = False


@dataclass(slots=True, kw_only=True)
class AbandonRequested(Event):
    """Somebody gave up an instance that needs attention."""

    set_apart: bool = False

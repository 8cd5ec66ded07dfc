"""What goes wrong in a test, by the name of a step: refused, failed, lost, sent twice, late, or a process that dies.

    lost = env.faults.lose_reply("withdraw")
    ...
    assert lost.fired == 1

A fault strikes the first `times` times that it can, by default once, and counts. `undo=True` means the compensation of
the step. One that never fired makes the environment fail at its end: a test that injects nothing proves nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import Final

from saga.errors import ConfigurationError


class FaultKind(StrEnum):
    """What can go wrong at a step; each is a method of `Faults`."""

    REFUSE = "refuse"
    FAIL = "fail"
    LOSE_COMMAND = "lose_command"
    LOSE_REPLY = "lose_reply"
    DUPLICATE_COMMAND = "duplicate_command"
    DUPLICATE_REPLY = "duplicate_reply"
    DELAY_COMMAND = "delay_command"
    DELAY_REPLY = "delay_reply"
    CRASH_UNCOMMITTED = "crash_uncommitted"
    CRASH = "crash"
    CRASH_COORDINATOR = "crash_coordinator"


ALWAYS: Final = None
"""`times` of a fault that never stops."""


class InjectedFailure(Exception):
    """A handler failed because the test said so."""


@dataclass(eq=False)
class Fault:
    """One thing that goes wrong. `fired` counts how often it did."""

    kind: FaultKind
    step: str
    undo: bool = False
    times: int | None = 1
    reason: str = ""
    fired: int = 0

    def __str__(self) -> str:
        """Return it as one says it: `lose_reply(withdraw)`, `fail(undo withdraw, 3x)`."""
        times = {1: "", None: ", always"}.get(self.times, f", {self.times}x")
        return f"{self.kind}({'undo ' if self.undo else ''}{self.step}{times})"

    @property
    def spent(self) -> bool:
        """Whether it will not strike again."""
        return self.times is not None and self.fired >= self.times


class Faults:
    """The faults of one test. Each method orders one and returns it."""

    def __init__(self) -> None:
        self.ordered: list[Fault] = []
        self._steps: dict[str, bool] = {}

    def refuse(
        self, step: str, *, undo: bool = False, reason: str = "refused", times: int | None = 1
    ) -> Fault:
        """The business says no with this reason; the handler is not called."""
        return self.order(Fault(FaultKind.REFUSE, step, undo, times, reason))

    def fail(self, step: str, *, undo: bool = False, times: int | None = 1) -> Fault:
        """The handler raises before it does anything. `times=3` fails three attempts, `ALWAYS` all."""
        return self.order(Fault(FaultKind.FAIL, step, undo, times))

    def lose_command(self, step: str, *, undo: bool = False, times: int | None = 1) -> Fault:
        """The broker confirms the command and never delivers it."""
        return self.order(Fault(FaultKind.LOSE_COMMAND, step, undo, times))

    def lose_reply(self, step: str, *, undo: bool = False, times: int | None = 1) -> Fault:
        """The participant does its work and its reply is never delivered."""
        return self.order(Fault(FaultKind.LOSE_REPLY, step, undo, times))

    def duplicate_command(self, step: str, *, undo: bool = False, times: int | None = 1) -> Fault:
        """The command is delivered twice."""
        return self.order(Fault(FaultKind.DUPLICATE_COMMAND, step, undo, times))

    def duplicate_reply(self, step: str, *, undo: bool = False, times: int | None = 1) -> Fault:
        """The reply is delivered twice."""
        return self.order(Fault(FaultKind.DUPLICATE_REPLY, step, undo, times))

    def delay_command(self, step: str, *, undo: bool = False, times: int | None = 1) -> Fault:
        """The command is delivered after its saga has ended."""
        return self.order(Fault(FaultKind.DELAY_COMMAND, step, undo, times))

    def delay_reply(self, step: str, *, undo: bool = False, times: int | None = 1) -> Fault:
        """The reply is delivered after its saga has ended."""
        return self.order(Fault(FaultKind.DELAY_REPLY, step, undo, times))

    def crash(self, step: str, *, undo: bool = False, committed: bool = True, times: int | None = 1) -> Fault:
        """The participant dies after its commit, before the reply is sent, and starts again.

        `committed=False`: it dies when the handler has ended and nothing is committed.
        """
        kind = FaultKind.CRASH if committed else FaultKind.CRASH_UNCOMMITTED
        return self.order(Fault(kind, step, undo, times))

    def crash_coordinator(self, step: str, *, undo: bool = False, times: int | None = 1) -> Fault:
        """The coordinator dies after it has committed to the command, before sending it, and starts again."""
        return self.order(Fault(FaultKind.CRASH_COORDINATOR, step, undo, times))

    def order(self, fault: Fault) -> Fault:
        """Let a fault strike from now on. Raises ConfigurationError if no saga here has such a step."""
        if self._steps:
            self._check(fault)
        self.ordered.append(fault)
        return fault

    def clear(self) -> None:
        """Let nothing go wrong any more, and forget what did."""
        self.ordered.clear()

    def know(self, steps: Mapping[str, bool]) -> None:
        """Learn which steps there are, and whether each can be undone. Raises ConfigurationError as `order` does."""
        self._steps |= steps
        for fault in self.ordered:
            self._check(fault)

    def unfired(self) -> list[Fault]:
        """Return the faults that never struck."""
        return [fault for fault in self.ordered if not fault.fired]

    def strike(self, kinds: Collection[FaultKind], step: str, *, undo: bool) -> Fault | None:
        """Return the fault that strikes here, counted, or None. The one ordered first goes first."""
        for fault in self.ordered:
            if fault.kind in kinds and (fault.step, fault.undo) == (step, undo) and not fault.spent:
                fault.fired += 1
                return fault
        return None

    def _check(self, fault: Fault) -> None:
        if fault.step not in self._steps:
            close = get_close_matches(fault.step, self._steps, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(self._steps)}."
            raise ConfigurationError(
                f"{fault}: no saga of this environment has a step {fault.step!r}; {hint}"
            )
        if fault.undo and not self._steps[fault.step]:
            raise ConfigurationError(f"{fault}: the step {fault.step!r} has no compensation.")

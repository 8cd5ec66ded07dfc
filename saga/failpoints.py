"""Named crash points: nothing in production, a kill, an error or a pause where a test asks for it.

`failpoint("C8")` stands in the code at each window of reliability.md; `SAGA_FAIL=C8:kill:n=2` kills the process at the
second pass. Verbs: kill (SIGKILL), stop (SIGSTOP), raise (ConnectionError), hang (blocks for an hour). Several are
joined by a comma. `SAGA_FAIL_LOG=FILE` appends the name of each point passed, so that a dry run can be counted.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from typing import Final

POINTS: Final = {
    "C1": "start: before BEGIN",
    "C2": "start: instance and outbox row inserted, before COMMIT",
    "C3": "start: COMMIT sent, reply lost",
    "C4": "start: committed, before return",
    "R1": "relay: rows read",
    "R2": "relay: bytes written, no confirm",
    "R3": "relay: confirmed, not deleted",
    "R4": "relay: delete's COMMIT reply lost",
    "R5": "relay: part of a batch published",
    "W1": "participant: delivered, no transaction",
    "W2": "participant: barrier row inserted",
    "W3": "participant: effect applied, before COMMIT",
    "W4": "participant: COMMIT reply lost",
    "W5": "participant: committed, reply not sent",
    "W6": "participant: reply confirmed, no ack",
    "W7": "participant: acked",
    "N2": "inbox: committed, no ack",
    "N3": "inbox: attempt failed, the next one not kept",
    "N4": "inbox: the next attempt kept, no ack",
    "C5": "coordinator: reply delivered",
    "C6": "coordinator: version checked, next command not inserted",
    "C7": "coordinator: COMMIT reply lost",
    "C8": "coordinator: committed, not acked",
    "T1": "timer: claimed",
    "T2": "timer: fired and committed, wake-up lost",
    "T3": "timer: deadline and reply in the same instant",
    "K1": "compensation: decision committed",
    "K2": "compensation: between two undos",
    "K3": "compensation: last reply against terminal state",
    "M2": "upkeep: migration",
    "M3": "upkeep: lease renewed late",
    "M4": "upkeep: SIGTERM in a handler",
}


@dataclass
class _Armed:
    actions: dict[str, tuple[str, int]]
    log_path: str | None
    hits: dict[str, int] = field(default_factory=dict)

    def pass_(self, name: str) -> None:
        self.hits[name] = self.hits.get(name, 0) + 1
        if self.log_path:
            with open(self.log_path, "a") as log:
                log.write(f"{name}\n")
        verb, at = self.actions.get(name, ("", 0))
        if verb and self.hits[name] == at:
            _act(verb, name)


_armed: _Armed | None = None


def failpoint(name: str) -> None:
    """Mark a crash point. Without `arm` this does nothing."""
    if _armed is not None:
        _armed.pass_(name)


def arm(specification: str, log_path: str | None = None) -> None:
    """Arm crash points, e.g. `R3:kill:n=2,C8:raise`. Raises ValueError for an unknown point or verb."""
    global _armed
    actions: dict[str, tuple[str, int]] = {}
    for part in filter(None, specification.split(",")):
        name, verb, *rest = part.split(":")
        if name not in POINTS or verb not in ("kill", "stop", "raise", "hang"):
            raise ValueError(f"{part!r} is no crash point and verb")
        actions[name] = (verb, int(rest[0].removeprefix("n=")) if rest else 1)
    _armed = _Armed(actions, log_path)


def disarm() -> dict[str, int]:
    """Disarm and return how often each point was passed."""
    global _armed
    hits = _armed.hits if _armed else {}
    _armed = None
    return hits


def _act(verb: str, name: str) -> None:
    if verb == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif verb == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif verb == "raise":
        raise ConnectionError(f"failpoint {name}")
    else:
        time.sleep(3600)  # lint: allow CLOCK because the point is to block the loop

"""What a process of the demo runs: the apps of `apps.py` with the faults that the runner put into its environment.

saga coordinator examples.money_transfer.stage:coordinator      (saga participant ...:savings, :giro, :notifier)
python -m examples.money_transfer.stage embedded|starter TRANSFER      (prints how the transfer ended, as JSON)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter

from examples.money_transfer import apps, faults, transfer
from saga import App, Client, Handle, ResultTimeout, SagaCompensated, failpoints
from saga.adapters import make_broker
from saga.brokers.base import Broker
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.engine.state import Status

RESULT_SECONDS: Final = 20.0
ATTENTION_SECONDS: Final = 0.05


@dataclass
class Event:
    """One line of an instance's history."""

    milliseconds: int
    event: str
    step: str | None
    direction: str | None
    detail: dict[str, Any]


@dataclass
class Outcome:
    """How a transfer ended, and by what steps."""

    status: str
    reason: str = ""
    result: transfer.Transferred | None = None
    history: list[Event] = field(default_factory=list)


OUTCOME: Final = TypeAdapter(Outcome)

_environment: Final = os.environ
_namespace: Final = _environment.get("DEMO_NAMESPACE", "default")
_sabotage: Final = _environment.get("DEMO_SABOTAGE", "")
_redrive_seconds: Final = _environment.get("DEMO_REDRIVE_SECONDS")
_redrive: Final = (
    timedelta(seconds=float(_redrive_seconds)) if _redrive_seconds else faults.redrive(_sabotage)
)
_options: Final[dict[str, Any]] = {"namespace": _namespace, "redrive": _redrive}
_fault_log: Final = Path(_environment.get("DEMO_FAULT_LOG", ""))


def _broker(url: str, database: str = "") -> str | Broker:
    """Return the broker's address, or the broker with the fault that this process is to have."""
    lost, late = _environment.get("DEMO_LOSE_REPLY_OF"), _environment.get("DEMO_COPY_AND_DELAY")
    if not lost and not late:
        return url
    ports: dict[str, Any] = {"clock": SystemClock(), "ids": SystemIds(), "spawner": TaskSpawner()}
    if url == "database://":
        url = database
    inner = make_broker(url, None, **ports)
    if late:
        return faults.Copying(inner, late=late, log=_fault_log)
    return faults.LosingReplies(inner, namespace=_namespace, step=str(lost), log=_fault_log)


def _coordinating() -> App:
    broker = _broker(_settings.broker, _settings.coordinator_database)
    return apps.coordinating(_settings, broker=broker, **_options)


def _participant(name: str) -> App:
    broker = _broker(_settings.broker, getattr(_settings, f"{name}_database"))
    return apps.participating(name, _settings, broker=broker, **_options)


_settings: Final = apps.Settings()
faults.apply(_sabotage, transfer.withdraw)
if _frozen := _environment.get("DEMO_REFUND_IMPOSSIBLE"):
    faults.refuse_undo(getattr(transfer, _frozen), _fault_log)
if _down := _environment.get("DEMO_BANK_DOWN"):
    faults.bring_down(getattr(transfer, _down), int(_environment["DEMO_BANK_DOWN_ATTEMPTS"]), _fault_log)
# For `saga coordinator | participant`; where all is embedded, the drivers of servers may be missing.
if __name__ != "__main__":
    coordinator = _coordinating()
    savings, giro, notifier = map(_participant, ("savings", "giro", "notifier"))


# --- one transfer, from start to end ----------------------------------------------------------


@contextlib.asynccontextmanager
async def _running(form: str) -> AsyncIterator[Client]:
    if form == "starter":
        async with _coordinating().as_client() as client:
            yield client
    else:
        broker = _broker("memory://")
        async with apps.embedded(_environment["DEMO_DATABASE"], broker=broker, **_options) as app:
            yield app.client


async def _operate(handle: Handle[Any]) -> None:
    """Be the operator: wait for the incident, see to its cause, and order a retry (`saga retry` does the same)."""
    clock = SystemClock()
    until = clock.monotonic() + RESULT_SECONDS
    while clock.monotonic() < until:
        if (await handle.describe()).status == Status.NEEDS_ATTENTION:
            faults.mend(_fault_log)
            await handle.client.retry(handle, reason="the account is open again", actor="demo")
            return
        await clock.sleep(ATTENTION_SECONDS)


async def _transfer(form: str, order: transfer.Transfer) -> Outcome:
    async with _running(form) as client:
        handle = await client.start(transfer.money_transfer, order, id=order.id)
        if _frozen:
            await _operate(handle)
        outcome = Outcome("completed")
        try:
            outcome.result = await handle.result(timeout=timedelta(seconds=RESULT_SECONDS))
        except SagaCompensated as ended:
            outcome = Outcome("compensated", ended.reason)
        except ResultTimeout:
            outcome = Outcome("not ended", f"after {RESULT_SECONDS:g} s")
        seen = await handle.describe()
        for line in seen.history:
            since = (line.at - seen.created_at) // timedelta(milliseconds=1)
            outcome.history.append(Event(since, line.event, line.step, line.direction, line.detail))
        if _environment.get("DEMO_COPY_AND_DELAY"):
            await faults.wait_for_late(_fault_log)
        return outcome


def main() -> None:
    form, order = sys.argv[1:]
    failpoints.arm(_environment.get("SAGA_FAIL", ""), _environment.get("SAGA_FAIL_LOG"))
    outcome = asyncio.run(_transfer(form, transfer.Transfer.model_validate_json(order)))
    sys.stdout.buffer.write(OUTCOME.dump_json(outcome) + b"\n")


if __name__ == "__main__":
    main()

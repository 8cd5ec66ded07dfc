"""The scenarios of the demo as one table: what is asked for, what goes wrong, how it ends and what the ledgers say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from examples.money_transfer.faults import BankDown, Copies, Crash, Fault, LostReply, RefundImpossible

OPENING: Final = {"savings": {"alice": 50_000}, "giro": {"bob": 30_000}}
"""Which accounts the banks open, and with how many cents."""


@dataclass(frozen=True)
class Scenario:
    """One transfer under one fault. `ledger` is what the banks write down, as (kind, account, delta)."""

    name: str
    story: str
    source: str
    target: str
    amount: int
    ends: str
    ledger: tuple[tuple[str, str, int], ...]
    reason: str = ""
    notifications: int = 0
    fault: Fault | None = None


_ARRIVED: Final = (("withdraw", "alice", -2_500), ("deposit", "bob", 2_500))

SCENARIOS: Final = (
    Scenario(
        "success",
        "the money arrives and Bob is told",
        source="alice",
        target="bob",
        amount=2_500,
        ends="completed",
        ledger=_ARRIVED,
        notifications=1,
    ),
    Scenario(
        "insufficient funds",
        "Alice has less than that: the withdrawal is refused and nothing moves",
        source="alice",
        target="bob",
        amount=1_000_000,
        ends="compensated",
        reason="insufficient_funds",
        ledger=(),
    ),
    Scenario(
        "unknown target",
        "the other bank knows no such account: Alice gets her money back",
        source="alice",
        target="nobody",
        amount=2_500,
        ends="compensated",
        reason="unknown_account",
        ledger=(("withdraw", "alice", -2_500), ("refund", "alice", 2_500)),
    ),
    Scenario(
        "lost reply",
        "Alice's bank answers and the answer never arrives: asked again, it must not pay again",
        source="alice",
        target="bob",
        amount=2_500,
        ends="completed",
        ledger=_ARRIVED,
        notifications=1,
        fault=LostReply(step="withdraw"),
    ),
    Scenario(
        "crash",
        "a process is killed at a point drawn by chance and started again",
        source="alice",
        target="bob",
        amount=2_500,
        ends="completed",
        ledger=_ARRIVED,
        notifications=1,
        fault=Crash(),
    ),
    Scenario(
        "bank down",
        "Bob's bank cannot reach its own database for a while: it is asked again until it can",
        source="alice",
        target="bob",
        amount=2_500,
        ends="completed",
        ledger=_ARRIVED,
        notifications=1,
        fault=BankDown(step="deposit"),
    ),
    Scenario(
        "copies",
        "every message arrives twice, and one of them long after the end: nothing moves twice",
        source="alice",
        target="bob",
        amount=2_500,
        ends="completed",
        ledger=_ARRIVED,
        notifications=1,
        fault=Copies(late="deposit"),
    ),
    Scenario(
        "refund impossible",
        "Alice's account is frozen when her money comes back: an incident, and a retry by the operator heals it",
        source="alice",
        target="nobody",
        amount=2_500,
        ends="compensated",
        reason="unknown_account",
        ledger=(("withdraw", "alice", -2_500), ("refund", "alice", 2_500)),
        fault=RefundImpossible(step="withdraw"),
    ),
)

"""A payment provider that no transaction of ours reaches: knows duplicates by their key, and may cut the line."""

from __future__ import annotations

from collections import Counter

from saga.definition.activity import Participant
from saga.outcomes import ActivityContext, Inquiry, Refused
from tests.participant.harness import Gate, Receipt, Transfer, limited


class LineCut(Exception):
    """The provider did what it was asked, and its answer never came."""


class Provider:
    """Charges and refunds by operation key."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.charges: dict[str, int] = {}
        self.refunds: dict[str, str] = {}
        """Refund key to what came of it."""
        self.cuts = 0
        """How many more charges and refunds are made and not answered."""
        self.knows = True
        """Whether it answers inquiries."""
        self.refuses = False
        self.gate: Gate | None = None
        """Holds a charge on its way to the provider."""
        self.refund_gate: Gate | None = None

    async def charge(self, key: str, amount: int) -> str:
        self.calls["charge"] += 1
        if self.gate is not None:
            await self.gate()
        if self.refuses:
            raise Refused("declined")
        self.charges.setdefault(key, amount)
        self._answer()
        return f"charge of {key}"

    async def refund(self, key: str, charge: str) -> None:
        """Give back a charge. Asked twice under one key it says what it said before, as providers do."""
        self.calls["refund"] += 1
        if self.refund_gate is not None:
            await self.refund_gate()
        standing = charge in self.charges and charge not in self.refunds.values()
        self.refunds.setdefault(key, charge if standing else "nothing")
        self._answer()

    def _answer(self) -> None:
        if self.cuts:
            self.cuts -= 1
            raise LineCut

    @property
    def standing(self) -> int:
        """Charges less refunds."""
        back = {charge for charge in self.refunds.values() if charge != "nothing"}
        return sum(amount for key, amount in self.charges.items() if key not in back)


def payments(provider: Provider, *, inquires: bool = True, seconds: float | None = 30.0) -> Participant:
    """A participant that charges through the provider."""
    participant = limited(seconds)

    @participant.activity(at_least_once=True)
    async def charge(transfer: Transfer, context: ActivityContext) -> Receipt:
        return Receipt(reference=await provider.charge(context.operation_key, transfer.amount))

    @charge.compensation
    async def refund(transfer: Transfer, receipt: Receipt | None, context: ActivityContext) -> None:
        provider.calls["refund with receipt" if receipt else "refund without"] += 1
        await provider.refund(context.operation_key, context.forward_key)

    if inquires:

        @charge.inquiry
        async def look(transfer: Transfer, context: ActivityContext) -> Receipt | Inquiry:
            provider.calls["inquiry"] += 1
            if not provider.knows:
                return Inquiry.UNKNOWN
            if context.operation_key in provider.charges.keys() - provider.refunds.values():
                return Receipt(reference=f"charge of {context.operation_key}")
            return Inquiry.NOT_DONE

    return participant

"""What a participant holds in memory: deliveries, and the commands in them, from receipt to ack.

A delivery is acked when every command in it is settled: its reply is confirmed by the broker, or it is parked (W6).
An attempt is one command to be run; copies of it that arrive meanwhile join it and share its reply (P30).
"""

from __future__ import annotations

from math import inf
from typing import Any

from saga.brokers.base import Consumer, Delivery
from saga.messages import Command
from saga.participant.answers import FAILED, Answer
from saga.participant.served import Past, Served
from saga.storage.base import BarrierKey


class Held:
    """A delivery that is not acked yet, and how many of its commands are unsettled."""

    __slots__ = ("consumer", "delivery", "left")

    def __init__(self, consumer: Consumer, delivery: Delivery, left: int) -> None:
        self.consumer: Consumer = consumer
        self.delivery: Delivery = delivery
        self.left: int = left


class Attempt:
    """One command on its way through this process."""

    __slots__ = (
        "answer", "attempt", "closes", "command", "deadline", "held", "input", "key", "lone", "marked", "past",
        "reply", "served",
    )  # fmt: skip

    def __init__(
        self, command: Command, served: Served, held: Held, received: float, key: BarrierKey
    ) -> None:
        self.command: Command = command
        self.served: Served = served
        self.held: list[Held] = [held]
        self.attempt: int = command.attempt
        """Number that the reply carries: the newest of the copies that joined."""
        # P10: milliseconds that remained at sending, counted from receipt on our own monotonic clock
        self.deadline: float = inf if command.remainingms is None else received + command.remainingms / 1000
        delivery = held.delivery
        self.marked: bool = command.resend or command.attempt > 1 or delivery.redelivered
        """P22: it may have run before, so the barrier is looked at before the handler is called."""
        self.lone: bool = delivery.delivery_count >= 3  # P14
        self.key: BarrierKey = key
        """Name of this decision in the barrier; a participant without a database never reads it."""
        self.closes: BarrierKey = key
        """Name of the decision that must not be taken any more: the action's for an undo or its fence (P25), the undo's
        for what a person settled (P26)."""
        self.input: Any = None
        self.past: Past | None = None
        self.answer: Answer | None = None
        self.reply: bytes = b""

    def joins(self, command: Command) -> bool:
        """Whether a copy shares this attempt's reply. One that asks for more than a failure already given does not."""
        answer = self.answer
        return answer is None or answer.outcome != FAILED or command.attempt <= self.attempt

    def join(self, command: Command, held: Held) -> None:
        """Take a copy in: its delivery is acked with this attempt's reply."""
        self.held.append(held)
        if command.attempt > self.attempt and self.answer is None:
            self.attempt = command.attempt
        self.marked = self.marked or command.resend or held.delivery.redelivered

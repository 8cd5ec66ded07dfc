"""Damps aiokafka's loggers: they tell payloads at debug level, and the same failure ten times a second (KAF-13)."""

from __future__ import annotations

import logging
from typing import Final

from saga.clock import Clock

PAUSE_SECONDS: Final = 10.0
_NAMES: Final = (
    "aiokafka",
    "aiokafka.cluster",
    "aiokafka.conn",
    "aiokafka.consumer.consumer",
    "aiokafka.consumer.fetcher",
    "aiokafka.consumer.group_coordinator",
    "aiokafka.consumer.subscription_state",
    "aiokafka.producer.producer",
    "aiokafka.producer.sender",
)


class Damper(logging.Filter):
    """Lets nothing through below INFO, and one line of each form in ten seconds, with its traceback left out."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.INFO:
            return False
        now = self._clock.monotonic()
        form = str(record.msg)  # the form before its arguments, so there is one of each place in the code
        if now - self._last.get(form, -PAUSE_SECONDS) < PAUSE_SECONDS:
            return False
        self._last[form] = now
        record.exc_info = record.exc_text = None  # an exception's text may hold what was being sent
        return True


def damp(clock: Clock) -> None:
    """Damp them once in a process, however many brokers there are."""
    for name in _NAMES:
        logger = logging.getLogger(name)
        if not any(isinstance(each, Damper) for each in logger.filters):
            logger.addFilter(Damper(clock))

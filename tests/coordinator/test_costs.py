"""What a step costs, exactly: writing transactions, statements and messages, alone and as one batch of 64.

This is the test that fails when a step becomes dearer. Local clocks stand still, so no poll and no sweep takes part.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from devservices import Postgres
from devservices.postgres import database_name
from saga.client import Handle
from saga.definition.builder import Saga
from saga.definition.refs import make
from tests.coordinator.harness import HELD, Batch, Node, Order, Receipt, Scripted, Stack
from tests.coordinator.sagas import QUICK, sequence, work

pytestmark = [pytest.mark.feature("K-05", acceptance=True, scale=0.02)]
STEPS = 5
BATCH = 64


@dataclass(frozen=True)
class Cost:
    """Of one batch, whatever its size."""

    commits: int
    statements: int


# One batch that moves instances to their next step. `reading`: the input of the next step is made of an output.
PLAIN, READING, CLOSING = "plain", "reading", "closing"
COSTS: dict[str, dict[str, Cost]] = {
    # load; one statement that checks versions and writes all; with an output to read, that as well
    "postgres-rabbitmq": {PLAIN: Cost(1, 2), READING: Cost(1, 2), CLOSING: Cost(1, 2)},
    "sqlite": {PLAIN: Cost(1, 8), READING: Cost(1, 8), CLOSING: Cost(1, 6)},
}
COMMANDS_PER_STEP, REPLIES_PER_STEP = 1, 1

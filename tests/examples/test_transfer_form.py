"""The example's one file stays what it promises to be: short, complete, and ignorant of what the demo does to it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from examples.money_transfer import batched, transfer
from examples.money_transfer.apps import SCHEMAS
from examples.money_transfer.scenarios import SCENARIOS

EXAMPLE = Path(transfer.__file__)
LINES_MAX = 99
FAULTS = (
    "fault",
    "fail",
    "crash",
    "kill",
    "lost",
    "lose",
    "drop",
    "duplicate",
    "retry",
    "redrive",
    "timeout",
    "demo",
)


@pytest.mark.feature("I-11")
@pytest.mark.stack("pure")
def test_payloads_tables_activities_and_saga_stand_in_one_file_under_100_lines() -> None:
    """`wc -l` counts line ends."""
    text = EXAMPLE.read_text()
    assert text.count("\n") <= LINES_MAX
    for part in ("class Transfer", "Table(", ".activity", ".compensation", "Saga("):
        assert part in text


@pytest.mark.feature("I-11")
@pytest.mark.stack("pure")
@pytest.mark.parametrize("form", [transfer, batched], ids=["transfer", "batched"])
def test_the_example_names_no_scenario_and_no_fault(form: object) -> None:
    text = Path(str(getattr(form, "__file__", ""))).read_text()
    words = set(re.findall(r"[a-z]+", text.lower()))
    assert not words & set(FAULTS)
    # A refusal is the bank's own answer, so its code may be there; the scenario's name may not.
    assert not [each.name for each in SCENARIOS if re.search(rf"\b{each.name}\b", text, re.IGNORECASE)]


@pytest.mark.feature("I-11")
@pytest.mark.stack("pure")
def test_the_example_names_no_schema_and_no_server() -> None:
    text = EXAMPLE.read_text()
    assert not [schema for schema in SCHEMAS.values() if schema in text]
    assert "://" not in text


@pytest.mark.feature("I-11")
@pytest.mark.stack("pure")
def test_batched_handlers_change_nothing_that_the_coordinator_knows() -> None:
    """A-13: the fingerprint covers contract, queues and schedules, so a service can change over in mid-flight."""
    assert batched.money_transfer.compile().fingerprint == transfer.money_transfer.compile().fingerprint

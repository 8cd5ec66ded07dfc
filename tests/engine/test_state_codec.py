"""The stored snapshot: it is read as it was written, does not grow with the steps behind it, and has a format."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings

from saga.engine.state import decode_state
from tests.engine.runs import RUN, SagaRun, sequence
from tests.engine.test_decide_properties import Act, play, sagas, scripts

pytestmark = pytest.mark.stack("pure")


@settings(max_examples=200, deadline=None)
@given(sagas, scripts)
def test_every_state_that_can_be_reached_is_read_as_it_was_written(
    definition: Any, script: list[Act]
) -> None:
    state = play(SagaRun(definition), script).state

    assert decode_state(state.namespace, state.run_id, state.encode()) == state


@pytest.mark.feature("A-01")
def test_the_snapshot_of_step_300_is_as_small_as_that_of_step_3() -> None:
    run = SagaRun(sequence("C" * 300))
    sizes = []
    for _ in range(299):
        run.now_ms += 10
        run.done()
        sizes.append(len(run.state.encode()))

    assert sizes[-1] - sizes[1] <= len("299") * 2 + len("2990") * 2
    assert max(sizes) < 200


def test_a_snapshot_of_a_newer_format_is_refused() -> None:
    body = json.loads(SagaRun(sequence("C")).state.encode())

    with pytest.raises(ValueError, match="state format 99"):
        decode_state("default", RUN, json.dumps({**body, "f": 99}))


def test_the_format_of_this_release_stays_readable() -> None:
    """A golden snapshot: instances that are open during an upgrade depend on it."""
    stored = (
        '{"f":1,"s":"needs_attention","d":1,"o":[1,"compensate","c0ffee",10,1000,90000,2,99000],'
        '"p":[[1,true,"compensation_failed"],[0,false,"pending"]],"c":["failed",1,"Boom",3]}'
    )

    state = decode_state("default", RUN, stored)

    assert state.encode() == stored
    assert state.outstanding is not None
    assert (state.outstanding.attempt, state.outstanding.retry_ms) == (10, 99_000)
    assert [undo.in_doubt for undo in state.plan] == [True, False]

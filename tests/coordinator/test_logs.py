"""H-13: one line per state change, after its commit, with everything in `extra` that finds it again; else silence."""

from __future__ import annotations

import logging
from uuid import UUID

import pytest

from saga import App, statelog
from saga.coordinator.work import BatchWork
from saga.engine.state import Status
from tests.coordinator.harness import DONE, HELD, Order, Stack, fail, refuse
from tests.coordinator.sagas import sequence
from tests.stacks import every_stack

RUN = UUID("01890a5d-ac96-774b-bcce-b302099a8057")
TWO = sequence(2)

GOLDEN = [
    ("DEBUG", "sequence 'x': SagaStarted -> running"),
    ("DEBUG", "sequence 'x': ActivityCompleted of s1 forward 1 -> running"),
    ("DEBUG", "sequence 'x': ActivityFailed of s2 forward 1 (Oops) -> running"),
    ("DEBUG", "sequence 'x': TimerFired of s2 forward 1 -> running"),
    ("INFO", "sequence 'x': ActivityRefused of s2 forward 2 -> compensating"),
    ("WARNING", "sequence 'x': CompensationRefused of s1 compensate 1 -> needs_attention"),
    ("WARNING", "sequence 'x': TimerFired of s1 compensate 1 -> needs_attention"),
    ("INFO", "sequence 'x': CompensationCompleted of s1 compensate 2 -> compensated"),
]


def told(lines: list[logging.LogRecord]) -> list[tuple[str, str]]:
    return [(line.levelname, line.getMessage()) for line in lines if line.name == "saga.state"]


@every_stack
@pytest.mark.usefixtures("real_broker")
@pytest.mark.feature("H-13", acceptance=True)
async def test_a_failing_saga_tells_the_golden_sequence(
    stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "saga.state")
    participant = await stack.participant(
        {"s2": [fail("Oops"), refuse("secret-code")], "undo s1": [refuse("another"), DONE]}
    )
    node = await stack.node(TWO)
    handle = await node.client.start(TWO, Order(), id="x")

    assert await stack.ended([handle], step=1) == {"x": "compensated"}

    assert told(caplog.records) == GOLDEN, "and no code of a refusal, which is the business's word"
    mine = [line.__dict__ for line in caplog.records if line.name == "saga.state"]
    for line in mine:
        found = (line["namespace"], line["saga"], line["saga_id"], line["run_id"])
        assert found == (stack.namespace, "sequence", "x", str(handle.run_id))
    refused = mine[4]
    assert (refused["step"], refused["direction"], refused["attempt"]) == ("s2", "forward", 2)
    assert refused["event"] == "ActivityRefused"
    [sent] = {each.commandid for each in participant.commands if each.step == "s2"}
    assert refused["command_id"] == sent
    history = await handle.describe()
    assert [line.event for line in history.history] == [line["event"] for line in mine], "a line for each"


@pytest.mark.feature("H-13")
async def test_at_its_usual_level_the_way_forward_is_silent_and_costs_nothing(
    stack: Stack, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[statelog.StateChange] = []
    real = BatchWork.changes

    def changes(work: BatchWork, values: object) -> object:
        done = real(work, values)  # type: ignore[arg-type]
        kept.extend(work.state_changes)
        return done

    monkeypatch.setattr(BatchWork, "changes", changes)
    await stack.participant({})
    node = await stack.node(TWO)
    with caplog.at_level(logging.INFO, "saga.state"):
        handle = await node.client.start(TWO, Order(), id="x")
        assert await stack.ended([handle]) == {"x": "completed"}
    assert kept == []
    assert told(caplog.records) == []


@pytest.mark.feature("H-13")
async def test_a_cancel_is_told_by_whoever_ordered_it(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "saga.state")
    participant = await stack.participant({"s1": [HELD]})
    node = await stack.node(TWO)
    handle = await node.client.start(TWO, Order(), id="x")
    await participant.wait_held(1)
    await node.client.cancel(handle.run_id, actor="me", reason="secret reason")
    participant.release()
    assert await stack.ended([handle]) == {"x": "compensated"}
    assert told(caplog.records)[1:3] == [
        ("DEBUG", "sequence 'x': CancelRequested of s1 forward 1 -> running"),
        ("INFO", "sequence 'x': ActivityCompleted of s1 forward 1 -> compensating"),
    ]


@pytest.mark.feature("H-13")
def test_what_was_not_committed_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    """A loser of the version check is decided again; only what was written is a state change."""
    caplog.set_level(logging.INFO, "saga.state")
    change = statelog.StateChange(RUN, "s", "x", "E", "a", "forward", 1, "c", Status.COMPENSATING, "")
    statelog.tell("n", [change], lost={RUN})
    assert told(caplog.records) == []
    statelog.tell("n", [change])
    assert told(caplog.records) == [("INFO", "s 'x': E of a forward 1 -> compensating")]


@pytest.mark.feature("H-13")
def test_the_library_sets_no_handler_and_no_level() -> None:
    ours = [logging.getLogger(App.__module__), logging.getLogger("saga"), *_named("saga.")]
    assert len(ours) > 5
    for logger in ours:
        assert logger.handlers == [], logger.name
        assert logger.level == logging.NOTSET, logger.name


def _named(prefix: str) -> list[logging.Logger]:
    known = logging.Logger.manager.loggerDict.items()
    return [
        logger for name, logger in known if name.startswith(prefix) and isinstance(logger, logging.Logger)
    ]

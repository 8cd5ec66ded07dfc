"""The benchmarks on SQLite: both systems run there as processes, are counted and keep their books; no bar is set."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.ext.asyncio import AsyncConnection

from benchmarks import bars, naive, naive_sqlite, sqlite_stack, tally
from benchmarks.__main__ import STACKS
from benchmarks.cell import Contender, Run, Side, Timing
from benchmarks.load import Measured
from benchmarks.naive_database import queue
from benchmarks.results import Result
from benchmarks.systems import SYSTEMS

IN_FLIGHT = 8


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
async def test_a_cell_runs_and_its_books_are_conserved(system: str) -> None:
    async with sqlite_stack.start() as stack:
        starting = Side.start(
            stack, Contender(system, "business"), workload="five-steps", in_flight=IN_FLIGHT
        )
        async with starting as side:  # checks the books at its end
            run = await side.run(Timing(0.1, 0.3, 1), IN_FLIGHT)
    assert run.measured.sagas > 0
    assert set(run.commits) == set(run.statements) == {"coordinator", "participant"}
    assert min(*run.commits.values(), *run.statements.values()) > 0


async def test_the_naive_form_gives_a_message_back_with_all_else_when_its_transaction_fails(
    tmp_path: Path,
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'queue.db'}")
    naive.metadata.create_all(engine)
    file = naive_sqlite.File(f"sqlite+aiosqlite:///{tmp_path / 'queue.db'}", "shop", None)
    await file.start()
    async with file.writing() as connection:
        await file.send(connection, "savings", {"number": 1})

    async def fail(connection: AsyncConnection, body: naive.Data) -> None:
        await file.send(connection, "replies", body)
        raise RuntimeError("the work fails")

    worker = file.consume("savings", fail)
    with pytest.raises(RuntimeError, match="the work fails"):
        await asyncio.wait_for(worker, 10)
    await file.stop()
    with engine.connect() as looking:
        assert looking.execute(select(queue.c.name, queue.c.body)).all() == [
            ("shop.savings", '{"number": 1}')
        ]
    engine.dispose()


def test_a_ratio_without_a_bar_is_reported() -> None:
    def result(system: str, per_s: float) -> Result:
        run = Run(Measured(500, 1.0, 1.0, 2.0, 500), per_s, {}, {}, {}, 0.0)
        return Result(system, "transfer", "stateless", 500, (run,))

    measured = [result("naive", 10.0), result("saga", 30.0)]
    (figure,) = bars.check(measured, bars.LIMITS["sqlite"])
    assert (figure.value, isinstance(figure, bars.Bar)) == (3.0, False)
    (bar,) = bars.check(measured, bars.LIMITS["postgres"])
    assert isinstance(bar, bars.Bar)
    assert not bar.met


def test_every_stack_says_what_it_must_reach() -> None:
    assert set(bars.LIMITS) == set(STACKS)


def test_a_tally_starts_at_nothing(tmp_path: Path) -> None:
    assert tally.read(tally.make(tmp_path / "tally")) == (0, 0)

"""A participant whose handlers a test can hold: `saga participant tests.crash.workers:app`, any number of processes.

A worker notes each handler that it enters, after the handler's write and before its end. One whose name begins with
"holds" goes no further until the file `release` is there.
"""

from __future__ import annotations

import asyncio
import os
from datetime import timedelta
from pathlib import Path
from typing import Final

from pydantic import BaseModel
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncSession

from saga import ActivityContext, Participant, Saga
from saga.app import App
from tests.crash.books import bookings
from tests.plugins.watch import CANARY

NOTES: Final = "notes"
RELEASE: Final = "release"


class Job(BaseModel):
    id: str
    card: str = CANARY


works = Participant("works", start_to_close=timedelta(seconds=float(os.environ.get("WORKERS_LIMIT", "30"))))


@works.activity(no_compensation="its effect is a line in the books")
async def work(job: Job, session: AsyncSession, context: ActivityContext) -> None:
    row = {"run": context.run_id, "step": context.step, "direction": "forward", "delta": 0}
    await session.execute(insert(bookings).values(row))
    place, name = Path(os.environ["WORKERS_PLACE"]), os.environ["WORKERS_NAME"]
    with (place / NOTES).open("a") as notes:
        notes.write(f"{name} {job.id}\n")
    while name.startswith("holds") and not (place / RELEASE).exists():  # noqa: ASYNC110
        await asyncio.sleep(0.02)


jobs = Saga("jobs", Job).step(work)

if "WORKERS_DATABASE" in os.environ:
    app = App(
        os.environ["WORKERS_DATABASE"],
        broker=os.environ["WORKERS_BROKER"],
        namespace=os.environ["WORKERS_NAMESPACE"],
        participants=[works],
        pool_size=24,  # a handler that is held keeps its connection
    )

"""Processes that start sagas, or run them, and are killed while they do. `python -m tests.client.callers` forks them.

The forge has everything imported before it forks. It reads jobs as JSON lines: a job with a scene is forked, answered
with the process's id; a job with a `pid` is answered with that process's status, `null` while it runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from sqlalchemy import insert

import saga.brokers.rabbitmq
import saga.storage.sqlalchemy.schema  # noqa: F401
from saga import SagaError, failpoints
from saga.clock import SystemClock
from tests.client.shop import SECONDS_MAX, Order, Place, orders, purchase

ROOT: Final = Path(__file__).parents[2]
Job = dict[str, Any]


async def one_id(place: Place, job: Job) -> None:
    """Start one id again and again, two at a time, now and then with another input; write what came of each."""
    said = Path(job["said"]).open("a", buffering=1)  # noqa: ASYNC230, SIM115 - kept open until the kill

    async def once(n: int) -> None:
        input = Order(item="pen" if n % 5 == 4 else "book")
        try:
            word = str((await client.start(purchase, input, id="one")).run_id)
        except SagaError as error:
            word = type(error).__name__
        said.write(f"{input.item} {word}\n")

    async with place.app().as_client() as client:
        for n in range(0, job["starts"], 2):
            await asyncio.gather(once(n), once(n + 1))


async def order(place: Place, job: Job) -> None:
    """Write an order and start its saga in one transaction, and die on the way."""

    def reached(where: str) -> None:
        if job["dies"] == where:
            os.kill(os.getpid(), signal.SIGKILL)

    async with place.app().as_client() as client, place.session() as session:
        reached("before begin")
        await session.execute(insert(orders).values(id=job["id"]))
        await client.start(purchase, Order(), id=job["id"], session=session)
        reached("after the insert")
        await session.commit()
        reached("after commit")


async def serve(place: Place, job: Job) -> None:
    """Run coordinator and participants until killed."""
    async with place.app():
        await asyncio.Event().wait()


SCENES: Final[dict[str, Callable[[Place, Job], Awaitable[None]]]] = {
    "one id": one_id,
    "order": order,
    "serve": serve,
}


class Forge:
    """Forks processes that have everything imported."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.client.callers"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._children: list[int] = []

    def fork(self, place: Place, scene: str, *, fail: str = "", **job: Any) -> int:
        """Start a process; return its id."""
        where = [place.stack, place.url, place.broker_url, place.namespace]
        pid = int(self._ask({"scene": scene, "place": where, "fail": fail, **job}))
        self._children.append(pid)
        return pid

    def status(self, pid: int) -> int | None:
        """Return how a process ended, negative for the signal that ended it; None while it runs."""
        status = self._ask({"pid": pid})
        if status is not None:
            self._children.remove(pid)
        return status

    async def end(self, pid: int) -> int:
        """Wait until a process has ended."""
        clock = SystemClock()
        until = clock.monotonic() + SECONDS_MAX
        while (status := self.status(pid)) is None:
            assert clock.monotonic() < until, "the process lives"
            await clock.sleep(0.02)
        return status

    def _ask(self, job: Job) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end_all(self) -> None:
        """Kill what still runs."""
        for pid in list(self._children):
            if self.status(pid) is None:
                os.kill(pid, signal.SIGKILL)
                while self.status(pid) is None:
                    pass

    def close(self) -> None:
        self.end_all()
        self._process.communicate()


def run(job: Job) -> None:
    signal.alarm(int(SECONDS_MAX) * 2)
    stack, url, broker_url, namespace = job["place"]
    place = Place(stack, url, broker_url)
    place.namespace = namespace
    failpoints.arm(job["fail"])
    asyncio.run(SCENES[job["scene"]](place, job))  # type: ignore[arg-type]


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        if "pid" in job:
            pid, status = os.waitpid(job["pid"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(job)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(child, flush=True)


if __name__ == "__main__":
    main()

"""One process of a measured system: `python -m benchmarks.worker SPEC`, told by lines of JSON what to do.

It says `ready`, then obeys `load` (coordinators), `profile` and `report`, and ends when its standard input does, so
that it never outlives whoever started it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from dataclasses import asdict
from typing import Any

from benchmarks import systems, tally, workloads
from benchmarks.load import Load
from benchmarks.profiling import Profiler
from saga.cli import collector


def say(**words: Any) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


async def serve(spec: systems.Spec) -> None:
    """Start, obey, stop."""
    system = systems.make(spec)
    await system.start()
    try:
        say(said="ready")
        orders = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
        profiler: Profiler | None = None
        pending: set[asyncio.Task[None]] = set()
        while line := await orders.readline():
            order = json.loads(line)
            if order["do"] == "load":
                task = asyncio.create_task(_load(system, order))
                pending.add(task)
                task.add_done_callback(pending.discard)
            elif order["do"] == "profile":
                profiler = Profiler(order["how"])
                profiler.start()
            elif order["do"] == "report" and profiler is not None:
                say(said="profile", text=profiler.stop(order["top"]))
    finally:
        await system.stop()


async def _load(system: systems.System, order: dict[str, Any]) -> None:
    load = Load(system.execute, workloads.transfers(order["seed"]), order["in_flight"])
    try:
        measured = await load.run(
            warm_seconds=order["warm_seconds"],
            seconds=order["seconds"],
            mark=lambda what: say(said=what),
        )
    except Exception as error:
        say(said="failed", text=f"{type(error).__name__}: {error}")
    else:
        say(said="measured", **asdict(measured))


def main() -> None:
    logging.basicConfig(
        level="WARNING", format="%(process)d %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    spec = systems.Spec(**json.loads(sys.argv[1]))
    if spec.tally is not None:
        tally.count_into(spec.tally)
    if spec.system == "saga":
        collector.spare()  # as `saga coordinator` and `saga participant` do
    asyncio.run(serve(spec))


if __name__ == "__main__":
    main()

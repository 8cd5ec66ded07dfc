"""`python -m examples.money_transfer demo` plays the scenarios, `load` plays many transfers at once.

Both exit with 0 only if all went as expected.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Final

from examples.money_transfer import everywhere
from examples.money_transfer.faults import SABOTAGES
from examples.money_transfer.layouts import LAYOUTS, Embedded, Layout, Servers, on_servers
from examples.money_transfer.load import REDRIVE_SECONDS, Load, opening
from examples.money_transfer.processes import DemoError
from examples.money_transfer.runner import Runner
from examples.money_transfer.scenarios import SCENARIOS

ALL: Final = "all"
EACH: Final = "one after the other, those of separate processes"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.money_transfer", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    demo = verbs.add_parser("demo", help="play the scenarios")
    demo.add_argument("--stack", choices=[*LAYOUTS, ALL], default="sqlite", help=f"{ALL}: {EACH}")
    demo.add_argument("--seed", type=int, help="of the crash points; by default a new one each time")
    names = [scenario.name for scenario in SCENARIOS]
    demo.add_argument("--scenario", action="append", choices=names, help="play only this one (repeatable)")
    demo.add_argument("--database-each", action="store_true", help="on servers: not schemas but databases")
    demo.add_argument("--sabotage", choices=SABOTAGES, default="", help=argparse.SUPPRESS)
    load = verbs.add_parser("load", help="play many transfers at once, on one SQLite file or on servers")
    load.add_argument("--transfers", type=int, default=1_000)
    load.add_argument("--accounts", type=int, default=8, help="at least one at each of the two banks")
    load.add_argument("--concurrency", type=int, default=32)
    load.add_argument("--seed", type=int, help="of what is transferred; by default a new one each time")
    for verb in (demo, load):  # `make demo DATABASE=... BROKER=...` says them where `ps` does not show them
        verb.add_argument(
            "--database",
            metavar="URL",
            default=os.environ.get("DEMO_ON_DATABASE", ""),
            help="a PostgreSQL or MariaDB that is there, as one who may make databases and roles; they go at the end",
        )
        verb.add_argument(
            "--broker",
            metavar="URL",
            default=os.environ.get("DEMO_ON_BROKER", ""),
            help="a RabbitMQ or Kafka that is there; without one the database is the broker",
        )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _leave)
    seed = random.randrange(1_000_000) if options.seed is None else options.seed
    try:
        return _load(options, seed) if options.verb == "load" else _demo(options, seed)
    except DemoError as error:
        print(f"{options.verb}: {error}", file=sys.stderr)
        return 2


def _demo(options: argparse.Namespace, seed: int) -> int:
    chosen = [each for each in SCENARIOS if not options.scenario or each.name in options.scenario]
    if options.stack == ALL:
        layouts = {name: LAYOUTS[name] for name in everywhere.STACKS}
        return 0 if everywhere.play(layouts, chosen, seed=seed, tell=_tell) else 1
    with _layout(options) as layout:
        _introduce(layout, seed)
        return 0 if Runner(layout, seed=seed, tell=_tell).run(chosen) else 1


def _load(options: argparse.Namespace, seed: int) -> int:
    if min(options.transfers, options.accounts - 1, options.concurrency) < 1:
        raise DemoError("there are at least one transfer, two accounts and a concurrency of one")
    accounts = opening(options.accounts)
    layout_type: type[Layout] = _on_servers(options) or Embedded
    layout = layout_type(opening=accounts)
    layout.environment["DEMO_REDRIVE_SECONDS"] = str(REDRIVE_SECONDS)
    with layout:
        _introduce(layout, seed)
        load = Load(layout, accounts, concurrency=options.concurrency, seed=seed)
        return 0 if load.play(options.transfers, tell=_tell, bar=sys.stderr) else 1


def _introduce(layout: Layout, seed: int) -> None:
    _tell(f"money transfer, {layout.title}")
    if layout.makes:
        _tell(f"made for it and removed at its end: {layout.makes}")
    _tell(f"seed {seed}")


def _on_servers(options: argparse.Namespace) -> type[Servers] | None:
    return on_servers(options.database, options.broker) if options.database or options.broker else None


def _layout(options: argparse.Namespace) -> Layout:
    layout = _on_servers(options) or LAYOUTS[options.stack]
    if issubclass(layout, Servers):
        return layout(options.sabotage, database_each=options.database_each)
    return layout(options.sabotage)


def _tell(line: str) -> None:
    print(line, flush=True)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

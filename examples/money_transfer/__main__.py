"""`python -m examples.money_transfer demo`: plays the scenarios and exits with 0 only if all went as expected."""

from __future__ import annotations

import argparse
import random
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from examples.money_transfer.faults import SABOTAGES
from examples.money_transfer.layouts import LAYOUTS, Layout, Servers
from examples.money_transfer.processes import DemoError
from examples.money_transfer.runner import Runner
from examples.money_transfer.scenarios import SCENARIOS


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.money_transfer", description=__doc__)
    demo = parser.add_subparsers(dest="verb", required=True).add_parser("demo", help="play the scenarios")
    demo.add_argument("--stack", choices=list(LAYOUTS), default="sqlite")
    demo.add_argument("--seed", type=int, help="of the crash points; by default a new one each time")
    names = [scenario.name for scenario in SCENARIOS]
    demo.add_argument("--scenario", action="append", choices=names, help="play only this one (repeatable)")
    demo.add_argument("--database-each", action="store_true", help="on servers: not schemas but databases")
    demo.add_argument("--sabotage", choices=SABOTAGES, default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _leave)
    seed = random.randrange(1_000_000) if options.seed is None else options.seed
    chosen = [each for each in SCENARIOS if not options.scenario or each.name in options.scenario]
    try:
        with _layout(options) as layout:
            print(f"money transfer, {layout.title}\nseed {seed}")
            return 0 if Runner(layout, seed=seed, tell=_tell).run(chosen) else 1
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


def _layout(options: argparse.Namespace) -> Layout:
    layout = LAYOUTS[options.stack]
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

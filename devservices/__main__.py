"""Command line: `python -m devservices ensure postgres kafka` and `python -m devservices run postgres -- CMD`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from devservices import packages, processes, reaper
from devservices.base import Unavailable
from devservices.provide import PROVIDERS, URL_VARIABLES

_GRACE_SECONDS = 15.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m devservices", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    ensure = verbs.add_parser("ensure", help="install the server programs that are missing (Debian, as root)")
    ensure.add_argument("services", nargs="+", choices=sorted(PROVIDERS))
    run = verbs.add_parser("run", help="start services, run a command with their addresses, end them")
    run.add_argument("services", nargs="+", choices=sorted(PROVIDERS))
    own, command = _split(list(sys.argv[1:] if arguments is None else arguments))
    options = parser.parse_args(own)
    if options.verb == "ensure":
        return _ensure(options.services)
    if not command:
        parser.error("run needs a command: python -m devservices run postgres rabbitmq -- COMMAND ...")
    return _run(options.services, command)


def _ensure(names: list[str]) -> int:
    problems = packages.ensure(names)
    for problem in problems:
        print(f"services: {problem}", file=sys.stderr)
    if not problems:
        print(f"services: {', '.join(names)} can be had")
    return 1 if problems else 0


def _run(names: list[str], command: list[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    with contextlib.ExitStack() as stack:
        environment = dict(os.environ)
        for name in names:
            try:
                server = stack.enter_context(PROVIDERS[name]())
            except Unavailable as error:
                print(f"services: {name} is unavailable: {error}", file=sys.stderr)
                return 1
            print(f"services: {server.description}", flush=True)
            environment[URL_VARIABLES[name]] = server.url
            environment[URL_VARIABLES[name].replace("_TEST_", "_DEMO_")] = server.url
        return _run_command(command, environment)


def _run_command(command: list[str], environment: dict[str, str]) -> int:
    """Run it to its end; when we are told to end, it is told first, so that it finds its servers alive."""
    try:
        # With the token, whatever the command leaves behind is found and ended after it.
        child = subprocess.Popen(command, env={**environment, reaper.TOKEN: processes.guard().token})
    except OSError as error:
        print(f"services: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    processes.guard().add_process(child.pid)
    try:
        status = child.wait()
        return status if status >= 0 else 128 - status
    except BaseException as stopped:
        # Ctrl-C reaches the child by itself (same terminal); any other end of ours is passed on.
        if not isinstance(stopped, KeyboardInterrupt):
            child.terminate()
        try:
            child.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        raise


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

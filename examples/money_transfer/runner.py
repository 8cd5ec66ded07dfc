"""The one runner of all scenarios in all layouts: play, read the books, compare with the table, and tell.

A scenario is as expected if every transfer of it ended as the table says, the ledgers hold exactly the rows that the
table says, balances agree with the ledgers, no money came or went, and its fault fired.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from examples.money_transfer.books import Books
from examples.money_transfer.faults import LATE, BankDown, Copies, Crash, LostReply, RefundImpossible, logged
from examples.money_transfer.layouts import STARTER, Environment, Layout
from examples.money_transfer.scenarios import Scenario
from examples.money_transfer.stage import OUTCOME, Event, Outcome
from examples.money_transfer.transfer import Transfer
from saga.failpoints import POINTS

TOLD_BY_PLACE: Final = {STARTER: "the process"}

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Injection:
    """A fault as it is injected into processes: how to say it, the environment of each, and how to count it."""

    story: str
    environments: Mapping[str, Environment]
    fired: Callable[[Counter[str]], int]


class Runner:
    """Runs scenarios one after the other in a layout."""

    def __init__(self, layout: Layout, *, seed: int, tell: Tell = print) -> None:
        self._layout = layout
        self._random = random.Random(seed)
        self._tell = tell
        self._opening = layout.auditor.read()
        self._numbers: Counter[str] = Counter()
        self.seen: dict[str, bool] = {}
        """Which scenarios have run, by name, and whether each went as expected."""

    def run(self, scenarios: Sequence[Scenario]) -> bool:
        """Run the scenarios; return whether all were as expected. The last line told is the sum."""
        before = self._opening.total
        for number, scenario in enumerate(scenarios, 1):
            self._tell(f"\n{number}  {scenario.name}: {scenario.story}")
            problems = [
                problem
                for injection in self._injections(scenario)
                for problem in self._play(scenario, injection)
            ]
            for problem in problems:
                self._tell(f"   NOT AS EXPECTED: {problem}")
            if not problems:
                self._tell("   as expected")
            self.seen[scenario.name] = not problems
        good = sum(self.seen.values())
        after = self._layout.auditor.read().total
        self._tell(
            f"\ndemo: {good} of {len(scenarios)} scenarios as expected; total before {before}, after {after}"
        )
        return good == len(scenarios) and before == after

    # --- one transfer -------------------------------------------------------------------------

    def _play(self, scenario: Scenario, injection: Injection | None) -> Iterator[str]:
        """Play one transfer of a scenario, tell what happened, and yield what is wrong."""
        order = self._order(scenario)
        before = self._layout.auditor.read().total
        self._tell(f"   {order.id}: {order.amount} from {order.source} to {order.target}")
        faults = {} if injection is None else injection.environments
        if injection is not None:
            self._tell(f"   fault: {injection.story}")
        played = self._layout.play(order, faults)
        outcome = OUTCOME.validate_json(played.report)
        for line in outcome.history:
            self._tell(f"   {line.milliseconds:7} ms  {told(line)}")
        books = self._layout.auditor.read()
        self._tell(f"   {ending(outcome)}; {written(books, order.id)}")
        yield from self._wrong(scenario, outcome, books, order.id)
        if books.total != before:
            yield f"there were {before} in all, and now there are {books.total}"
        if injection is not None:
            fired = injection.fired(played.deaths)
            self._tell(f"   fault fired: {fired} time{'' if fired == 1 else 's'}")
            if fired == 0:
                yield "its fault never fired"

    def _order(self, scenario: Scenario) -> Transfer:
        name = scenario.name.replace(" ", "-")
        self._numbers[name] += 1
        number = self._numbers[name]
        return Transfer(
            id=f"{name}-{number}", source=scenario.source, target=scenario.target, amount=scenario.amount
        )

    def _wrong(self, scenario: Scenario, outcome: Outcome, books: Books, transfer: str) -> Iterator[str]:
        if (outcome.status, outcome.reason) != (scenario.ends, scenario.reason):
            yield f"it ended {outcome.status} {outcome.reason}, and should have ended {scenario.ends} {scenario.reason}"
        moved = tuple((move.kind, move.account, move.delta) for move in books.of(transfer))
        if moved != scenario.ledger:
            yield f"the ledgers say {moved}, and should say {scenario.ledger}"
        notified = books.notified.count(transfer)
        if notified != scenario.notifications:
            yield f"{notified} notifications instead of {scenario.notifications}"
        for account, balance in books.balances.items():
            by_ledger = self._opening.balances[account] + books.moved(account)
            if balance != by_ledger:
                yield f"{account} has {balance}, and by the ledger {by_ledger}"

    # --- faults -------------------------------------------------------------------------------

    def _injections(self, scenario: Scenario) -> Iterator[Injection | None]:
        """Yield one entry for each transfer that the scenario plays in this layout."""
        match scenario.fault:
            case None:
                yield None
            case LostReply(step):
                log = self._layout.directory / "lost-replies"
                yield Injection(
                    f"the first reply of {step} is lost",
                    {self._layout.home(step): {"DEMO_LOSE_REPLY_OF": step, "DEMO_FAULT_LOG": str(log)}},
                    lambda _: len(logged(log)),
                )
            case BankDown(step, attempts):
                log = self._layout.directory / "bank-down"
                down = {"DEMO_BANK_DOWN": step, "DEMO_BANK_DOWN_ATTEMPTS": str(attempts)}
                yield Injection(
                    f"the first {attempts} attempts of {step} fail",
                    {self._layout.home(step): {**down, "DEMO_FAULT_LOG": str(log)}},
                    lambda _: len(logged(log)),
                )
            case RefundImpossible(step):
                log = self._layout.directory / "refund-impossible"
                frozen = {"DEMO_REFUND_IMPOSSIBLE": step, "DEMO_FAULT_LOG": str(log)}
                yield Injection(
                    f"the undo of {step} is refused until a person has seen to it, who then orders a retry",
                    {self._layout.home(step): frozen, STARTER: frozen},
                    lambda _: len(logged(log)),
                )
            case Copies(late):
                log = self._layout.directory / "copies"
                copying = {"DEMO_COPY_AND_DELAY": late, "DEMO_FAULT_LOG": str(log)}
                yield Injection(
                    f"every message is sent twice, and the command of {late} again after the end",
                    dict.fromkeys((*self._layout.services, STARTER), copying),
                    lambda _: len(logged(log)) * (LATE in logged(log)),
                )
            case Crash():
                for victim in self._layout.victims(self._random):
                    yield self._crash(scenario, victim)

    def _crash(self, scenario: Scenario, victim: str) -> Injection:
        """Draw a point among those that a run without faults passes in the victim, and which pass of it."""
        passes = self._dry_run(scenario, victim)
        point = self._random.choice(sorted(passes))
        at = self._random.randint(1, passes[point])
        place = TOLD_BY_PLACE.get(victim, victim)
        self._tell(f"   a dry run passes {len(passes)} points in {place}: {' '.join(sorted(passes))}")
        return Injection(
            f"SIGKILL of {place} at {point} ({POINTS[point]}), pass {at} of {passes[point]}",
            {victim: {"SAGA_FAIL": f"{point}:kill:n={at}"}},
            lambda deaths: deaths[victim],
        )

    def _dry_run(self, scenario: Scenario, victim: str) -> Counter[str]:
        """Return which points each of two runs without faults passes in a process, and how often at least."""
        log = self._layout.directory / f"points-{victim}"
        passes: list[Counter[str]] = []
        for _ in range(
            2
        ):  # how often a sweep passes a point depends on time: the least of both will be passed again
            self._layout.play(self._order(scenario), {victim: {"SAGA_FAIL_LOG": str(log)}})
            passes.append(Counter(log.read_text().split()) - sum(passes, Counter()))
        return passes[0] & passes[1]


# --- how it is told ---------------------------------------------------------------------------


def told(line: Event) -> str:
    """Return one line of history as people say it."""
    what = line.step or ""
    undo = line.direction == "compensate"
    said = {
        "SagaStarted": "started",
        "ActivityCompleted": f"{what} done",
        "ActivityRefused": f"{what} refused ({line.detail.get('code')})",
        "ActivityFailed": f"{what} failed ({line.detail.get('error')})",
        "CompensationCompleted": f"{what} undone",
        "CompensationRefused": f"undo of {what} refused ({line.detail.get('code')})",
        "CompensationFailed": f"undo of {what} failed ({line.detail.get('error')})",
        "RetryRequested": "the operator orders a retry",
        "TimerFired": f"no answer to {'undo of ' if undo else ''}{what}",
    }.get(line.event, f"{line.event} {what}".strip())
    if sent := line.detail.get("sent"):
        step, direction, attempt, new = sent
        again = " again" if new == "resend" else ""
        if line.event == "TimerFired" and attempt > 1 and not again:
            said = f"time for attempt {attempt}"
        return f"{said}; {'undo of ' if direction == 'compensate' else ''}{step} sent{again}"
    status = line.detail.get("status", "")
    return f"{said}; {status}" if status in ("completed", "compensated", "needs_attention") else said


def ending(outcome: Outcome) -> str:
    """Return how a transfer ended."""
    return f"{outcome.status}, {outcome.reason}" if outcome.reason else outcome.status


def written(books: Books, transfer: str) -> str:
    """Return what the ledgers say of a transfer."""
    rows = ", ".join(f"{move.kind} {move.account} {move.delta:+}" for move in books.of(transfer))
    notified = books.notified.count(transfer)
    return f"ledgers: {rows or 'nothing'}" + (f"; notified {notified}x" if notified else "")

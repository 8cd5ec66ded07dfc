"""`saga start | cancel | terminate | abandon | retry | mark-done | skip`: what operators order, one instance or many.

A verb takes an ID, or options that say which instances are meant. Of many, what would change is shown first, and after
it is confirmed each is done in a commit of its own, with its own outcome.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final
from uuid import UUID

import typer

from saga.cli.apps import ActorOption, AppOption, JsonOption, SagaOption, YesOption, confirm, run, who
from saga.cli.errors import FINDING, described
from saga.cli.look import FingerprintOption, PrefixOption, StateOption, StepOption, filter_of
from saga.cli.output import document, say, table, visible
from saga.client import Client
from saga.clock import SystemClock
from saga.engine.state import Status
from saga.engine.verbs import UNEXPLAINED, Moved, Verb
from saga.operations import Ordered
from saga.storage.base import Filter
from saga.views import Description

SETTLE_SECONDS: Final = 5.0
"""How long a verb that settles by hand waits to tell whether what was in flight is closed."""

IdArgument = Annotated[str | None, typer.Argument(metavar="[ID]", help="id or run id", show_default=False)]
ReasonOption = Annotated[
    str, typer.Option("--reason", "--evidence", help="why; kept in the audit row", show_default=False)
]
ForceOption = Annotated[bool, typer.Option("--force", help="leave the effects that stand")]
AllOption = Annotated[bool, typer.Option("--all", help="every instance that the options mean")]
PreviewOption = Annotated[bool, typer.Option("--preview", help="only say what would change")]


def start(
    app: AppOption,
    saga: Annotated[str, typer.Argument(metavar="SAGA", show_default=False)],
    input: Annotated[str, typer.Argument(metavar="JSON|@FILE|-", help="its input", show_default=False)],
    id: Annotated[str | None, typer.Option("--id", help="business key", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Start a saga, once per id; the same id and input again is the same run."""
    raw = _read(input)

    async def work(client: Client) -> dict[str, str]:
        handle = await client.start_json(saga, raw, id=id)
        return {"saga": handle.saga, "id": handle.id, "run_id": str(handle.run_id)}

    started = run(app, work)
    if as_json:
        document(started)
    else:
        say(f"{visible(started['saga'])} {visible(started['id'])} run {started['run_id']}")


def _read(input: str) -> bytes:
    if input == "-":
        return sys.stdin.buffer.read()
    if not input.startswith("@"):
        return input.encode()
    try:
        return Path(input[1:]).read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{visible(input[1:])!r}: {error.strerror}", param_hint="JSON") from None


HELP: Final = {
    Verb.CANCEL: "Stop going forward and undo what was done.",
    Verb.RETRY: "Try now what waits for its next attempt or stands still.",
    Verb.MARK_DONE: "Settle a failed compensation that was done by hand; --reason says where that can be seen.",
    Verb.SKIP: "Settle a failed compensation by leaving its effect as it is.",
    Verb.TERMINATE: "Stop at once, without undo; --force where effects stand.",
    Verb.ABANDON: "Give up an instance that needs attention.",
}


def command(verb: Verb) -> Callable[..., None]:
    """Return the command of a verb."""

    def order(
        app: AppOption,
        id: IdArgument = None,
        all_of_them: AllOption = False,
        saga: SagaOption = None,
        state: StateOption = None,
        step: StepOption = None,
        id_prefix: PrefixOption = "",
        fingerprint: FingerprintOption = None,
        reason: ReasonOption = "",
        force: ForceOption = False,
        preview: PreviewOption = False,
        actor: ActorOption = "",
        yes: YesOption = False,
        as_json: JsonOption = False,
    ) -> None:
        if (id is None) != all_of_them:
            raise typer.BadParameter(f"give an ID, or --all with options that say which: saga {verb} --help")
        if force and verb is not Verb.TERMINATE:
            raise typer.BadParameter("only terminate can be forced", param_hint="--force")
        if not reason and not preview:
            reason = "none given" if verb in UNEXPLAINED else typer.prompt("Reason", err=True)
        asked = Asked(
            verb, app, reason, force, who(actor), yes or (verb is Verb.RETRY and id is not None), as_json
        )
        if id is not None:
            _order_one(asked, id, saga, preview)
        else:
            _order_many(asked, (saga, state, step, id_prefix, fingerprint), preview)

    order.__doc__ = HELP[verb]
    return order


@dataclass(frozen=True, slots=True)
class Asked:
    """What was typed, whichever instances it is for."""

    verb: Verb
    app: str
    reason: str
    force: bool
    actor: str
    yes: bool
    as_json: bool


Where = tuple[str | None, list[Status] | None, str | None, str, str | None]


def _order_one(asked: Asked, id: str, saga: str | None, preview: bool) -> None:
    async def look(client: Client) -> Sequence[Ordered]:
        found = await client.look_up(id, saga=saga)
        return await client.preview(asked.verb, Filter(run_id=found.run_id), force=asked.force)

    planned = run(asked.app, look)
    if preview:
        _tell(planned, asked.as_json)
        return
    (one,) = planned
    if one.outcome == "possible":
        confirm(f"{asked.verb} {visible(one.saga)} {visible(one.id)}?", asked.yes)

    async def work(client: Client) -> tuple[Moved, Description]:
        moved = await client.order(
            asked.verb, one.run_id, reason=asked.reason, actor=asked.actor, force=asked.force
        )
        return moved, await _settled(client, one.run_id)

    moved, seen = run(asked.app, work)
    if asked.as_json:
        document({"run_id": one.run_id, "moved": moved, "settlement": seen.settlement})
        return
    sends = f"; sends {visible(moved.sends)}" if moved.sends else ""
    say(f"{asked.verb}: {moved.before} -> {moved.after}{sends}")
    if seen.settlement is not None:
        say(f"what was in flight: {seen.settlement}")


async def _settled(client: Client, run_id: UUID) -> Description:
    """Describe the instance, waiting a little while what was in flight is not yet confirmed (P26)."""
    clock = SystemClock()
    until = clock.monotonic() + SETTLE_SECONDS
    while True:
        seen = await client.describe_run(run_id)
        if seen.settlement != "not yet confirmed" or clock.monotonic() >= until:
            return seen
        await clock.sleep(0.2)


def _order_many(asked: Asked, where: Where, preview: bool) -> None:
    async def look(client: Client) -> Sequence[Ordered]:
        return await client.preview(asked.verb, filter_of(client, *where), force=asked.force)

    if preview or not asked.yes:
        planned = run(asked.app, look)
        if preview:
            _tell(planned, asked.as_json)
            return
        table(*_rows(planned), err=True)
        confirm(f"{asked.verb} these {sum(each.outcome == 'possible' for each in planned)}?", asked.yes)

    async def work(client: Client) -> list[Ordered]:
        ordering = client.order_all(
            asked.verb, filter_of(client, *where), reason=asked.reason, actor=asked.actor, force=asked.force
        )
        return [each async for each in ordering]

    done = run(asked.app, work)
    _tell(done, asked.as_json)
    if any(each.outcome != "done" for each in done):
        raise typer.Exit(FINDING)


def _tell(ordered: Sequence[Ordered], as_json: bool) -> None:
    if as_json:
        document({"instances": [_plain(each) for each in ordered]})
    else:
        table(*_rows(ordered))


def _rows(ordered: Sequence[Ordered]) -> tuple[Sequence[str], list[Sequence[object]]]:
    return ("saga", "id", "outcome", "from", "to", "sends", "why not"), [
        (
            each.saga,
            each.id,
            each.outcome,
            each.moved and each.moved.before,
            each.moved and each.moved.after,
            each.moved and each.moved.sends,
            each.error and each.error.text,
        )
        for each in ordered
    ]


def _plain(each: Ordered) -> dict[str, Any]:
    return {
        "run_id": each.run_id,
        "saga": each.saga,
        "id": each.id,
        "outcome": each.outcome,
        "moved": each.moved,
        "error": None if each.error is None else described(each.error),
    }

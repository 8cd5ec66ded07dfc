"""`saga list | show | incidents | dead-letters | outbox`: what operators look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final
from uuid import UUID

import typer
from pydantic_core import from_json

from saga.cli.apps import AppOption, JsonOption, SagaOption, YesOption, confirm, run
from saga.cli.errors import FINDING
from saga.cli.output import document, moment, say, table, visible
from saga.cli.show import draw
from saga.client import Client
from saga.engine.state import Status
from saga.operations import Page
from saga.outbox.parking import DETAIL_HEADER
from saga.storage.base import (
    AuditEntry,
    DeadLetter,
    Filter,
    IncidentGroup,
    OutboxStatus,
    ParkedRow,
    Payload,
)
from saga.views import Description

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="id or run id", show_default=False)]
LimitOption = Annotated[int, typer.Option("--limit", min=1, max=1_000, help="how many at most")]
BelowOption = Annotated[
    str | None, typer.Option("--below", help="next page: the last id of the page before", show_default=False)
]
FingerprintOption = Annotated[
    str | None,
    typer.Option("--fingerprint", help="of an open incident, or of dead letters", show_default=False),
]
StateOption = Annotated[
    list[Status] | None, typer.Option("--state", help="any of these; may be repeated", show_default=False)
]
StepOption = Annotated[str | None, typer.Option("--step", help="waits at this step", show_default=False)]
PrefixOption = Annotated[str, typer.Option("--id-prefix", help="ids that begin so", show_default=False)]


def filter_of(
    client: Client,
    saga: str | None,
    states: list[Status] | None,
    step: str | None,
    id_prefix: str,
    fingerprint: str | None,
) -> Filter:
    """Return the filter that the options say."""
    return Filter(
        saga=saga,
        statuses=tuple(states or ()),
        steps=None if step is None else tuple(client.at_step(step, saga)),
        id_prefix=id_prefix,
        fingerprint=fingerprint,
    )


def listing(
    app: AppOption,
    saga: SagaOption = None,
    state: StateOption = None,
    step: StepOption = None,
    id_prefix: PrefixOption = "",
    fingerprint: FingerprintOption = None,
    below: BelowOption = None,
    limit: LimitOption = 100,
    as_json: JsonOption = False,
) -> None:
    """List instances, newest first."""
    last = None if below is None else uuid_of(below, "--below")

    async def work(client: Client) -> tuple[Page, int]:
        where = filter_of(client, saga, state, step, id_prefix, fingerprint)
        return await client.list(where, below=last, limit=limit), await client.count(where)

    page, count = run(app, work)
    if as_json:
        document({"instances": page.instances, "next": page.next, "count": count})
        return
    table(
        ("saga", "id", "state", "step", "started", "closed", "run"),
        [
            (
                each.saga,
                each.id,
                each.status,
                each.step,
                moment(each.created_at),
                moment(each.closed_at),
                each.run_id,
            )
            for each in page.instances
        ],
    )
    if page.next is not None:
        say(f"{'10,000+' if count > 10_000 else count} in all; next page: --below {page.next}")


def show(
    app: AppOption,
    id: IdArgument,
    saga: SagaOption = None,
    payloads: Annotated[
        bool, typer.Option("--payloads", help="show inputs, outputs and what failures said too")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Draw one run: steps, compensations, attempts, times, what is in doubt and what it waits for."""

    async def work(client: Client) -> tuple[Description, Sequence[AuditEntry], Sequence[Payload]]:
        found = await client.look_up(id, saga=saga)
        kept = await client.payloads(found) if payloads else ()
        return await client.describe_run(found), await client.audit(found), kept

    seen, audit, kept = run(app, work)
    if as_json:
        more = {"payloads": [{**each._asdict(), "data": from_json(each.data)} for each in kept]}
        settled = {"instance": seen, "settlement": seen.settlement, "audit": audit}
        document(settled | more if payloads else settled)
        return
    draw(seen, audit)
    for each in kept:
        say(f"{visible(each.step or 'saga')} {each.kind}: {visible(each.data.decode())}")


def incidents(
    app: AppOption, saga: SagaOption = None, limit: LimitOption = 100, as_json: JsonOption = False
) -> None:
    """List open incidents, grouped by their cause; `saga list --fingerprint` shows the instances of a group."""

    async def work(client: Client) -> Any:
        return await client.incidents(saga, limit=limit)

    groups: list[IncidentGroup] = run(app, work)
    if as_json:
        document({"incidents": groups})
        return
    table(
        ("fingerprint", "instances", "kind", "saga", "step", "error", "first seen", "last seen"),
        [
            (
                each.fingerprint,
                each.instances,
                each.kind,
                each.saga,
                each.step or None,
                each.error,
                moment(each.first_seen_at),
                moment(each.last_seen_at),
            )
            for each in groups
        ],
    )


def outbox(app: AppOption, as_json: JsonOption = False) -> None:
    """Say what waits to be sent, and which keys the broker would not take."""

    async def work(client: Client) -> OutboxStatus:
        return await client.outbox()

    status = run(app, work)
    if as_json:
        document(status)
        return
    oldest = "" if status.oldest_seconds is None else f", the oldest for {status.oldest_seconds:.0f} s"
    say(f"pending: {status.pending}{oldest}; delayed: {status.delayed}")
    if status.blocked:
        table(("key", "reason", "attempts"), status.blocked)


# --- dead letters -----------------------------------------------------------------------------

dead_letters: Final = typer.Typer(help="Messages that could not be handled.", no_args_is_help=True)
ChannelOption = Annotated[str | None, typer.Option("--channel", help="of this channel", show_default=False)]


@dead_letters.command("list")
def list_dead_letters(
    app: AppOption,
    channel: ChannelOption = None,
    fingerprint: FingerprintOption = None,
    below: BelowOption = None,
    limit: LimitOption = 100,
    as_json: JsonOption = False,
) -> None:
    """List parked messages, newest first, without their bodies."""
    last = None if below is None else uuid_of(below, "--below")

    async def work(client: Client) -> Any:
        return await client.dead_letters(channel=channel, fingerprint=fingerprint, below=last, limit=limit)

    found: list[DeadLetter] = run(app, work)
    if as_json:
        document({"dead_letters": found})
        return
    table(
        ("id", "channel", "reason", "fingerprint", "bytes", "parked"),
        [
            (each.id, each.channel, each.reason, each.fingerprint, each.body_bytes, moment(each.parked_at))
            for each in found
        ],
    )


@dead_letters.command("show")
def show_dead_letter(
    app: AppOption,
    id: Annotated[str, typer.Argument(metavar="ID", show_default=False)],
    payloads: Annotated[bool, typer.Option("--payloads", help="show headers and body too")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a parked message; its headers and body only with --payloads."""
    wanted = uuid_of(id, "ID")

    async def work(client: Client) -> ParkedRow:
        return await client.dead_letter(wanted)

    row = run(app, work)
    shown: dict[str, Any] = {
        "id": id,
        "channel": row.channel,
        "reason": row.reason,
        "fingerprint": row.fingerprint,
        "content_type": row.content_type,
        "body_bytes": len(row.body),
    }
    if DETAIL_HEADER in row.headers:
        shown["detail"] = row.headers[DETAIL_HEADER]
    if payloads:
        shown |= {"headers": dict(row.headers), "body": row.body.decode("utf-8", "backslashreplace")}
    if as_json:
        document(shown)
        return
    for name, value in shown.items():
        say(f"{name.replace('_', ' ') + ':':14} {visible(value)}")


@dead_letters.command()
def redrive(
    app: AppOption,
    id: Annotated[str | None, typer.Argument(metavar="[ID]", show_default=False)] = None,
    channel: ChannelOption = None,
    fingerprint: FingerprintOption = None,
    all_of_them: Annotated[bool, typer.Option("--all", help="every one that matches")] = False,
    body: Annotated[
        Path | None,
        typer.Option(
            "--body",
            exists=True,
            dir_okay=False,
            help="send what this file holds instead",
            show_default=False,
        ),
    ] = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send parked messages again: one by its id, edited with --body, or --all that match; forgotten once confirmed."""
    if (id is None) != all_of_them or (all_of_them and body is not None):
        raise typer.BadParameter("give an ID, or --all with --channel or --fingerprint as you wish")
    edited = None if body is None else body.read_bytes()
    wanted = None if id is None else uuid_of(id, "ID")
    if all_of_them:
        confirm("Send all of them again?", yes)

    async def work(client: Client) -> list[tuple[UUID, str]]:
        if wanted is not None:
            return [(wanted, await client.redrive(wanted, body=edited))]
        return [each async for each in client.redrive_all(channel=channel, fingerprint=fingerprint)]

    outcomes = run(app, work)
    if as_json:
        document({"redriven": [{"id": each, "outcome": outcome} for each, outcome in outcomes]})
    else:
        table(("id", "outcome"), outcomes)
    if any(outcome != "confirmed" for _, outcome in outcomes):
        raise typer.Exit(FINDING)


def uuid_of(text: str, what: str) -> UUID:
    """Return the UUID that was typed."""
    try:
        return UUID(text)
    except ValueError:
        raise typer.BadParameter(f"{visible(text)!r} is no UUID", param_hint=what) from None

"""What operators do and look at: verbs, lists, incidents by cause, dead letters, the outbox. `Client` has all of it.

    await client.cancel(handle, reason="customer called")
    await client.retry(run_id, reason="the bank is back")
    async for done in client.order_all("retry", Filter(fingerprint="5f0c…"), reason="fixed in 2.4.1"):
        print(done.run_id, done.outcome)

A verb is carried out by `decide` like everything that moves an instance, with one audit row in the same commit (P16).
`run` is a handle or a run id. `actor` names who ordered it, `reason` why; both stand in the audit row, so they hold no
secrets. Needed is only the database: commands that a verb sends leave through the outbox.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol
from uuid import UUID

from saga.definition.registry import Registry
from saga.engine.verbs import UNEXPLAINED, Moved, Verb
from saga.errors import (
    DeadLetterNotFound,
    PastPivot,
    ReasonRequired,
    SagaError,
    SagaNotFound,
    SeveralFound,
    VerbNotAllowed,
)
from saga.storage.base import (
    AuditEntry,
    DeadLetter,
    DeadLetterStore,
    Filter,
    IncidentGroup,
    Loaded,
    OperatorStore,
    OutboxStatus,
    ParkedRow,
    Payload,
)
from saga.views import Summary, summary

if TYPE_CHECKING:
    from saga.storage.base import CallersSession

PAGE: Final = 100
PAGE_MAX: Final = 1_000
COUNT_MAX: Final = 10_000
REASON_LENGTH_MAX: Final = 1_000


class HasRunId(Protocol):
    """A handle."""

    @property
    def run_id(self) -> UUID:
        """The run."""
        ...


class Orders(Protocol):
    """What carries verbs out: the coordinator's, in any process of its database."""

    async def order(
        self, verb: Verb, run_id: UUID, *, actor: str, reason: str, force: bool = False, session: Any = None
    ) -> Moved:
        """Do a verb. Raises PastPivot, VerbNotAllowed, SagaNotFound, UnknownSaga, having written nothing."""
        ...

    def preview(self, verb: Verb, loaded: Loaded, *, force: bool = False) -> Moved:
        """Say what it would do, and write nothing."""
        ...


Run = UUID | HasRunId
Resend = Callable[[ParkedRow], Awaitable[str]]
"""Publishes a parked message on its channel; returns `confirmed`, `unroutable`, `refused` or `unknown`."""


@dataclass(frozen=True, slots=True)
class Page:
    """Instances, newest first. `next` is what the call for the next page takes as `below`; None on the last page."""

    instances: tuple[Summary, ...]
    next: UUID | None


@dataclass(frozen=True, slots=True)
class Ordered:
    """What a verb did to one instance of many, or would do."""

    run_id: UUID
    saga: str
    id: str
    outcome: str
    """`done` (or `possible` in a preview), `not_allowed`, `gone`, `failed`."""
    moved: Moved | None
    error: SagaError | None


class Operations:
    """Verbs and views of one namespace."""

    def __init__(
        self,
        registry: Registry,
        store: OperatorStore,
        parking: DeadLetterStore,
        verbs: Orders,
        *,
        namespace: str,
        resend: Resend,
    ) -> None:
        self._registry = registry
        self._operators = store
        self._parking = parking
        self._verbs = verbs
        self._namespace = namespace
        self._resend = resend

    # --- verbs --------------------------------------------------------------------------------

    async def cancel(
        self, run: Run, *, reason: str = "", actor: str = "client", session: CallersSession | None = None
    ) -> Moved:
        """Stop going forward and undo what was done; a running action is waited for first (E-07).

        One that compensates already, or has ended, stays as it is. Joins the caller's transaction if `session` is
        given. Raises PastPivot, SagaNotFound, UnknownSaga.
        """
        return await self._order(Verb.CANCEL, run, actor, reason, session=session)

    async def retry(self, run: Run, *, reason: str = "", actor: str = "client") -> Moved:
        """Send the attempt that waits for its time now; where nothing waits, ask for the answer once more.

        For a failed compensation, a step that fails past the pivot, and an instance that was set apart. Raises
        VerbNotAllowed, SagaNotFound, UnknownSaga.
        """
        return await self._order(Verb.RETRY, run, actor, reason)

    async def mark_done(self, run: Run, *, evidence: str, actor: str = "client") -> Moved:
        """Settle a failed compensation that was done by hand; the others go on.

        What of it is still in flight is closed first (P26), so the next undo waits until its participant confirms
        that, and `describe().settlement` tells. `evidence` says where it can be seen. Raises VerbNotAllowed,
        ReasonRequired, SagaNotFound, UnknownSaga.
        """
        return await self._order(Verb.MARK_DONE, run, actor, evidence)

    async def skip(self, run: Run, *, reason: str, actor: str = "client") -> Moved:
        """Settle a failed compensation by leaving the effect as it is; else as `mark_done`."""
        return await self._order(Verb.SKIP, run, actor, reason)

    async def terminate(self, run: Run, *, reason: str, force: bool = False, actor: str = "client") -> Moved:
        """Stop at once, without undo; the effects that stand are kept in history and audit.

        `force` where there are any. Raises VerbNotAllowed, ReasonRequired, SagaNotFound, UnknownSaga.
        """
        return await self._order(Verb.TERMINATE, run, actor, reason, force=force)

    async def abandon(self, run: Run, *, reason: str, actor: str = "client") -> Moved:
        """Give up an instance that needs attention; else as `terminate`."""
        return await self._order(Verb.ABANDON, run, actor, reason)

    async def order(
        self, verb: str, run: Run, *, reason: str, actor: str = "client", force: bool = False
    ) -> Moved:
        """Carry out a verb by its name, as the methods above do. Raises ValueError for a word that is none."""
        wanted = Verb(verb)
        return await self._order(wanted, run, actor, reason, force=force)

    async def _order(
        self,
        verb: Verb,
        run: Run,
        actor: str,
        reason: str,
        *,
        force: bool = False,
        session: Any = None,
    ) -> Moved:
        missing = verb not in UNEXPLAINED and not reason.strip()
        if missing or len(reason) > REASON_LENGTH_MAX or "\0" in reason + actor:
            raise ReasonRequired(
                f"{verb} takes a reason of 1 to {REASON_LENGTH_MAX} characters, without NUL."
            )
        return await self._verbs.order(
            verb, _id_of(run), actor=actor, reason=reason, force=force, session=session
        )

    # --- many ---------------------------------------------------------------------------------

    async def preview(self, verb: str, where: Filter, *, force: bool = False) -> Sequence[Ordered]:
        """Say what `order_all` would do to each instance now, and write nothing. At most 1,000."""
        found = await self._operators.list(where, None, PAGE_MAX)
        loaded = await self._operators.load([row.run_id for row in found])
        answers = []
        for row in found:
            there = loaded.get(row.run_id)
            try:
                if there is None:
                    raise SagaNotFound(saga=row.saga, saga_id=row.saga_id)
                moved = self._verbs.preview(Verb(verb), there, force=force)
                answers.append(Ordered(row.run_id, row.saga, row.saga_id, "possible", moved, None))
            except SagaError as error:
                answers.append(Ordered(row.run_id, row.saga, row.saga_id, _outcome(error), None, error))
        return answers

    async def order_all(
        self, verb: str, where: Filter, *, reason: str, actor: str = "client", force: bool = False
    ) -> AsyncIterator[Ordered]:
        """Do a verb on every instance that matches when this begins, oldest first, each in its own commit.

        Yields what became of each; one that cannot be done stops no other. Begun again after a crash it finds those
        that still match.
        """
        runs: list[tuple[UUID, str, str]] = []
        below: UUID | None = None
        while page := await self._operators.list(where, below, PAGE_MAX):
            runs += [(row.run_id, row.saga, row.saga_id) for row in page]
            below = page[-1].run_id
        for run_id, saga, saga_id in reversed(runs):
            try:
                moved = await self.order(verb, run_id, reason=reason, actor=actor, force=force)
                yield Ordered(run_id, saga, saga_id, "done", moved, None)
            except ReasonRequired:
                raise
            except SagaError as error:
                yield Ordered(run_id, saga, saga_id, _outcome(error), None, error)

    # --- looking ------------------------------------------------------------------------------

    async def list(self, where: Filter = Filter(), *, below: UUID | None = None, limit: int = PAGE) -> Page:
        """Return instances, newest first, as of the last commit. `limit` is capped at 1,000."""
        size = max(1, min(limit, PAGE_MAX))
        rows = await self._operators.list(where, below, size + 1)
        found = tuple(
            summary(row, self._registry.get(row.saga, row.saga_version), self._namespace)
            for row in rows[:size]
        )
        return Page(found, found[-1].run_id if len(rows) > size else None)

    async def look_up(self, text: str, *, saga: str | None = None) -> Summary:
        """Return the instance that a person means by its id or its run id: of an id, the latest run.

        Raises SagaNotFound, and SeveralFound if sagas of different names have that id.
        """
        page = await self.list(Filter(saga=saga, id=text), limit=PAGE)
        found = {each.saga: each for each in reversed(page.instances)}
        if not found and (run_id := _uuid(text)) is not None:
            found = {each.saga: each for each in (await self.list(Filter(run_id=run_id))).instances}
        if len(found) > 1:
            raise SeveralFound(
                f"{len(found)} sagas have this id: {', '.join(sorted(found))}. Say which one.", saga_id=text
            )
        for only in found.values():
            return only
        raise SagaNotFound(
            "There is no instance of this id or run id in this namespace.", saga=saga, saga_id=text
        )

    async def count(self, where: Filter = Filter(), *, exact: bool = False) -> int:
        """Return how many instances there are: exact up to 10,000, and 10,001 for more unless `exact`."""
        return await self._operators.count(where, 2**62 if exact else COUNT_MAX + 1)

    def at_step(self, name: str, saga: str | None = None) -> Collection[tuple[str, int, int]]:
        """Return what `Filter.steps` needs to find instances whose outstanding command is of the step `name`."""
        return [
            (definition.name, definition.version, index)
            for definition in self._registry.definitions()
            if saga in (None, definition.name)
            for index, step in enumerate(definition.steps)
            if step.name == name
        ]

    async def audit(self, run: Run) -> Sequence[AuditEntry]:
        """Return the orders carried out on an instance, oldest first."""
        return await self._operators.audit(_id_of(run))

    async def payloads(self, run: Run) -> Sequence[Payload]:
        """Return what an instance took and gave, and what its failures said: the only place where that is shown."""
        return await self._operators.payloads(_id_of(run))

    async def incidents(self, saga: str | None = None, *, limit: int = PAGE) -> Sequence[IncidentGroup]:
        """Return open incidents grouped by fingerprint, the largest group first."""
        return await self._operators.incident_groups(saga, max(1, min(limit, PAGE_MAX)))

    async def outbox(self) -> OutboxStatus:
        """Return what waits to be sent."""
        return await self._operators.outbox()

    # --- dead letters -------------------------------------------------------------------------

    async def dead_letters(
        self,
        *,
        channel: str | None = None,
        fingerprint: str | None = None,
        below: UUID | None = None,
        limit: int = PAGE,
    ) -> Sequence[DeadLetter]:
        """Return parked messages, newest first, without their bodies; `below` is the id of the last one seen."""
        return await self._operators.dead_letters(channel, fingerprint, below, max(1, min(limit, PAGE_MAX)))

    async def dead_letter(self, id: UUID) -> ParkedRow:
        """Return a parked message whole: bytes, headers, reason. Raises DeadLetterNotFound."""
        row = await self._parking.read(id)
        if row is None:
            raise DeadLetterNotFound(f"There is no dead letter {id} in this namespace.")
        return row

    async def redrive(self, id: UUID, *, body: bytes | None = None) -> str:
        """Send a parked message again, and forget it once the broker has confirmed and routed it.

        As it was, or with an edited `body`. Returns `confirmed`, `unroutable`, `refused` or `unknown`; with the last
        three it stays parked. A crash after the confirm leaves it parked too: the second copy meets the barrier. Raises
        DeadLetterNotFound.
        """
        row = await self.dead_letter(id)
        outcome = await self._resend(row if body is None else row._replace(body=body))
        if outcome == "confirmed":
            await self._parking.delete(id)
        return outcome

    async def redrive_all(
        self, *, channel: str | None = None, fingerprint: str | None = None
    ) -> AsyncIterator[tuple[UUID, str]]:
        """Redrive every message that matches when this begins, and yield the outcome of each."""
        ids: list[UUID] = []
        below: UUID | None = None
        while page := await self._operators.dead_letters(channel, fingerprint, below, PAGE_MAX):
            ids += [row.id for row in page]
            below = page[-1].id
        for id in reversed(ids):
            try:
                yield id, await self.redrive(id)
            except DeadLetterNotFound:
                yield id, "gone"


def _id_of(run: Run) -> UUID:
    return run if isinstance(run, UUID) else run.run_id


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


def _outcome(error: SagaError) -> str:
    if isinstance(error, PastPivot | VerbNotAllowed):
        return "not_allowed"
    return "gone" if isinstance(error, SagaNotFound) else "failed"

"""K-01, L-10: two tenants on one database and one broker. What one does never shows nor touches what the other has."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import uuid
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Final

import pytest
from pydantic import BaseModel

from saga import App, Handle, Participant, Refused, Saga, SagaError
from saga.brokers.base import Channel
from saga.errors import SagaNotFound
from saga.messages import (
    Reply,
    command_id,
    commands_channel,
    decode_commands,
    encode_reply,
    parking_channel,
    replies_channel,
)
from saga.storage.sqlalchemy import tables
from tests.doors.bad import written
from tests.doors.place import Place, until

CALLS: Final = 120
MARKER: Final = "blue-7c11"
"""Stands in every string that the other tenant owns: ids, payloads, outputs, codes."""
WAIT: Final = timedelta(seconds=20)


class Order(BaseModel):
    text: str
    way: str = "done"


class Receipt(BaseModel):
    text: str


def desk() -> Participant:
    owner = Participant("desk", start_to_close=timedelta(seconds=10))

    @owner.activity
    async def note(order: Order) -> Receipt:
        return Receipt(text=order.text)

    @note.compensation
    async def strike_out(order: Order) -> None: ...

    @owner.activity(no_compensation="it is the last")
    async def take(order: Order) -> Receipt:
        if order.way == "refused":
            raise Refused("no", details={"text": order.text})
        return Receipt(text=order.text)

    return owner


PARTICIPANT: Final = desk()
NOTE, TAKE = PARTICIPANT.activities["note"], PARTICIPANT.activities["take"]
errand: Saga[Order, Receipt] = Saga("errand", Order).step(NOTE).step(TAKE).returns(TAKE.out)


def tenant(place: Place, namespace: str) -> App:
    return place.app(sagas=[errand], participants=[PARTICIPANT], namespace=namespace)


async def checksum(place: Place, namespace: str) -> str:
    """Return a digest of every row that a tenant has, in every table that knows tenants."""
    digest = hashlib.sha256()
    for table in tables.metadata.sorted_tables:
        if "namespace" in table.c and table.name not in ("saga_lease", "saga_outbox"):
            # leases are renewed and rows of the outbox confirmed by the tenant itself meanwhile
            rows = await place.rows(f"SELECT * FROM {table.name} WHERE namespace = :ns", ns=namespace)
            digest.update("\n".join(sorted(str(tuple(row)) for row in rows)).encode())
    return digest.hexdigest()


class Mine:
    """One tenant making calls, good and bad, with all that it may have learned of the other: names, ids, channels."""

    def __init__(self, place: Place, app: App, theirs: list[Handle[Any]], other: str, seed: int) -> None:
        self.place = place
        self.app = app
        self.chance = random.Random(seed)
        self.theirs = theirs
        self.other = other
        self.seen: list[str] = []
        self.handles: list[Handle[Any]] = []
        self.calls: list[Callable[[], Awaitable[object]]] = [
            self.start, self.start_their_id, self.find_their_id, self.describe, self.describe_theirs,
            self.result, self.result_of_theirs, self.cancel_theirs, self.reply_for_theirs, self.command_of_theirs,
            self.reply_that_says_it_is_theirs, self.their_values,
        ]  # fmt: skip

    async def go(self, count: int) -> None:
        for _ in range(count):
            call = self.chance.choice(self.calls)
            try:
                self.saw(await call())
            except SagaError as error:
                self.saw([error, error.text, getattr(error, "details", None)])

    def saw(self, shown: object) -> None:
        self.seen.append(f"{shown!r} {shown}")

    def one_of_theirs(self) -> Handle[Any]:
        return self.chance.choice(self.theirs)

    async def start(self) -> object:
        way = self.chance.choice(("done", "refused"))
        handle = await self.app.client.start(errand, Order(text="red", way=way), id=f"r{len(self.handles)}")
        self.handles.append(handle)
        return handle.id

    async def start_their_id(self) -> object:
        """The same business id is another saga here, whatever it is there."""
        theirs = self.one_of_theirs()
        handle = await self.app.client.start(errand, Order(text="red"), id=theirs.id.replace(MARKER, "red"))
        assert handle.run_id != theirs.run_id
        return await handle.describe()

    async def find_their_id(self) -> object:
        with pytest.raises(SagaNotFound) as caught:
            await self.app.client.find(errand, self.one_of_theirs().id)
        return caught.value.code

    async def describe(self) -> object:
        return [await handle.describe() for handle in self.handles[-3:]]

    async def describe_theirs(self) -> object:
        with pytest.raises(SagaNotFound) as caught:
            await self.app.client.handle(errand, self.one_of_theirs().run_id).describe()
        return caught.value.code

    async def result(self) -> object:
        return await self.handles[-1].result(timeout=WAIT) if self.handles else None

    async def result_of_theirs(self) -> object:
        handle = self.app.client.handle(errand, self.one_of_theirs().run_id)
        return await handle.result(timeout=timedelta(milliseconds=20))

    async def cancel_theirs(self) -> object:
        assert self.app._running is not None
        verbs: Any = self.app._running.client
        cancel = getattr(verbs, "cancel", None) or verbs._canceller.cancel
        with pytest.raises(SagaNotFound) as caught:
            await cancel(self.one_of_theirs().run_id, actor="me", reason="mischief")
        return caught.value.code

    async def reply_for_theirs(self) -> object:
        """A reply in our namespace and channel, for a run of theirs and with its true command id."""
        await self.place.send(replies_channel(self.app.namespace), [self._reply(self.app.namespace)])
        return None

    async def reply_that_says_it_is_theirs(self) -> object:
        """The same with their namespace, in our channel."""
        await self.place.send(replies_channel(self.app.namespace), [self._reply(self.other)])
        return None

    def _reply(self, namespace: str) -> bytes:
        run = str(self.one_of_theirs().run_id)
        reply = Reply(
            id=str(uuid.UUID(int=self.chance.getrandbits(128))),
            namespace=namespace,
            saga="errand",
            sagaid="x",
            runid=run,
            step="take",
            direction="forward",
            commandid=command_id(self.other, "errand", run, "take", 0, 0, "forward"),
            attempt=1,
            outcome="done",
        )
        return encode_reply(reply, b'{"output":{"text":"red"},"undo":null}')

    async def command_of_theirs(self) -> object:
        """A command that says it is theirs, and one that wants its reply sent to them, in our channel."""
        namespace, other = self.app.namespace, self.other
        data = {"text": "red"}
        await self.place.send(
            commands_channel(namespace, "desk"),
            [
                written(other, data=data),
                written(namespace, replyto=replies_channel(other), data=data),
                written(namespace, namespace=other, data=data),
            ],
        )
        return None

    async def their_values(self) -> object:
        """What an instance of theirs put down, asked for by its true keys."""
        from saga.storage.base import ValueKey

        run = self.one_of_theirs().run_id
        store: Any = self.app.client._store
        keys = [ValueKey(run, step, 0, 0, kind) for step in ("note", "take") for kind in ("output", "input")]
        found = await store.read_values(keys)
        assert found == {}
        return found


@pytest.mark.feature("K-01", acceptance=True)
@pytest.mark.feature("L-10", acceptance=True)
@pytest.mark.parametrize("seed", [20_261_121])
async def test_random_calls_of_one_tenant_neither_show_nor_touch_the_other(place: Place, seed: int) -> None:
    """K-01, L-10: their marker is in nothing that we get, and their rows are the same to the byte."""
    red, blue = place.namespace, f"{place.namespace}-b"
    async with tenant(place, blue) as theirs:
        handles = [
            await theirs.client.start(errand, Order(text=MARKER, way=way), id=f"{MARKER}-{number}")
            for number, way in enumerate(("done", "refused", "done"))
        ]
        await asyncio.gather(*(handle.result(timeout=WAIT) for handle in handles), return_exceptions=True)
        await until(lambda: _no_outbox(place, blue), "their commands are confirmed and swept")
        before = await checksum(place, blue)
        async with tenant(place, red) as ours:
            mine = Mine(place, ours, handles, blue, seed)
            await mine.go(CALLS)
            await until(lambda: place.drained(place.replies), "our replies are handled")
            await until(lambda: place.drained(commands_channel(red, "desk")), "our commands are handled")
            for handle in mine.handles:
                await asyncio.wait({asyncio.ensure_future(handle.result(timeout=WAIT))})
        assert await checksum(place, blue) == before, f"seed {seed}"
        assert (await handles[0].result(timeout=WAIT)).text == MARKER
    shown = " ".join(mine.seen)
    assert MARKER not in shown, f"seed {seed}"
    assert len(mine.seen) == CALLS
    parked = await place.rows("SELECT DISTINCT namespace, reason FROM saga_parked")
    assert {tuple(row) for row in parked} == {(red, "foreign_namespace"), (red, "unknown_run")}
    assert await place.rows("SELECT count(*) FROM saga_audit") == [(0,)], "no verb reached anybody"


async def _no_outbox(place: Place, namespace: str) -> bool:
    rows = await place.rows("SELECT count(*) FROM saga_outbox WHERE namespace = :ns", ns=namespace)
    return bool(rows[0][0] == 0)


@pytest.mark.feature("K-01")
async def test_one_process_serves_several_namespaces_with_the_same_ids_in_each(place: Place) -> None:
    """The same business ids, the same definitions, one process: nobody gets the other's result."""
    names = [f"{place.namespace}-{letter}" for letter in "cd"]
    async with tenant(place, names[0]) as first, tenant(place, names[1]) as second:
        results = await asyncio.gather(
            *(
                app.client.execute(errand, Order(text=f"{app.namespace} {number}"), id=f"t-{number}")
                for app in (first, second)
                for number in range(10)
            )
        )
    assert [result.text for result in results] == [f"{name} {n}" for name in names for n in range(10)]


@pytest.mark.feature("L-10")
async def test_a_reply_that_says_it_is_of_another_saga_or_step_is_parked_though_its_command_id_is_right(
    place: Place,
) -> None:
    """Every nested id is looked at again: what a reply carries must not land under another step's name."""
    wire = await place.wire()
    await wire.declare([Channel(place.commands, parking_channel(place.commands))])
    consumer = await wire.consume(place.commands, prefetch=10)
    async with place.app(sagas=[errand], participants=[]) as app:
        handle = await app.client.start(errand, Order(text="red"), id="x")
        (delivery,) = await consumer.receive()
        (command,) = decode_commands(delivery.body)

        def reply(**otherwise: Any) -> bytes:
            said = {"saga": "errand", "step": "note", **otherwise}
            answer = Reply(
                id="m",
                namespace=place.namespace,
                sagaid="x",
                runid=command.runid,
                direction="forward",
                commandid=command.commandid,
                attempt=1,
                outcome="done",
                **said,
            )
            return encode_reply(answer, b'{"output":{"text":"red"},"undo":null}')

        await place.send(place.replies, [reply(step="take"), reply(saga="other"), reply(step="os-system")])

        async def parked() -> bool:
            return await place.count("saga_parked") == 3

        await until(parked, "all three are parked")
        assert (await handle.describe()).status == "running"
        assert await place.count("saga_value") == 0
        await place.send(place.replies, [reply()])

        async def goes_on() -> bool:
            return await place.count("saga_value") > 0

        await until(goes_on, "the true reply is taken")
    await consumer.close()
    rows = await place.rows("SELECT reason, body FROM saga_parked")
    assert {(row.reason, json.loads(bytes(row.body))["sagaid"]) for row in rows} == {("contrary_ids", "x")}

"""What is not exactly a message is parked, and what is not exactly its payload is answered: never run, never lost."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from saga.brokers.base import Channel
from saga.errors import MessageInvalid
from saga.messages import (
    DEPTH_MAX,
    PACK_COUNT_MAX,
    Reply,
    apart,
    command_id,
    decode_commands,
    decode_replies,
    encode_reply,
    pack,
    parking_channel,
)
from tests.doors.bad import HEAVY, TABLE, TEXTS, Bad, command, written
from tests.doors.place import Order, Place, Replies, errand, until
from tests.plugins.watch import CANARY

MEGABYTE = 1024 * 1024
PAGE = 4096
ROUNDS = 5
GROWTH_MAX = 20 * MEGABYTE
PURE = [each for each in TABLE if each.ends == "parked" and each.says]


@pytest.mark.feature("L-01")
@pytest.mark.stack("pure")
@pytest.mark.parametrize("bad", PURE, ids=lambda bad: bad.name)
def test_what_is_no_message_is_refused_with_what_is_wrong_and_never_with_a_value(bad: Bad) -> None:
    with pytest.raises(MessageInvalid) as caught:
        decode_commands(bad.body("default"))

    assert CANARY not in f"{caught.value!r} {caught.value.text} {caught.value.__notes__}"
    assert caught.value.__cause__ is None


@pytest.mark.feature("L-01")
@pytest.mark.stack("pure")
@pytest.mark.parametrize("bad", TEXTS, ids=lambda bad: bad.name)
def test_one_bad_envelope_of_a_batch_leaves_the_others(bad: Bad) -> None:
    """Also where only its own bytes tell what is wrong with it, as with a name that stands in it twice."""
    good = written("default")
    envelope = bad.body("default")
    body, _ = pack([good, envelope, good])

    with pytest.raises(MessageInvalid):
        decode_commands(body)
    parts = list(apart(body, decode_commands))
    if len(parts) == 1:
        assert bad.says == "json_invalid", "only what is no JSON at all takes its neighbours with it"
        return
    assert [(part, message is None) for part, message, _ in parts] == [
        (good, False),
        (envelope, True),
        (good, False),
    ]


@pytest.mark.feature("L-02")
@pytest.mark.stack("pure")
def test_depth_64_is_read_and_65_is_not() -> None:
    def nested(depth: int, leaf: str) -> bytes:
        text = json.dumps(command("default", data="here"))
        return text.replace('"here"', "[" * depth + leaf + "]" * depth).encode()

    for leaf in ("", "1", '"[{"'):
        assert decode_commands(nested(DEPTH_MAX - 1, leaf))
        with pytest.raises(MessageInvalid):
            decode_commands(nested(DEPTH_MAX, leaf))
        batch, _ = pack([nested(3, leaf)] * (PACK_COUNT_MAX - 1) + [nested(DEPTH_MAX, leaf)])
        with pytest.raises(MessageInvalid):
            decode_commands(batch)
        batch, _ = pack([nested(3, leaf)] * PACK_COUNT_MAX)
        assert len(decode_commands(batch)) == PACK_COUNT_MAX


@pytest.mark.feature("L-01")
@pytest.mark.stack("pure")
def test_brackets_colons_and_quotes_within_texts_mean_nothing() -> None:
    for text in ('{"a":1,"a":2}', "[" * 100, '":', "\\", 'NaN"', "\u2028"):
        (read,) = decode_commands(written("default", data={"number": 1, "raw": text, text: text}))
        assert read.data["raw"] == text


@pytest.mark.feature("L-01", acceptance=True)
async def test_no_bad_message_gets_in_and_none_is_lost(place: Place) -> None:
    """L-01: on each broker all of the table goes in at once; each is parked or answered, and the desk goes on."""
    assert len(TABLE) >= 60
    wire = await place.wire()
    await wire.declare([Channel(place.replies, parking_channel(place.replies))])
    bodies = [(bad, bad.body(place.namespace)) for bad in TABLE]
    answered = [bad for bad in TABLE if bad.ends == "answered"]
    async with place.app(sagas=[]):
        replies = Replies(await wire.consume(place.replies, prefetch=1_000))
        taken = await place.send(place.commands, [*(body for _, body in bodies), written(place.namespace)])
        parked = [(bad, body) for bad, body in bodies if bad.ends == "parked" and body in taken]
        assert len(parked) + len(answered) >= len(TABLE) - 2, "only 10 MiB may be too much for a broker"

        async def settled() -> bool:
            enough = len(replies.by_command) > len(answered)
            return enough and await place.count("saga_parked") >= len(parked)

        await until(settled, "all of the table is parked or answered")
        await until(lambda: place.drained(place.commands), "nothing is held back")
        await replies.stop()
    assert replies.outcomes == {"failed": len(answered), "done": 1}
    said = [json.dumps(reply.data) for reply in replies.by_command.values() if reply.outcome == "failed"]
    for bad in answered:
        assert any("payload_invalid" in each and bad.says in each for each in said), bad.name
    rows = await place.rows("SELECT reason, headers, fingerprint, body FROM saga_parked")
    assert len(rows) == len(parked), "each is parked once"
    details = {bytes(row.body): row.headers for row in rows}
    for bad, body in parked:
        part = body.strip()[1:-1].strip() if body.startswith(b"[") else body
        assert bad.says in details.get(body, details.get(part, "lost")), bad.name
    assert {row.reason for row in rows} == {"message_invalid", "foreign_namespace"}
    shown = [f"{row.reason} {row.headers} {row.fingerprint}" for row in rows]
    assert CANARY not in " ".join([*shown, *said]), "a path, never a value"


@pytest.mark.feature("L-01")
async def test_a_coordinator_takes_no_bad_reply_and_goes_on(place: Place) -> None:
    """The same for what comes back: unknown runs, other namespaces, names twice, depth, size."""
    run = "01890a5d-ac96-774b-bcce-b302099a8057"
    good = Reply(
        id="m",
        namespace=place.namespace,
        saga="errand",
        sagaid="e-1",
        runid=run,
        step="take",
        direction="forward",
        commandid=command_id(place.namespace, "errand", run, "take", 0, 0, "forward"),
        attempt=1,
        outcome="done",
    )
    raw = encode_reply(good, b'{"output":{"reference":"r"},"undo":null}')
    bad = [
        raw.replace(b'"attempt":1', b'"attempt":1,"attempt":1'),
        raw.replace(b'"undo":null', b'"undo":' + b"[" * 70 + b"]" * 70),
        raw.replace(b'"undo":null', b'"undo":"' + b"x" * 600_000 + b'"'),
        raw.replace(b'"step":"take"', b'"step":"os.system"'),
        raw.replace(place.namespace.encode(), b"other"),
        raw.replace(run.encode(), CANARY.encode()),
        raw.replace(b'"outcome":"done"', b'"outcome":"os.system"'),
        written(place.namespace),
        b"[]",
        b"[[]]",
        raw,  # nothing is wrong with it, but nobody runs that run
    ]
    async with place.app() as app:
        await place.send(place.replies, [*bad, pack([bad[0], bad[1], bad[0]])[0]])
        assert (await app.client.execute(errand, Order(number=7))).reference == "r-7"

        async def settled() -> bool:
            return await place.count("saga_parked") >= len(bad) + 3 and await place.drained(place.replies)

        await until(settled, "each bad reply is parked")
    reasons = Counter(row[0] for row in await place.rows("SELECT reason FROM saga_parked"))
    assert reasons == {"message_invalid": len(bad) - 2 + 3, "foreign_namespace": 1, "unknown_run": 1}


@pytest.mark.feature("L-02")
@pytest.mark.stack("pure")
@pytest.mark.parametrize("bad", HEAVY, ids=lambda bad: bad.name)
def test_what_is_too_large_or_too_deep_is_refused_before_it_costs_memory(bad: Bad) -> None:
    body = bad.body("default")
    for decode in (decode_commands, decode_replies):
        tracemalloc.start()
        try:
            with pytest.raises(MessageInvalid):
                decode(body)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < MEGABYTE


@pytest.mark.feature("L-02", acceptance=True)
async def test_what_is_too_large_or_too_deep_is_parked_and_leaves_no_memory_taken(place: Place) -> None:
    """L-02: 10 MiB, depth 100,000, 5,000 digits; each twice to warm up, and thrice to see what stays.

    What stays does so every time; a single growth is the allocator's, or another test's.
    """
    assert len(HEAVY) >= 8
    bodies = [bad.body(place.namespace) for bad in HEAVY]
    async with place.app(sagas=[]):
        sizes: list[int] = []
        taken: list[bytes] = []
        for round in range(1, ROUNDS + 1):
            taken = await place.send(place.commands, bodies)

            async def parked(count: int = round * len(taken)) -> bool:
                return await place.count("saga_parked") >= count

            await until(parked, "all are parked")
            gc.collect()
            sizes.append(_resident())
        assert min(after - before for before, after in pairwise(sizes[1:])) < GROWTH_MAX
    lengths = await place.rows("SELECT length(body) FROM saga_parked")
    assert sorted(row[0] for row in lengths) == sorted(ROUNDS * [len(body) for body in taken]), (
        "byte for byte"
    )


def _resident() -> int:
    """Return the bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

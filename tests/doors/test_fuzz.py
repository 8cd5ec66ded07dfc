"""Raw bytes on the queues: random ones, and real messages with bits turned. Nobody dies and each is accounted for."""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Final

import pytest

from saga.brokers.base import Channel, OutMessage, PublishOutcome
from saga.errors import MessageInvalid
from saga.messages import (
    Reply,
    command_id,
    decode_commands,
    decode_replies,
    encode_reply,
    pack,
    parking_channel,
)
from tests.doors.bad import written
from tests.doors.place import Order, Place, Replies, errand, until

FULL: Final = 10_000
SCALE: Final = 0.2
COUNT: Final = int(os.environ.get("SAGA_TEST_FUZZ", FULL * SCALE))
"""Messages per broker, three of four of them commands, the others replies; SAGA_TEST_FUZZ=10000 is the long form."""
SEED: Final = 20_261_121


def mutated(chance: random.Random, real: bytes) -> bytes:
    """A real message, spoilt in one of many ways, or bytes that never were one."""
    way = chance.randrange(8)
    raw = bytearray(real)
    if way <= 2:
        for _ in range(chance.choice((1, 1, 1, 2, 8, 64))):
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    elif way == 3:
        del raw[chance.randrange(len(raw)) :]
    elif way == 4:
        start = chance.randrange(len(raw))
        del raw[start : start + chance.randrange(1, 40)]
    elif way == 5:
        place = chance.randrange(len(raw))
        raw[place:place] = chance.randbytes(chance.randrange(1, 20))
    elif way == 6:
        return chance.randbytes(chance.randrange(1, 400))
    return bytes(raw)  # 7: as it was


@pytest.mark.feature("L-01", scale=SCALE)
@pytest.mark.feature("F-09", scale=SCALE)
async def test_whatever_bytes_come_as_commands_each_is_run_or_parked(place: Place) -> None:
    """F29: by the number in its header, every message is parked, or answered by its command id, or (unknown) both."""
    chance = random.Random(SEED)
    bodies = [mutated(chance, written(place.namespace)) for _ in range(COUNT * 3 // 4)]
    wanted: dict[str, int] = {}
    for number, body in enumerate(bodies):
        try:
            (command,) = decode_commands(body)
        except (MessageInvalid, ValueError):
            continue
        if command.namespace == place.namespace:
            wanted[command.commandid] = number
    wire = await place.wire()
    await wire.declare([Channel(place.replies, parking_channel(place.replies))])
    async with place.app(sagas=[]):
        replies = Replies(await wire.consume(place.replies, prefetch=1_000))
        await numbered(place, place.commands, bodies)
        await place.send(place.commands, [written(place.namespace, commandid="f" * 32)])

        async def settled() -> bool:
            if "f" * 32 not in replies.by_command or not await place.drained(place.commands):
                return False
            return await place.count("saga_parked") + len(wanted) >= len(bodies)

        await until(settled, "the queue is empty and everything has an end")
        await replies.stop()
    del replies.by_command["f" * 32]
    parked = Counter(int(row[0]) for row in await numbers_parked(place))
    assert set(parked.values()) == {1}, "none is parked twice"
    answered = {wanted[command] for command in replies.by_command}
    unknown = {
        wanted[command]
        for command, reply in replies.by_command.items()
        if isinstance(reply.data, dict) and reply.data.get("error") == "unknown_activity"
    }
    assert set(parked) | answered == set(range(len(bodies))), f"seed {SEED}: something was lost"
    assert set(parked) & answered == unknown
    assert len(answered) > len(bodies) / 10 < len(parked), "both ends are reached often"


@pytest.mark.feature("L-01", scale=SCALE)
@pytest.mark.feature("F-09", scale=SCALE)
async def test_whatever_bytes_come_as_replies_each_is_recorded_or_parked(place: Place) -> None:
    """F29: replies to a run that has ended change nothing: those that can be read are stale, all others are parked."""
    async with place.app() as app:
        handle = await app.client.start(errand, Order(number=1), id="e-1")
        await handle.result()
        run = str(handle.run_id)
        real = Reply(
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
        raw = encode_reply(real, b'{"output":{"reference":"r-2"},"undo":null}')
        chance = random.Random(SEED)
        bodies = [mutated(chance, raw) for _ in range(COUNT // 4)]
        await numbered(place, place.replies, [*bodies, pack([raw, raw[:-1] + b",}", raw])[0]])

        async def settled() -> bool:
            ended = await place.count("saga_parked") + await place.count("saga_stale_reply")
            return ended >= len(bodies) + 1 and await place.drained(place.replies)

        await until(settled, "the queue is empty and everything has an end")
        assert (await app.client.execute(errand, Order(number=2))).reference == "r-2", "it goes on"
        assert (await handle.result()).reference == "r-1"
    readable = sum(1 for body in bodies if _readable(body))
    ends = (await place.count("saga_parked"), await place.count("saga_stale_reply"))
    assert sum(ends) == len(bodies) + 1, f"seed {SEED}: something was lost or told twice"
    assert ends[1] <= readable
    assert ends[1] > len(bodies) / 10


def _readable(body: bytes) -> bool:
    try:
        return len(decode_replies(body)) == 1
    except MessageInvalid:
        return False


async def numbered(place: Place, channel: str, bodies: list[bytes]) -> None:
    wire = await place.wire()
    futures = wire.publish(
        [
            OutMessage(channel, body, "application/json", headers={"n": str(number)})
            for number, body in enumerate(bodies)
        ]
    )
    for future in futures:
        assert await future is PublishOutcome.CONFIRMED


async def numbers_parked(place: Place) -> list[tuple[str]]:
    import json

    rows = await place.rows("SELECT headers FROM saga_parked")
    return [(json.loads(row[0])["n"],) for row in rows]

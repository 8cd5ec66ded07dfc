"""Where the tests of the doors run: on every stack there is, where all is asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiormq
import pytest

from saga import failpoints
from saga.messages import commands_channel, replies_channel
from tests.doors.place import Place
from tests.features_due import EVERYWHERE
from tests.stacks import BROKERS, EVERY_SERVER, broker_of


@pytest.fixture(params=BROKERS if EVERY_SERVER else EVERYWHERE)
def stack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def place(stack: str, url: str, request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    broker_url = broker_of(stack, request)
    place = Place(stack, url, broker_url)
    yield place
    failpoints.disarm()
    await place.close()
    if broker_url is not None and broker_url.startswith("amqp"):
        names = [replies_channel(each) for each in place.namespaces]
        names += [commands_channel(each, "desk") for each in place.namespaces]
        await _delete_queues(broker_url, names)


async def _delete_queues(url: str, names: list[str]) -> None:
    connection = await aiormq.connect(url)
    channel = await connection.channel()
    for name in names:
        await channel.queue_delete(name)
        await channel.queue_delete(f"{name}.parked")
    await connection.close()

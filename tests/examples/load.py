"""Money transfers without end, 32 at a time, over a broker that loses and repeats: the processes of the chaos test.

The apps stand here under the names that a layout expects of a stage. `python -m tests.examples.load embedded|starter
DIRECTORY` starts transfers until the file `drain` appears in the directory, and ends when `leave` does.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any, Final
from uuid import uuid4

from examples.money_transfer import apps, transfer
from examples.money_transfer.load import opening
from examples.money_transfer.load import order as draw
from saga import ResultTimeout, SagaCompensated, StorageBusy, StorageUnavailable, failpoints
from saga.adapters import make_broker
from saga.brokers.base import Broker, OutMessage, PublishOutcome
from saga.client import Client
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.testing.wire import PassingOn, lost

ACCOUNTS: Final = opening(8)
CONCURRENT: Final = 32
LOSE_REPLY: Final = 0.01
REPEAT: Final = 0.05
REDRIVE: Final = timedelta(seconds=5)
"""More than a reply takes on a slow machine under this load, or the budget for resends goes where nothing was lost."""
RESULT: Final = timedelta(seconds=60)

_environment: Final = os.environ
_namespace: Final = _environment.get("DEMO_NAMESPACE", "default")
_options: Final[dict[str, Any]] = {"namespace": _namespace, "redrive": REDRIVE}


class Unreliable(PassingOn):
    """Loses one reply in a hundred after confirming it, and sends one message in twenty twice."""

    def __init__(self, broker: Broker, directory: Path) -> None:
        super().__init__(broker)
        self._random = Random()
        self._directory = directory

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        return [self._publish(message) for message in messages]

    def _publish(self, message: OutMessage) -> asyncio.Future[PublishOutcome]:
        if message.channel.endswith(".replies") and self._random.random() < LOSE_REPLY:
            self._count("lost-reply")
            return lost()
        (outcome,) = self.broker.publish([message])
        if self._random.random() < REPEAT:
            self._count("duplicate")
            self.broker.publish([message])
        return outcome

    def _count(self, fault: str) -> None:
        with (self._directory / f"{fault}.count").open("a") as count:
            count.write(".")


def _broker(url: str) -> Broker:
    ports: dict[str, Any] = {"clock": SystemClock(), "ids": SystemIds(), "spawner": TaskSpawner()}
    return Unreliable(make_broker(url, None, **ports), Path(_environment.get("LOAD_DIRECTORY", ".")))


_settings: Final = apps.Settings()
# Where the coordinator's commits put commands into the queue themselves there is no broker in between to lose them.
_over: Final = _settings.broker.startswith("amqp")
coordinator = starter = apps.coordinating(
    _settings, **_options, broker=_broker(_settings.broker) if _over else _settings.broker
)
savings, giro, notifier = (
    apps.participating(
        name,
        _settings,
        **_options,
        broker=_broker(_settings.broker.replace("database://", _settings.coordinator_database)),
    )
    for name in ("savings", "giro", "notifier")
)


# --- transfers --------------------------------------------------------------------------------


async def _transfers(client: Client, directory: Path) -> None:
    random = Random()
    while not (directory / "drain").exists():
        order = draw(random, str(uuid4()), ACCOUNTS)
        try:
            handle = await client.start(transfer.money_transfer, order, id=order.id)
            await handle.result(timeout=RESULT)
        except SagaCompensated:
            pass  # refused, as one in five is
        except (ResultTimeout, StorageBusy, StorageUnavailable) as error:
            print(f"transfer {order.id}: {error}", file=sys.stderr, flush=True)


async def _load(form: str, directory: Path) -> None:
    if form == "embedded":
        app = apps.embedded(_environment["DEMO_DATABASE"], broker=_broker("memory://"), **_options)
        running: Any = app
    else:
        app = starter
        running = app.as_client()
    async with running:
        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENT):
                group.create_task(_transfers(app.client, directory))
        while not (directory / "leave").exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.1)


def main() -> None:
    form, directory = sys.argv[1:]
    failpoints.arm(_environment.get("SAGA_FAIL", ""), _environment.get("SAGA_FAIL_LOG"))
    with suppress(KeyboardInterrupt):
        asyncio.run(_load(form, Path(directory)))


if __name__ == "__main__":
    main()

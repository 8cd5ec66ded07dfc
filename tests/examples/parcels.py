"""Parcels that another service ships: the saga, the contract of its step, and the wire to that service by hand."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any, Final

from pydantic import BaseModel

from saga import Participant, Refused, Saga
from saga.brokers.base import Broker, Channel, OutMessage
from saga.clock import SystemIds
from saga.messages import (
    CONTENT_TYPE,
    Command,
    Reply,
    command_id,
    commands_channel,
    decode_replies,
    encode_command,
    parking_channel,
    replies_channel,
)

SECONDS_MAX: Final = 60.0


class Order(BaseModel):
    id: str
    address: str = "7 Dovecote Lane"
    grams: int = 500
    card: str = "good"


class Parcel(BaseModel):
    parcel: str


parcels = Participant("parcels", start_to_close=timedelta(seconds=20))
ship = parcels.contract("ship", input=Order, output=Parcel, compensated=True)
shop = Participant("shop", start_to_close=timedelta(seconds=20))


@shop.activity
async def charge(order: Order) -> None:
    if order.card != "good":
        raise Refused("card_refused")


purchase = (
    Saga("purchase", Order)
    .step(ship)
    .step(charge, no_compensation="nothing is charged here")
    .returns(ship.out)
)


class Wire:
    """A coordinator that the test plays: raw commands out, replies in."""

    def __init__(self, namespace: str, broker: Broker) -> None:
        self.commands, self.replies = commands_channel(namespace, "parcels"), replies_channel(namespace)
        self._namespace = namespace
        self._broker = broker

    async def open(self) -> None:
        await self._broker.start()
        await self._broker.declare(
            [Channel(name, parking_channel(name)) for name in (self.commands, self.replies)]
        )
        self._consumer = await self._broker.consume(self.replies, prefetch=100)

    def command(self, run: str, direction: Any, data: Any, **other: Any) -> Command:
        return Command(
            id=SystemIds().uuid7().hex,
            namespace=self._namespace,
            saga="purchase",
            sagaversion=1,
            sagaid=run,
            runid=run,
            step="ship",
            activity="ship",
            direction=direction,
            commandid=command_id(self._namespace, "purchase", run, "ship", 0, 0, direction),
            attempt=1,
            final=True,
            replyto=self.replies,
            data=data,
            **other,
        )

    async def send(self, *commands: Command) -> None:
        bodies = [encode_command(each, _json(each.data)) for each in commands]
        for outcome in self._broker.publish(
            [OutMessage(self.commands, each, CONTENT_TYPE, key="k") for each in bodies]
        ):
            await outcome

    async def answers(self, count: int) -> list[Reply]:
        replies: list[Reply] = []
        async with asyncio.timeout(SECONDS_MAX):
            while len(replies) < count:
                deliveries = await self._consumer.receive()
                replies += [reply for each in deliveries for reply in decode_replies(each.body)]
                self._consumer.ack(deliveries)
        return replies

    async def parked(self) -> bytes:
        consumer = await self._broker.consume(parking_channel(self.commands), prefetch=1)
        async with asyncio.timeout(SECONDS_MAX):
            (delivery,) = await consumer.receive()
        consumer.ack([delivery])
        return delivery.body

    async def spoil(self, body: bytes) -> None:
        await self._broker.publish([OutMessage(self.commands, body, CONTENT_TYPE)])[0]


def _json(data: Any) -> bytes:
    return Order.model_validate(data).model_dump_json().encode() if "id" in data else b'{"input":null}'

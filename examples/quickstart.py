"""Two bookings, durable in one file: kill it in the middle (kill -9), run it again, and it goes on where it was."""

import asyncio
from datetime import timedelta
from os import getenv

from saga import App, Participant, Saga

agency = Participant("agency", start_to_close=timedelta(seconds=30))


@agency.activity(no_compensation="free of charge until the day before")
async def book(what: str) -> str:
    print("booking", what, flush=True)
    await asyncio.sleep(1)  # lint: allow sleep because bookings take their time
    return f"{what} booked"


async def main(database: str, broker: str) -> None:
    trip = Saga("trip", str).step(book, "hotel", name="bed").step(book, name="go").returns(book.at("go").out)
    async with App(database, broker=broker, sagas=[trip], participants=[agency]) as app:
        print(await app.client.execute(trip, "flight to Lisbon", id="trip-1"))


asyncio.run(main(getenv("DATABASE", "sqlite:///saga.db"), getenv("BROKER", "memory://")))

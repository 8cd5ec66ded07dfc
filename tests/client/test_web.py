"""An app inside a web server: it lives as long as the server, and no answer comes before its commit (row I-02)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
from fastapi import Depends, FastAPI
from httpx import ASGITransport, AsyncClient
from sqlalchemy import event, insert
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette

from saga import App, Client, ConfigurationError
from saga.clock import SystemClock, TaskSpawner
from tests.client.shop import Order, Place, Receipt, gates, orders, purchase

pytestmark = [pytest.mark.feature("I-02"), pytest.mark.stack("sqlite")]

PATIENCE = timedelta(seconds=60)


@pytest.fixture
def stack() -> str:
    return "sqlite"


def server(place: Place, app: App, lifespan: Any) -> FastAPI:
    """A service that takes orders, each in its request's own session with its saga."""
    web = FastAPI(lifespan=lifespan)

    async def transaction() -> AsyncIterator[AsyncSession]:
        async with place.session() as session, session.begin():
            yield session

    session_of_request = Depends(transaction, scope="function")
    client_of_app = Depends(app.get_client)

    @web.post("/orders/{id}", status_code=201)
    async def take(
        id: str, session: AsyncSession = session_of_request, sagas: Client = client_of_app
    ) -> dict[str, str]:
        await session.execute(insert(orders).values(id=id))
        await sagas.start(purchase, Order(), id=id, session=session)
        if id == "wrong":
            raise RuntimeError
        return {"id": id}

    @web.get("/orders/{id}")
    async def wait(id: str, sagas: Client = client_of_app) -> Receipt:
        return await sagas.result(await sagas.find(purchase, id), timeout=PATIENCE)

    return web


@asynccontextmanager
async def served(web: FastAPI) -> AsyncIterator[AsyncClient]:
    transport = ASGITransport(web, raise_app_exceptions=False)
    async with (
        web.router.lifespan_context(web),
        AsyncClient(transport=transport, base_url="http://shop") as http,
    ):
        yield http


async def test_an_order_and_its_saga_are_one_commit_of_the_requests_session(place: Place) -> None:
    app = place.app()
    async with served(server(place, app, app.lifespan)) as http:
        assert (await http.post("/orders/o-1")).status_code == 201
        assert (await http.get("/orders/o-1")).json()["number"] == "c-book"
    assert app.loop is None


async def test_a_request_that_fails_leaves_neither_order_nor_saga(place: Place) -> None:
    app = place.app()
    async with served(server(place, app, app.lifespan)) as http:
        assert (await http.post("/orders/wrong")).status_code == 500
        assert (await place.count("orders"), await place.count("saga_instance")) == (0, 0)


async def test_a_commit_that_fails_is_no_201(place: Place) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("the disk is full")

    app = place.app()
    async with served(server(place, app, app.lifespan)) as http:
        event.listen(place.engine.sync_engine, "commit", refuse)
        assert (await http.post("/orders/o-1")).status_code == 500
        event.remove(place.engine.sync_engine, "commit", refuse)
        assert (await place.count("orders"), await place.count("saga_instance")) == (0, 0)


async def test_a_server_that_only_starts_sagas_leaves_them_to_others(place: Place) -> None:
    app = place.app()
    async with served(server(place, app, app.client_lifespan)) as http:
        assert (await http.post("/orders/o-1")).status_code == 201
        assert await place.count("saga_outbox") == 1
        async with place.app():
            assert (await http.get("/orders/o-1")).json()["number"] == "c-book"


async def test_a_server_without_the_lifespan_is_told_so_by_its_first_request(place: Place) -> None:
    app = place.app()
    web = server(place, app, None)
    async with AsyncClient(transport=ASGITransport(web), base_url="http://shop") as http:
        with pytest.raises(ConfigurationError):
            await http.post("/orders/o-1")
    assert await place.count("orders") == 0


async def test_a_server_whose_app_cannot_start_does_not_start_and_may_try_again(tmp_path: Path) -> None:
    """Starlette this time: the lifespan is not FastAPI's alone."""
    app = App(f"sqlite:///{tmp_path / 'not-there' / 'saga.db'}", sagas=[purchase])
    web = Starlette(lifespan=app.lifespan)
    for _ in range(2):
        with pytest.raises(ConfigurationError):
            async with web.router.lifespan_context(web):
                pass
    (tmp_path / "not-there").mkdir()
    async with web.router.lifespan_context(web):
        assert (await app.health()).database
    assert app.loop is None


class Gate(asyncio.Event):
    """Tells that an activity has come to it."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = asyncio.Event()

    async def wait(self) -> Literal[True]:
        self.reached.set()
        return await super().wait()


async def test_a_server_that_stops_lets_running_activities_finish(place: Place) -> None:
    gates["book"] = gate = Gate()
    app, spawner, clock = place.app(), TaskSpawner(), SystemClock()
    web = server(place, app, app.lifespan)

    async def serve() -> None:
        async with served(web) as http:
            assert (await http.post("/orders/o-1")).status_code == 201
            await gate.reached.wait()

    async with asyncio.timeout(PATIENCE.total_seconds()):
        serving = spawner.spawn(serve(), name="serving")
        await gate.reached.wait()
        while app.loop is not None:
            await clock.sleep(0.01)
        assert not serving.done()
        gate.set()
        await serving
    assert len(await place.rows("SELECT 1 FROM saga_barrier WHERE step = 'reserve'")) == 1
    await spawner.close()

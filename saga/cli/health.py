"""`--health FILE|PORT`: tells a container's probes whether the process is alive and ready.

A number is a port on all interfaces: GET /live answers 200 while the process runs, GET /ready 200 or 503 with what is
reached as JSON. Anything else is a file: written anew every 5 seconds while the process is ready, and removed when it
is not and when it ends, so that its presence and age tell.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from saga.clock import SystemClock, TaskSpawner

SECONDS: Final = 5.0


class Health(Protocol):
    """What an app says of itself."""

    @property
    def ready(self) -> bool:
        """Whether it does its work."""
        ...

    def _asdict(self) -> dict[str, Any]: ...


Ask = Callable[[], Awaitable[Health]]


class Said(NamedTuple):
    """The latest answer."""

    ready: bool
    body: bytes


STARTING: Final = Said(False, b'{"starting":true}')


@asynccontextmanager
async def told(where: str | None, ask: Ask) -> AsyncIterator[None]:
    """Tell probes about the process for as long as the context lasts."""
    if where is None:
        yield
        return
    spawner = TaskSpawner()
    teller: Teller = Port(int(where)) if where.isdecimal() else File(Path(where))
    teller.start()
    asking = spawner.spawn(_ask_on(ask, teller), name="saga-health")
    try:
        yield
    finally:
        asking.cancel()
        await asyncio.wait({asking})
        teller.stop()


class Teller(Protocol):
    """One way to tell."""

    def start(self) -> None:
        """Begin; not ready yet."""
        ...

    def tell(self, said: Said) -> None:
        """Tell the latest answer."""
        ...

    def stop(self) -> None:
        """End; not ready any more."""
        ...


async def _ask_on(ask: Ask, teller: Teller) -> None:
    clock = SystemClock()
    while True:
        health = await ask()
        teller.tell(Said(health.ready, json.dumps({"ready": health.ready, **health._asdict()}).encode()))
        await clock.sleep(SECONDS if health.ready else SECONDS / 10)


class File:
    """A file that is there while the process is ready."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self) -> None:
        self._path.unlink(missing_ok=True)  # left by a process that was killed

    def tell(self, said: Said) -> None:
        if said.ready:
            self._path.write_bytes(said.body)
        else:
            self._path.unlink(missing_ok=True)

    def stop(self) -> None:
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


class Port:
    """Answers HTTP from a thread of its own, so that a busy loop is still alive."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._said = STARTING
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = {"/live": Said(True, b'{"live":true}'), "/ready": outer._said}
                said = known.get(self.path)
                self.send_response(404 if said is None else 200 if said.ready else 503)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(b"{}" if said is None else said.body)

            def log_message(self, format: str, *arguments: Any) -> None:
                """Probes come every few seconds and are no news."""

        self._server = ThreadingHTTPServer(("", self._port), Handler)
        # a thread: a probe must be answered while the loop is busy
        threading.Thread(target=self._server.serve_forever, name="saga-health", daemon=True).start()

    def tell(self, said: Said) -> None:
        self._said = said

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

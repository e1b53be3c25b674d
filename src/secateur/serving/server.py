"""A server in this process, which ends well: no more requests, all that were taken answered, exit."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.serving.app import make_app
from secateur.serving.refusals import extra
from secateur.serving.service import Service, Settings

SLOW = 30
"""Seconds that clients have at the end to read their answers."""
IDLE = 75
"""Seconds after which an idle connection is closed: later than proxies do, lest one sends into a closed one."""


def serve(folder: str | Path, settings: Settings | None = None, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve a model folder until SIGTERM or SIGINT.

    Args:
        folder: of a model that the native engine runs.
        settings: see there.
        host: address to listen at.
        port: of it; 0 takes one that is free.

    Raises:
        MissingExtra: FastAPI or uvicorn is not installed.
        SecateurError: the folder cannot be served, or the port is taken.
    """
    extra("fastapi", "serve")
    extra("uvicorn", "serve")
    with bound(host, port) as place:  # nobody is let in before the engine is there
        asyncio.run(_serve(Service.open(folder, settings), place))


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
        SecateurError: the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off, which holds answers back for 40 ms, only where the protocol is named
    place = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind((host, port))
    except OSError as error:
        place.close()
        raise SecateurError(f"{host}:{port} cannot be listened at ({error.strerror}): take another --port.") from None
    return place


async def _serve(service: Service, place: socket.socket) -> None:
    uvicorn = extra("uvicorn", "serve")
    config = uvicorn.Config(
        make_app(service),
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=SLOW,
    )
    server, loop, stop = uvicorn.Server(config), asyncio.get_running_loop(), asyncio.Event()
    listen = server.startup

    async def startup(**given: Any) -> None:
        await listen(**given)
        host, port = place.getsockname()[:2]
        _say(f"ready at http://{f'[{host}]' if ':' in host else host}:{port}, {_what(service)}")

    async def drain() -> None:
        await stop.wait()
        await asyncio.to_thread(service.drain)
        server.should_exit = True

    server.startup = startup
    server.handle_exit = lambda *_: loop.call_soon_threadsafe(stop.set)
    draining = asyncio.create_task(drain())
    await server.serve(sockets=[place])
    stop.set()
    await draining
    _say(f"ended: {service.batcher.accepted} requests accepted, {service.batcher.answered} answered")


def _what(service: Service) -> str:
    found = service.health()
    dial = ", ".join(f"{speedup:g}" for speedup in found["speedups"])
    return f"{found['tier']} {found['precision']}, {found['threads']} threads, speed-ups {dial}"


def _say(line: str) -> None:
    sys.stderr.write(f"secateur: {line}\n")
    sys.stderr.flush()

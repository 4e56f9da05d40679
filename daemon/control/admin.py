"""The admin API: HTTP+JSON over a Unix socket. The socket's file mode is the gate."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Awaitable, Callable

from aiohttp import web

from daemon.control.overview import Overview

log = logging.getLogger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_OVERVIEW = web.AppKey("overview", Overview)


def build_admin(overview: Overview) -> web.Application:
    """Routes: GET /v1/status, /v1/requests, /v1/config; DELETE /v1/requests/{id}."""
    app = web.Application(middlewares=[_no_browsers])
    app[_OVERVIEW] = overview
    app.router.add_get("/v1/status", _status)
    app.router.add_get("/v1/requests", _requests)
    app.router.add_delete("/v1/requests/{id}", _cancel)
    app.router.add_get("/v1/config", _config)
    return app


@web.middleware
async def _no_browsers(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """A page in a browser must not reach this socket through some proxy."""
    if "Origin" in request.headers:
        return web.json_response({"error": "requests from browsers are refused"}, status=403)
    return await handler(request)


async def _status(request: web.Request) -> web.Response:
    return web.json_response(request.app[_OVERVIEW].status())


async def _requests(request: web.Request) -> web.Response:
    return web.json_response({"requests": request.app[_OVERVIEW].requests()})


async def _config(request: web.Request) -> web.Response:
    return web.json_response({"options": request.app[_OVERVIEW].config()})


async def _cancel(request: web.Request) -> web.Response:
    name = request.match_info["id"]
    asked = request.app[_OVERVIEW].cancel(name)
    if not asked:
        return web.json_response({"error": f"no unfinished request is called {name!r}"}, status=404)
    log.info("request %s cancelled by %s", name, _who(request))
    return web.json_response({"cancelled": asked})


def _who(request: web.Request) -> str:
    """The peer's user, for the record; the gate is the socket's mode."""
    sock = request.transport.get_extra_info("socket") if request.transport else None
    if sock is None:
        return "unknown"
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return f"uid {uid} (pid {pid})"

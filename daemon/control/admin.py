"""The admin API: HTTP+JSON over a Unix socket. The socket's file mode is the gate."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Awaitable, Callable

from aiohttp import web

from daemon.control.balancer import Balancer, Refusal
from daemon.control.overview import Overview

log = logging.getLogger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_OVERVIEW = web.AppKey("overview", Overview)
_BALANCER = web.AppKey("balancer", Balancer)


def build_admin(overview: Overview, balancer: Balancer) -> web.Application:
    """Routes: GET /v1/status, /v1/requests, /v1/config, /v1/rebalance; DELETE /v1/requests/{id};
    POST /v1/requests/{id}/migrate/{engine}, /v1/engines/{engine}/drain, /v1/engines/{engine}/undrain."""
    app = web.Application(middlewares=[_no_browsers, _refusals])
    app[_OVERVIEW] = overview
    app[_BALANCER] = balancer
    app.router.add_get("/v1/status", _status)
    app.router.add_get("/v1/requests", _requests)
    app.router.add_delete("/v1/requests/{id}", _cancel)
    app.router.add_get("/v1/config", _config)
    app.router.add_get("/v1/rebalance", _rebalance)
    app.router.add_post(r"/v1/requests/{id}/migrate/{engine:-?\d{1,18}}", _migrate)
    app.router.add_post(r"/v1/engines/{engine:-?\d{1,18}}/{verb:drain|undrain}", _drain)
    return app


@web.middleware
async def _no_browsers(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """A page in a browser must not reach this socket through some proxy."""
    if "Origin" in request.headers:
        return web.json_response({"error": "requests from browsers are refused"}, status=403)
    return await handler(request)


@web.middleware
async def _refusals(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refusal as e:
        return web.json_response({"error": str(e)}, status=409)


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


async def _rebalance(request: web.Request) -> web.Response:
    overview = request.app[_OVERVIEW]
    return web.json_response({"explanation": request.app[_BALANCER].explain(overview.facts())})


async def _migrate(request: web.Request) -> web.Response:
    overview, balancer = request.app[_OVERVIEW], request.app[_BALANCER]
    name, engine = request.match_info["id"], int(request.match_info["engine"])
    found = overview.find(name)
    if not found:
        raise Refusal(f"no unfinished request is called {name!r}")
    for row in found:
        balancer.migrate(overview.facts(), row["rid"], row["engine"], engine, request.query.get("how", "live"))
    log.info("request %s ordered to engine %d by %s", name, engine, _who(request))
    return web.json_response({"ordered": [row["id"] for row in found], "engine": engine})


async def _drain(request: web.Request) -> web.Response:
    overview, balancer = request.app[_OVERVIEW], request.app[_BALANCER]
    engine, verb = int(request.match_info["engine"]), request.match_info["verb"]
    balancer.set_serving(overview.facts(), engine, verb == "undrain")
    log.info("engine %d: %s by %s", engine, verb, _who(request))
    return web.json_response({"engine": engine, "serving": verb == "undrain"})


def _who(request: web.Request) -> str:
    """The peer's user, for the record; the gate is the socket's mode."""
    sock = request.transport.get_extra_info("socket") if request.transport else None
    if sock is None:
        return "unknown"
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return f"uid {uid} (pid {pid})"

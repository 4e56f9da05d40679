"""The admin API: HTTP+JSON over a Unix socket. The socket's file mode is the gate."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Awaitable, Callable

from aiohttp import web

from daemon.control.event_stream import OVERVIEW, add_events
from daemon.control.policy.priority import parse_priority
from daemon.control.rebalancer import Rebalancer, Refusal
from daemon.control.status import Overview
from daemon.enums import MigrationMode
from daemon.ipc.events import Ordered
from daemon.ipc.messages import EngineState

log = logging.getLogger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_REBALANCER = web.AppKey("rebalancer", Rebalancer)
_STATES = {
    "drain": EngineState.DRAINING,
    "undrain": EngineState.SERVING,
    "park": EngineState.PARKED,
    "wake": EngineState.SERVING,
}


def build_admin(overview: Overview, rebalancer: Rebalancer) -> web.Application:
    """Routes: GET /v1/status, /v1/requests, /v1/config, /v1/rebalance, /v1/events; DELETE /v1/requests/{id};
    POST /v1/requests/{id}/migrate/{engine}, /v1/requests/{id}/priority/{value},
    /v1/engines/{engine}/drain|undrain|park|wake."""
    app = web.Application(middlewares=[_no_browsers, _refusals, _on_record])
    app[OVERVIEW] = overview
    app[_REBALANCER] = rebalancer
    app.router.add_get("/v1/status", _status)
    app.router.add_get("/v1/requests", _requests)
    app.router.add_delete("/v1/requests/{id}", _cancel)
    app.router.add_get("/v1/config", _config)
    app.router.add_get("/v1/rebalance", _rebalance)
    app.router.add_post(r"/v1/requests/{id}/migrate/{engine:-?\d{1,18}}", _migrate)
    app.router.add_post("/v1/requests/{id}/priority/{value}", _priority)
    app.router.add_post(r"/v1/engines/{engine:-?\d{1,18}}/{verb:drain|undrain|park|wake}", _set_state)
    add_events(app)
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


@web.middleware
async def _on_record(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Whatever an operator orders, and is not refused, is an event."""
    response = await handler(request)
    if request.method != "GET" and response.status < 400:
        request.app[_REBALANCER].log.write(_ordered(request))
    return response


def _ordered(request: web.Request) -> Ordered:
    """From the route: its verb, or its last word, is the action, and its parameters are what that is about."""
    given, resource = request.match_info, request.match_info.route.resource
    words = [part for part in (resource.canonical if resource else "").split("/") if "{" not in part]
    action = "cancel" if request.method == "DELETE" else given.get("verb", words[-1])
    detail = given.get("value") or request.query.get("how", "")
    return Ordered(action, given.get("id", ""), int(given.get("engine", "-1")), detail, _who(request))


async def _status(request: web.Request) -> web.Response:
    return web.json_response(request.app[OVERVIEW].status())


async def _requests(request: web.Request) -> web.Response:
    return web.json_response({"requests": request.app[OVERVIEW].requests()})


async def _config(request: web.Request) -> web.Response:
    return web.json_response({"options": request.app[OVERVIEW].config()})


async def _cancel(request: web.Request) -> web.Response:
    name = request.match_info["id"]
    asked = request.app[OVERVIEW].cancel(name)
    if not asked:
        return _unknown(name)
    log.info("request %s cancelled by %s", name, _who(request))
    return web.json_response({"cancelled": asked})


async def _rebalance(request: web.Request) -> web.Response:
    overview = request.app[OVERVIEW]
    return web.json_response({"explanation": request.app[_REBALANCER].explain(overview.facts())})


async def _migrate(request: web.Request) -> web.Response:
    overview, rebalancer = request.app[OVERVIEW], request.app[_REBALANCER]
    name, engine = request.match_info["id"], int(request.match_info["engine"])
    found = overview.find(name)
    if not found:
        raise Refusal(f"no unfinished request is called {name!r}")
    for row in found:
        rebalancer.migrate(
            overview.facts(), row["rid"], row["engine"], engine, request.query.get("how", MigrationMode.LIVE)
        )
    log.info("request %s ordered to engine %d by %s", name, engine, _who(request))
    return web.json_response({"ordered": [row["id"] for row in found], "engine": engine})


async def _priority(request: web.Request) -> web.Response:
    name = request.match_info["id"]
    try:
        priority = parse_priority(request.match_info["value"])
    except ValueError as e:
        raise Refusal(str(e)) from None
    changed = request.app[OVERVIEW].reprioritise(name, priority)
    if not changed:
        return _unknown(name)
    log.info("request %s given priority %d by %s", name, priority, _who(request))
    return web.json_response({"changed": changed, "priority": priority})


async def _set_state(request: web.Request) -> web.Response:
    overview, rebalancer = request.app[OVERVIEW], request.app[_REBALANCER]
    engine, verb = int(request.match_info["engine"]), request.match_info["verb"]
    state = _STATES[verb]
    rebalancer.set_state(overview.facts(), engine, state)
    log.info("engine %d: %s by %s", engine, verb, _who(request))
    return web.json_response({"engine": engine, "wished": state.name.lower()})


def _unknown(name: str) -> web.Response:
    return web.json_response({"error": f"no unfinished request is called {name!r}"}, status=404)


def _who(request: web.Request) -> str:
    """The peer's user, for the record; the gate is the socket's mode."""
    sock = request.transport.get_extra_info("socket") if request.transport else None
    if sock is None:
        return "unknown"
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return f"uid {uid} (pid {pid})"

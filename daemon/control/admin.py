"""The admin API: HTTP and JSON over a Unix socket. The file mode of the socket controls access."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Awaitable, Callable

from aiohttp import web

from daemon.control.desired_states import DesiredStates
from daemon.control.event_stream import STATUS, add_events
from daemon.control.key_order import KeyOrder
from daemon.control.policy.priority import parse_priority
from daemon.control.rebalancer import Rebalancer
from daemon.control.refusal import NOT_FOUND, SHUTTING_DOWN, Refusal
from daemon.control.request_orders import RequestOrders
from daemon.control.restart_order import RestartOrder
from daemon.control.status import StatusReader
from daemon.enums import MigrationMode
from daemon.ipc.event_ring import EventWriter
from daemon.ipc.events import Ordered, clipped
from daemon.ipc.messages import EngineState

log = logging.getLogger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_REQUEST_ORDERS = web.AppKey("request_orders", RequestOrders)
_REBALANCER = web.AppKey("rebalancer", Rebalancer)
_DESIRED_STATES = web.AppKey("desired_states", DesiredStates)
_KEY_ORDER = web.AppKey("key_order", KeyOrder)
_RESTART_ORDER = web.AppKey("restart_order", RestartOrder)
_EVENTS = web.AppKey("events", EventWriter)
_STATES = {
    "drain": EngineState.DRAINING,
    "undrain": EngineState.SERVING,
    "park": EngineState.PARKED,
    "wake": EngineState.SERVING,
}


def build_admin(
    status: StatusReader,
    request_orders: RequestOrders,
    rebalancer: Rebalancer,
    desired_states: DesiredStates,
    key_order: KeyOrder,
    restart_order: RestartOrder,
    events: EventWriter,
) -> web.Application:
    """Build the application. Every order that is not refused is written to `events`.

    Routes: GET /v1/status, /v1/requests, /v1/config, /v1/rebalance, /v1/events; DELETE /v1/requests/{id};
    POST /v1/requests/{id}/migrate/{engine}, /v1/requests/{id}/priority/{value},
    /v1/engines/{engine}/drain|undrain|park|wake, /v1/engines|frontends/{number}/restart, /v1/coordinator/restart,
    /v1/reload.
    """
    app = web.Application(middlewares=[_refuse_browsers, _answer_errors])
    app[STATUS] = status
    app[_REQUEST_ORDERS] = request_orders
    app[_REBALANCER] = rebalancer
    app[_DESIRED_STATES] = desired_states
    app[_KEY_ORDER] = key_order
    app[_RESTART_ORDER] = restart_order
    app[_EVENTS] = events
    app.router.add_get("/v1/status", _status)
    app.router.add_get("/v1/requests", _requests)
    app.router.add_delete("/v1/requests/{id}", _cancel)
    app.router.add_get("/v1/config", _config)
    app.router.add_get("/v1/rebalance", _rebalance)
    app.router.add_post(r"/v1/requests/{id}/migrate/{engine:-?\d{1,18}}", _migrate)
    app.router.add_post("/v1/requests/{id}/priority/{value}", _set_priority)
    app.router.add_post(r"/v1/engines/{engine:-?\d{1,18}}/{verb:drain|undrain|park|wake}", _set_state)
    app.router.add_post(r"/v1/{role:engine|frontend}s/{index:-?\d{1,18}}/restart", _restart)
    app.router.add_post("/v1/{role:coordinator}/restart", _restart)
    app.router.add_post("/v1/reload", _reload)
    add_events(app)
    return app


@web.middleware
async def _refuse_browsers(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Refuse requests with an Origin header: a web page must not reach this socket through a proxy."""
    if "Origin" in request.headers:
        return _error(403, "requests from browsers are refused", "forbidden")
    return await handler(request)


@web.middleware
async def _answer_errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Answer every error in JSON: its text, and a code for scripts. A Refusal has status 409."""
    try:
        return await handler(request)
    except Refusal as e:
        return _error(409, str(e), e.code)
    except web.HTTPException as e:
        code = NOT_FOUND if e.status == 404 else "bad_request"
        return _error(e.status, f"{request.method} {request.path}: {e.reason}", code)
    except Exception:
        log.exception("unexpected failure of %s %s", request.method, request.path)
        return _error(500, "internal error; the log of the daemon has the details", "internal")


def _error(status: int, text: str, code: str) -> web.Response:
    return web.json_response({"error": text, "code": code}, status=status)


async def _status(request: web.Request) -> web.Response:
    return web.json_response(request.app[STATUS].status())


async def _requests(request: web.Request) -> web.Response:
    return web.json_response({"requests": request.app[STATUS].requests()})


async def _config(request: web.Request) -> web.Response:
    return web.json_response({"options": request.app[STATUS].config()})


async def _rebalance(request: web.Request) -> web.Response:
    facts = request.app[STATUS].facts()
    return web.json_response({"explanation": request.app[_REBALANCER].explain(facts)})


async def _cancel(request: web.Request) -> web.Response:
    name, operator = request.match_info["id"], _operator(request)
    cancelled = request.app[_REQUEST_ORDERS].cancel(name)
    if not cancelled:
        return _unknown(name)
    log.info("request %s cancelled by %s", name, operator)
    request.app[_EVENTS].write(Ordered("cancel", name, -1, "", operator))
    return web.json_response({"cancelled": cancelled})


async def _migrate(request: web.Request) -> web.Response:
    status, rebalancer, operator = request.app[STATUS], request.app[_REBALANCER], _operator(request)
    name, engine = request.match_info["id"], int(request.match_info["engine"])
    found = status.find(name)
    if not found:
        raise Refusal(_unknown_text(name), NOT_FOUND)
    # Of several choices some may be there already; `migrate` refuses if all are.
    moving = [row for row in found if row["engine"] != engine] or found
    for row in moving:
        how = request.query.get("how", MigrationMode.LIVE)
        rebalancer.migrate(status.facts(), row["rid"], row["engine"], engine, how)
    log.info("request %s ordered to engine %d by %s", name, engine, operator)
    request.app[_EVENTS].write(Ordered("migrate", name, engine, request.query.get("how", ""), operator))
    return web.json_response({"ordered": [row["id"] for row in moving], "engine": engine})


async def _set_priority(request: web.Request) -> web.Response:
    name, value, operator = request.match_info["id"], request.match_info["value"], _operator(request)
    try:
        priority = parse_priority(value)
    except ValueError as e:
        raise Refusal(str(e)) from None
    changed = request.app[_REQUEST_ORDERS].set_priority(name, priority)
    if not changed:
        return _unknown(name)
    log.info("request %s given priority %d by %s", name, priority, operator)
    request.app[_EVENTS].write(Ordered("priority", name, -1, value, operator))
    return web.json_response({"changed": changed, "priority": priority})


async def _set_state(request: web.Request) -> web.Response:
    desired_states, operator = request.app[_DESIRED_STATES], _operator(request)
    engine, verb = int(request.match_info["engine"]), request.match_info["verb"]
    state = _STATES[verb]
    if request.app[STATUS].shutting_down:
        raise Refusal("llumd is shutting down and takes no orders about engines", SHUTTING_DOWN)
    desired_states.check(request.app[STATUS].facts(), engine, state)
    desired_states.set(engine, state, by=operator, action=verb)
    log.info("engine %d: %s by %s", engine, verb, operator)
    word = state.name.lower()
    return web.json_response({"engine": engine, "desired": word, "wished": word})  # "wished" is deprecated


async def _restart(request: web.Request) -> web.Response:
    role, index, operator = request.match_info["role"], int(request.match_info.get("index", 0)), _operator(request)
    incarnation = request.app[_RESTART_ORDER].restart(role, index)
    name = role if role == "coordinator" else f"{role} {index}"
    log.info("%s: restart by %s", name, operator)
    request.app[_EVENTS].write(Ordered("restart", "", index if role == "engine" else -1, name, operator))
    return web.json_response({"process": name, "incarnation": incarnation})


async def _reload(request: web.Request) -> web.Response:
    operator = _operator(request)
    log.info("the key file is to be read again, by %s", operator)
    outcome = await request.app[_KEY_ORDER].reload()
    request.app[_EVENTS].write(Ordered("reload", "", -1, clipped(outcome.error, 120), operator))
    if outcome.error:
        raise Refusal(f"{outcome.error}; the {outcome.keys} former keys stay accepted")
    counts = ("keys", "tenants", "added", "removed", "changed")
    return web.json_response({name: getattr(outcome, name) for name in counts})


def _unknown(name: str) -> web.Response:
    return _error(404, _unknown_text(name), NOT_FOUND)


def _unknown_text(name: str) -> str:
    return f"no unfinished request is called {name!r}"


def _operator(request: web.Request) -> str:
    """Return the user and process at the other end of the socket, for logs and events. It grants no access."""
    sock = request.transport.get_extra_info("socket") if request.transport else None
    if sock is None:
        return "unknown"
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return f"uid {uid} (pid {pid})"

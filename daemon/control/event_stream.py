"""GET /v1/events: the events in the logs, and with `follow=1` those that come later, as newline-delimited JSON.

The logs are read only while a client is connected. A follower that does not read its response blocks only itself:
when it reads again, it gets a row of kind "missed" with the number of events that it missed.
"""

from __future__ import annotations

import asyncio
import math

import msgspec
from aiohttp import web

from daemon.control.event_history import EventHistory, Row
from daemon.control.status import StatusReader

STATUS = web.AppKey("status", StatusReader)
_SHUTDOWN = web.AppKey("shutdown", asyncio.Event)
_POLL = 0.1  # seconds


def add_events(app: web.Application) -> None:
    """Add the route to `app`. Followers are disconnected when `app` shuts down."""
    app[_SHUTDOWN] = asyncio.Event()
    app.on_shutdown.append(_shut_down)
    app.router.add_get("/v1/events", _events)


async def _shut_down(app: web.Application) -> None:
    app[_SHUTDOWN].set()


async def _events(request: web.Request) -> web.StreamResponse:
    try:
        since = float(request.query.get("since", "0"))
    except ValueError:
        since = math.nan
    if not math.isfinite(since):
        error = {"error": "`since` must be a number of seconds since 1970", "code": "bad_request"}
        return web.json_response(error, status=400)
    history = request.app[STATUS].event_history()
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    try:
        await response.write(_encode(history.read(since)))
        if request.query.get("follow") == "1":
            await _follow(request, response, history)
        await response.write_eof()
    except ConnectionError:
        pass  # the client disconnected
    return response


async def _follow(request: web.Request, response: web.StreamResponse, history: EventHistory) -> None:
    """Send new events until the client disconnects or the app shuts down."""
    shutdown = request.app[_SHUTDOWN]
    while not shutdown.is_set() and request.transport is not None:
        try:
            await asyncio.wait_for(shutdown.wait(), _POLL)
        except TimeoutError:
            if rows := history.read():
                await response.write(_encode(rows))


def _encode(rows: list[Row]) -> bytes:
    return b"".join(msgspec.json.encode(row) + b"\n" for row in rows)

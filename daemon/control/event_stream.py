"""GET /v1/events: what the logs hold, and with `follow=1` what comes after, as newline-delimited JSON.

Nothing is read while nobody asks. Who follows and does not read its answer stands still by itself, and is told how
much it has missed when it reads on.
"""

from __future__ import annotations

import asyncio
import math

import msgspec
from aiohttp import web

from daemon.control.event_history import EventHistory, Row
from daemon.control.status import Overview

OVERVIEW = web.AppKey("overview", Overview)
_ENDING = web.AppKey("ending", asyncio.Event)
_POLL = 0.1  # seconds


def add_events(app: web.Application) -> None:
    """The route, and the end of all who follow when `app` shuts down."""
    app[_ENDING] = asyncio.Event()
    app.on_shutdown.append(_end)
    app.router.add_get("/v1/events", _events)


async def _end(app: web.Application) -> None:
    app[_ENDING].set()


async def _events(request: web.Request) -> web.StreamResponse:
    try:
        since = float(request.query.get("since", "0"))
    except ValueError:
        since = math.nan
    if not math.isfinite(since):
        return web.json_response({"error": "`since` must be a number of seconds since 1970"}, status=400)
    event_history = request.app[OVERVIEW].event_history()
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    try:
        await response.write(_lines(event_history.read(since)))
        if request.query.get("follow") == "1":
            await _follow(request, response, event_history)
        await response.write_eof()
    except ConnectionError:
        pass  # whoever followed has left
    return response


async def _follow(request: web.Request, response: web.StreamResponse, event_history: EventHistory) -> None:
    """Until somebody leaves."""
    ending = request.app[_ENDING]
    while not ending.is_set() and request.transport is not None:
        try:
            await asyncio.wait_for(ending.wait(), _POLL)
        except TimeoutError:
            if rows := event_history.read():
                await response.write(_lines(rows))


def _lines(rows: list[Row]) -> bytes:
    return b"".join(msgspec.json.encode(row) + b"\n" for row in rows)

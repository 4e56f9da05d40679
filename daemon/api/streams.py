"""The routes of kept streams: go on with one, or cancel it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec
from aiohttp import web
from msgspec.structs import replace

from daemon.api.auth import client_name, current_key
from daemon.api.errors import bad_request, stream_not_found
from daemon.api.event_ids import BadEventId, Point
from daemon.api.kept_streams import KeptStream
from daemon.api.outbox_writer import OutboxWriter
from daemon.api.render.apis import APIS
from daemon.api.request_id import ANSWER_ID, frontend_of, request_id
from daemon.api.response_facts import ResponseFacts
from daemon.api.response_head import EVENT_HEADERS, JSON_HEADERS, STREAM_HEADER, response_headers
from daemon.api.service import Service
from daemon.api.sse import EventStream

_MAX_SHOWN = 100  # characters of what the client has sent that an error repeats


async def send_events(
    service: Service,
    http: web.Request,
    kept: KeptStream,
    after: str,
    point: Point,
    more: Mapping[str, str] = MappingProxyType({}),
) -> web.StreamResponse:
    """Send the events of a kept stream from `point` on, where the event `after` has come to. `more`: headers."""
    writer = OutboxWriter(http.protocol, service.page)
    http._payload_writer = writer
    response = web.StreamResponse(headers=EVENT_HEADERS | {STREAM_HEADER: kept.facts.id} | dict(more))
    try:
        if service.guard is not None:
            await service.guard.open(http.protocol, writer, _facts(service, http, kept, after, more), point.state)
        ping = APIS[kept.facts.form.api].ping
        stream = EventStream(writer, service.config.heartbeat, lambda: response.prepare(http), ping=ping)
        async with stream as events:
            await service.kept.read(kept, events, point, writer.abort)
    except ConnectionError:
        pass  # the client has hung up
    finally:
        writer.unguard()
    return response


async def send_whole(
    service: Service, http: web.Request, kept: KeptStream, more: Mapping[str, str]
) -> web.StreamResponse:
    """Send the whole answer of a kept request that is not streamed, once it has ended. `more`: headers."""
    writer = OutboxWriter(http.protocol, service.page)
    http._payload_writer = writer
    response = web.Response(headers=JSON_HEADERS | {STREAM_HEADER: kept.facts.id} | dict(more))
    try:
        if service.guard is not None:
            await service.guard.open(http.protocol, writer, _facts(service, http, kept, "", more))
        response.body = await service.kept.whole(kept, writer.abort)
        await response.prepare(http)
        await response.write_eof()
    except ConnectionError:
        pass  # the client has hung up
    finally:
        writer.unguard()
    return response


def _facts(
    service: Service, http: web.Request, kept: KeptStream, after: str, more: Mapping[str, str]
) -> ResponseFacts:
    """Return the facts of a further response with a kept answer."""
    return replace(
        kept.facts,
        minor=http.version.minor,
        head_sent=False,
        headers=response_headers(http, service.origins) | {STREAM_HEADER: kept.facts.id} | dict(more),
        client=http.remote or "",
        method=http.method,
        path=http.rel_url.raw_path,
        request_id=request_id(http),
        after=after,
    )


class Streams:
    """The handlers of these routes."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def read(self, http: web.Request) -> web.StreamResponse:
        """Send the events of a kept stream that come after the one that the client names."""
        if (passed := await self._pass_on(http)) is not None:
            return passed
        kept = self._find(http)
        after, point = self._point(http, kept)
        http[ANSWER_ID] = kept.facts.id
        if http.method == "HEAD":
            return web.Response(headers=EVENT_HEADERS | {STREAM_HEADER: kept.facts.id})
        self._service.page.inc("stream_reconnects")
        return await send_events(self._service, http, kept, after, point)

    async def cancel(self, http: web.Request) -> web.StreamResponse:
        """Cancel a kept stream, or free one that has ended."""
        if (passed := await self._pass_on(http)) is not None:
            return passed
        kept = self._find(http)
        http[ANSWER_ID] = kept.facts.id
        self._service.kept.cancel(kept)
        body = {"id": kept.facts.id, "object": "stream", "deleted": True}
        return web.Response(body=msgspec.json.encode(body), content_type="application/json")

    async def _pass_on(self, http: web.Request) -> web.StreamResponse | None:
        """Have the frontend that has the stream answer, on the same connection; None if it is this one, or none."""
        others, frontend = self._service.others, frontend_of(http.match_info["id"])
        if others is None or frontend is None or not others.reach(frontend):
            return None
        return await others.pass_on(http, frontend)

    def _find(self, http: web.Request) -> KeptStream:
        """Return the stream that the path names, if its client may read it. Raises ApiError (404)."""
        id, key = http.match_info["id"], current_key.get()
        kept = self._service.kept.get(id)
        if kept is None or (key is not None and client_name(key, None) != kept.facts.owner):
            raise stream_not_found(id[:_MAX_SHOWN])
        return kept

    def _point(self, http: web.Request, kept: KeptStream) -> tuple[str, Point]:
        """Return the id of the event that the client names, and where it is after that event."""
        # A browser's EventSource repeats the URL that it began with, so its header is the newer of the two.
        name, id = "Last-Event-ID", http.headers.get("Last-Event-ID", "")
        if not id:
            name, id = "from", http.query.get("from", "")
        try:
            return id, kept.point_after(id)
        except BadEventId as e:
            message = f"{name} {id[:_MAX_SHOWN]!r} is not an event id of this stream: {e}."
            raise bad_request(message, name, "invalid_event_id") from None

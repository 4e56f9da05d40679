"""The HTTP application: its route table and the middleware around every handler.

Run it with ``handler_cancellation=True``: when a client hangs up, the cancellation of its handler frees the blocks of
a request that does not stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

import msgspec
from aiohttp import web

from daemon.api import metrics
from daemon.api.access_log import AccessLog
from daemon.api.auth import Keys, current_key
from daemon.api.errors import OPENAI_ERRORS, ApiError, ErrorShape, body_too_large, to_api_error
from daemon.api.loop_clock import LoopClock
from daemon.api.openai import OpenAI
from daemon.api.origins import OriginPolicy
from daemon.api.other_frontends import PassedOn
from daemon.api.render.apis import HANDLERS
from daemon.api.request_id import request_id
from daemon.api.request_metrics import count_rejection
from daemon.api.response_head import response_headers
from daemon.api.service import Service
from daemon.api.streams import Streams
from daemon.config import Config
from daemon.ipc.metrics_page import MetricsPage

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Route(NamedTuple):
    method: str
    path: str
    handler: Handler
    name: str  # label in the metrics
    public: bool = False  # needs no key
    errors: ErrorShape = OPENAI_ERRORS


def build_app(service: Service, keys: Keys | None) -> web.Application:
    """Build the application of one frontend. Without `keys` it accepts every client and ignores its key."""
    config, origins = service.config, service.origins
    middleware = _Middleware(config, keys, service.page, origins)
    app = web.Application(middlewares=[middleware.handle], client_max_size=config.max_body)
    for route in _routes(service):
        resource = app.router.add_resource(route.path)  # the same one for two routes in a row with one path
        for method in ("GET", "HEAD") if route.method == "GET" else (route.method,):
            middleware.add(resource.add_route(method, route.handler), route)

    async def finish_headers(http: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(response_headers(http, origins))

    app.on_response_prepare.append(finish_headers)

    async def lifetime(_: web.Application) -> AsyncIterator[None]:
        yield
        service.close()

    app.cleanup_ctx.append(lifetime)
    return app


def _routes(service: Service) -> list[Route]:
    api = OpenAI(service)
    health, streams = _Health(service), Streams(service)
    return [
        Route("POST", "/v1/chat/completions", api.chat_completions, "chat"),
        Route("POST", "/v1/completions", api.completions, "completions"),
        Route("GET", "/v1/models", api.models, "models"),
        Route("GET", "/v1/models/{model:.+}", api.model, "models"),
        Route("GET", "/v1/streams/{id}", streams.read, "streams"),
        Route("DELETE", "/v1/streams/{id}", streams.cancel, "streams"),
        Route("POST", "/tokenize", api.tokenize, "tokenize"),
        Route("POST", "/detokenize", api.detokenize, "detokenize"),
        Route("GET", "/health", health.alive, "health", public=True),
        Route("GET", "/health/ready", health.ready, "health", public=True),
        Route("GET", "/metrics", health.metrics, "metrics"),
    ]


class _Health:
    """Handlers for liveness, readiness and metrics."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def alive(self, http: web.Request) -> web.Response:
        return _status("ok")

    async def ready(self, http: web.Request) -> web.Response:
        if not self._service.generator.ready:
            message = "No engine serves, or this server drains."
            raise ApiError(503, message, type="server_error", code="not_ready", headers={"Retry-After": "2"})
        return _status("ready")

    async def metrics(self, http: web.Request) -> web.Response:
        snapshot = self._service.metrics.read_all()
        name = self._service.model_config.name
        # In a thread: with many engines the page takes long to write.
        text = await asyncio.to_thread(
            metrics.render, name, snapshot.frontends, snapshot.engines, snapshot.facts, snapshot.states
        )
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


class _Middleware:
    """Checks names, body size and key of every request, turns exceptions into OpenAI's errors, counts and logs."""

    def __init__(self, config: Config, keys: Keys | None, page: MetricsPage, origins: OriginPolicy) -> None:
        self._max_body = config.max_body
        self._keys = keys
        self._page = page
        self._origins = origins
        self._access_log = AccessLog(config.access_log)
        self._clock = LoopClock(page)
        self._names: dict[web.AbstractRoute, str] = {}
        self._errors: dict[web.AbstractRoute, ErrorShape] = {}
        self._public: set[web.AbstractRoute] = set()

    def add(self, registered: web.AbstractRoute, route: Route) -> None:
        self._names[registered] = route.name
        self._errors[registered] = route.errors
        if route.public:
            self._public.add(registered)

    @web.middleware
    async def handle(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        name = self._names.get(request.match_info.route, "unknown")
        start = time.monotonic()
        try:
            with self._clock:
                response = await self._check_and_run(request, handler)
        except asyncio.CancelledError:
            self._page.inc("http_requests", 1, name, "disconnect")
            self._access_log.write(request, None, time.monotonic() - start, request_id(request))
            raise
        except Exception as e:
            error = to_api_error(e)
            if name in HANDLERS:
                count_rejection(self._page, error)
            response = error.response(self._errors.get(request.match_info.route))
        if isinstance(response, PassedOn):
            return response  # the frontend that answers it counts it
        self._page.inc("http_requests", 1, name, f"{response.status // 100}xx")
        self._access_log.write(request, response.status, time.monotonic() - start, request_id(request))
        return response

    async def _check_and_run(self, http: web.Request, handler: Handler) -> web.StreamResponse:
        origin = http.headers.get("Origin")
        self._origins.check(http.headers.get("Host"), origin)
        if http.method == "OPTIONS" and origin and "Access-Control-Request-Method" in http.headers:
            return web.Response(status=204, headers=self._origins.response_headers(origin, preflight=True))
        if (http.content_length or 0) > self._max_body:
            raise body_too_large(self._max_body)
        # The matched route decides, never the text of the path: an unknown path needs a key too.
        if self._keys is not None and http.match_info.route not in self._public:
            current_key.set(self._keys.check(http.headers.get("Authorization")))
        return await handler(http)


def _status(word: str) -> web.Response:
    return web.Response(body=msgspec.json.encode({"status": word}), content_type="application/json")

"""The HTTP application: its route table and the middleware around every handler.

Run it with ``handler_cancellation=True``: when a client hangs up, the cancellation of its handler frees the blocks of
a request that does not stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import NamedTuple

from aiohttp import web

from daemon.api.access_log import AccessLog
from daemon.api.auth import Keys, current_key, sent_key
from daemon.api.errors import OPENAI_ERRORS, ErrorShape, body_too_large, to_api_error
from daemon.api.idempotency import pass_home
from daemon.api.loop_clock import LoopClock
from daemon.api.messages.handler import Messages
from daemon.api.openai import OpenAI
from daemon.api.origins import OriginPolicy
from daemon.api.other_frontends import PassedOn
from daemon.api.render.apis import HANDLERS, RESPONSES
from daemon.api.render.messages import MESSAGES_ERRORS
from daemon.api.request_id import request_id
from daemon.api.request_metrics import count_rejection
from daemon.api.response_head import response_headers
from daemon.api.responses.handler import Responses
from daemon.api.routes.openapi import Described, Description
from daemon.api.routes.probes import Probes
from daemon.api.routes.spellings import OtherSpellings
from daemon.api.routes.unserved import unknown_url
from daemon.api.service import Service
from daemon.api.streams import Streams
from daemon.config import Config
from daemon.ipc.metrics_page import MetricsPage

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
PassOn = Callable[[web.Request], Awaitable[PassedOn | None]]


class Route(NamedTuple):
    method: str
    path: str
    handler: Handler
    name: str  # label in the metrics
    public: bool = False  # needs no key
    errors: ErrorShape = OPENAI_ERRORS
    azure: bool = False  # also behind /openai/deployments/MODEL


def build_app(service: Service, keys: Keys | None) -> web.Application:
    """Build the application of one frontend. Without `keys` it accepts every client and ignores its key."""
    config, origins = service.config, service.origins
    middleware = _Middleware(config, keys, service.page, origins, partial(pass_home, service))
    app = web.Application(middlewares=[middleware.handle], client_max_size=config.max_body)
    routes = _routes(service)
    description = Description(keys=keys is not None)
    routes.append(Route("GET", "/openapi.json", description.read, "info"))
    description.routes = [Described(r.method, r.path, r.name, r.public) for r in routes]
    for route in routes:
        resource = app.router.add_resource(route.path)  # the same one for two routes in a row with one path
        for method in ("GET", "HEAD") if route.method == "GET" else (route.method,):
            middleware.add(resource.add_route(method, route.handler), route)
    behind_models = [route.path.removeprefix("/v1/") for route in routes if route.azure]
    app.router.register_resource(OtherSpellings(app.router, behind_models))

    async def finish_headers(http: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(response_headers(http, origins))

    app.on_response_prepare.append(finish_headers)

    async def lifetime(_: web.Application) -> AsyncIterator[None]:
        yield
        service.close()

    app.cleanup_ctx.append(lifetime)
    return app


def _routes(service: Service) -> list[Route]:
    api, responses, messages = OpenAI(service), Responses(service), Messages(service)
    probes, streams = Probes(service), Streams(service)
    return [
        Route("POST", "/v1/chat/completions", api.chat_completions, "chat", azure=True),
        Route("POST", "/v1/completions", api.completions, "completions", azure=True),
        Route("POST", "/v1/responses", responses.create, "responses", errors=RESPONSES.renderer.errors, azure=True),
        Route("POST", "/v1/messages", messages.create, "messages", errors=MESSAGES_ERRORS),
        Route("POST", "/v1/messages/count_tokens", messages.count_tokens, "messages", errors=MESSAGES_ERRORS),
        Route("GET", "/v1/models", api.models, "models"),
        Route("GET", "/v1/models/{model:.*[^/]}", api.model, "models"),
        Route("GET", "/v1/streams/{id}", streams.read, "streams"),
        Route("DELETE", "/v1/streams/{id}", streams.cancel, "streams"),
        Route("POST", "/tokenize", api.tokenize, "tokenize"),
        Route("POST", "/detokenize", api.detokenize, "detokenize"),
        Route("GET", "/health", probes.alive, "health", public=True),
        Route("GET", "/health/ready", probes.ready, "health", public=True),
        Route("GET", "/ping", probes.ready, "health", public=True),
        Route("POST", "/ping", probes.ready, "health", public=True),
        Route("GET", "/version", probes.version, "info"),
        Route("GET", "/load", probes.load, "info"),
        Route("GET", "/metrics", probes.metrics, "metrics"),
    ]


class _Middleware:
    """Checks names, body size and key of every request, turns exceptions into OpenAI's errors, counts and logs."""

    def __init__(
        self, config: Config, keys: Keys | None, page: MetricsPage, origins: OriginPolicy, pass_on: PassOn
    ) -> None:
        """`pass_on`: has another frontend answer a request for a completion that belongs there."""
        self._pass_on = pass_on
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
            error.request_id = request_id(request)
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
            current_key.set(self._keys.check(*sent_key(http.headers)))
        if isinstance(http.match_info.http_exception, web.HTTPNotFound):
            raise unknown_url(http.path)
        if self._names.get(http.match_info.route) in HANDLERS and (passed := await self._pass_on(http)) is not None:
            return passed
        return await handler(http)

"""The HTTP application: its route table, and what happens around every handler.

Run it with ``handler_cancellation=True``: a handler whose client hangs up must be cancelled, for that is what frees
the blocks of a request that does not stream.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

import msgspec
from aiohttp import web

from daemon.api import metrics
from daemon.api.auth import KeyRing, current_key
from daemon.api.errors import ApiError, body_too_large
from daemon.api.generator import Generator
from daemon.api.metrics import FrontendMetrics
from daemon.api.openai import OpenAI
from daemon.api.request_metrics import count_rejection
from daemon.api.service import Service, explain
from daemon.config import Config
from daemon.models.chat_template import ChatTemplate
from daemon.models.model_config import ModelConfig
from daemon.models.tokenizer import Tokenizer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_SANE_ID = re.compile(r"[A-Za-z0-9_.:/+=-]{1,128}")
_ANSWERS = ("chat", "completions")


class Route(NamedTuple):
    method: str
    path: str
    handler: Handler
    name: str  # in the statistics
    open: bool = False  # needs no key


def build_app(
    *,
    config: Config,
    generator: Generator,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate,
    model_config: ModelConfig,
    keys: KeyRing | None,
    metrics: FrontendMetrics,
) -> web.Application:
    """The application of one frontend. Without `keys` every client is let in, whatever key it sends."""
    service = Service(
        config=config,
        generator=generator,
        tokenizer=tokenizer,
        chat_template=chat_template,
        model_config=model_config,
        metrics=metrics,
    )
    gate = _Gate(config, keys, metrics)
    app = web.Application(middlewares=[gate.middleware], client_max_size=config.max_body)
    for route in _routes(service):
        resource = app.router.add_resource(route.path)
        for method in ("GET", "HEAD") if route.method == "GET" else (route.method,):
            gate.add(resource.add_route(method, route.handler), route)
    app.on_response_prepare.append(_finish_headers)

    async def lifetime(_: web.Application) -> AsyncIterator[None]:
        yield
        service.close()

    app.cleanup_ctx.append(lifetime)
    return app


def _routes(service: Service) -> list[Route]:
    api = OpenAI(service)
    health = _Health(service)
    return [
        Route("POST", "/v1/chat/completions", api.chat_completions, "chat"),
        Route("POST", "/v1/completions", api.completions, "completions"),
        Route("GET", "/v1/models", api.models, "models"),
        Route("GET", "/v1/models/{model:.+}", api.model, "models"),
        Route("POST", "/tokenize", api.tokenize, "tokenize"),
        Route("POST", "/detokenize", api.detokenize, "detokenize"),
        Route("GET", "/health", health.alive, "health", open=True),
        Route("GET", "/health/ready", health.ready, "health", open=True),
        Route("GET", "/metrics", health.metrics, "metrics"),
    ]


class _Health:
    """Alive, ready and measured: three different questions."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def alive(self, http: web.Request) -> web.Response:
        return _status("ok")

    async def ready(self, http: web.Request) -> web.Response:
        if not self._service.generator.ready:
            message = "No engine is serving, or this server is draining."
            raise ApiError(503, message, type="server_error", code="not_ready", headers={"Retry-After": "2"})
        return _status("ready")

    async def metrics(self, http: web.Request) -> web.Response:
        fleet = self._service.metrics.fleet()
        text = metrics.render(
            self._service.model_config.name, fleet.frontends, fleet.engines, fleet.facts, fleet.states
        )
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


class _Gate:
    """Around every handler: size, key, errors in OpenAI's shape, statistics."""

    def __init__(self, config: Config, keys: KeyRing | None, metrics: FrontendMetrics) -> None:
        self._max_body = config.max_body
        self._keys = keys
        self._page = metrics.page
        self._names: dict[web.AbstractRoute, str] = {}
        self._open: set[web.AbstractRoute] = set()

    def add(self, matched: web.AbstractRoute, route: Route) -> None:
        self._names[matched] = route.name
        if route.open:
            self._open.add(matched)

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        name = self._names.get(request.match_info.route, "unknown")
        try:
            response = await self._answer(request, handler)
        except asyncio.CancelledError:
            self._page.inc("http_requests", 1, name, "disconnect")
            raise
        except Exception as e:
            error = explain(e)
            if name in _ANSWERS:
                count_rejection(self._page, error)
            response = error.response()
        self._page.inc("http_requests", 1, name, f"{response.status // 100}xx")
        return response

    async def _answer(self, http: web.Request, handler: Handler) -> web.StreamResponse:
        if (http.content_length or 0) > self._max_body:
            raise body_too_large(self._max_body)
        # Decided by the route that matched, never by the text of the path: unknown ones are closed too.
        if self._keys is not None and http.match_info.route not in self._open:
            current_key.set(self._keys.check(http.headers.get("Authorization")))
        return await handler(http)


def _status(word: str) -> web.Response:
    return web.Response(body=msgspec.json.encode({"status": word}), content_type="application/json")


async def _finish_headers(http: web.Request, response: web.StreamResponse) -> None:
    asked = http.headers.get("x-request-id", "")
    response.headers["x-request-id"] = asked if _SANE_ID.fullmatch(asked) else uuid.uuid4().hex
    response.headers["Server"] = "llumd"

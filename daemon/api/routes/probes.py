"""Routes that tell how this server is: liveness, readiness, version, load and metrics."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from daemon import __version__
from daemon.api import metrics
from daemon.api.errors import ApiError
from daemon.api.service import Service


class Probes:
    """The handlers of these routes."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def alive(self, http: web.Request) -> web.Response:
        return _json({"status": "ok"})

    async def ready(self, http: web.Request) -> web.Response:
        if not self._service.generator.ready:
            message = "No engine serves, or this server drains."
            raise ApiError(503, message, type="server_error", code="not_ready", headers={"Retry-After": "2"})
        return _json({"status": "ready"})

    async def version(self, http: web.Request) -> web.Response:
        return _json({"version": __version__})

    async def load(self, http: web.Request) -> web.Response:
        """Answer the number of requests that the engines have, queued or running, in vLLM's form."""
        facts = self._service.metrics.read_all().facts
        return _json({"server_load": sum(f.running + f.waiting for f in facts if f is not None)})

    async def metrics(self, http: web.Request) -> web.Response:
        snapshot = self._service.metrics.read_all()
        name = self._service.model_config.name
        # In a thread: with many engines the page takes long to write.
        text = await asyncio.to_thread(
            metrics.render, name, snapshot.frontends, snapshot.engines, snapshot.facts, snapshot.states
        )
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


def _json(body: dict[str, Any]) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")

"""The description of this API at ``/openapi.json``: OpenAPI 3.1, made from the types of requests and answers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from daemon import __version__
from daemon.api.routes.operations import OPERATIONS, Operation

_VARIABLE = re.compile(r"\{(\w+)(?::[^}]*)?\}")
_REF = "#/components/schemas/{name}"
_KEY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
}
_ANY_ROUTE = (403, 500, 503)
_WITH_BODY = (400, 404, 408, 413, 415)
_OF_COMPLETIONS = (409, 422, 429, 504)


class Described(NamedTuple):
    """A route. `name`: of its group. `public`: it needs no key."""

    method: str
    path: str
    name: str
    public: bool

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.method, self.path]


class Description:
    """The handler of the route of the description."""

    def __init__(self, *, keys: bool) -> None:
        """`keys`: clients need an API key. Set `routes` before the first request."""
        self.routes: list[Described] = []
        self._keys = keys
        self._body = b""

    async def read(self, http: web.Request) -> web.Response:
        if not self._body:
            self._body = msgspec.json.encode(describe(self.routes, keys=self._keys))
        return web.Response(body=self._body, content_type="application/json")


def describe(routes: Iterable[Described], *, keys: bool) -> dict[str, Any]:
    """Return the description of the routes. `keys`: clients need an API key. Pure."""
    routes = list(routes)
    about = [route.operation for route in routes]
    types = {t for o in about for t in (o.request, o.answer, *o.events, o.error) if t is not None}
    named = sorted(types, key=str)
    _, schemas = msgspec.json.schema_components(named, ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = _VARIABLE.sub(r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, keys=keys)
    body: dict[str, Any] = {
        "openapi": "3.1.1",
        "info": {
            "title": "llumd",
            "version": __version__,
            "description": "OpenAI's API, and some routes of vLLM's. Each path under /v1 also works without it.",
        },
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if keys:
        body["components"]["securitySchemes"] = _KEY_SCHEMES
        body["security"] = [{name: []} for name in _KEY_SCHEMES]
    return body


def _operation(route: Described, *, keys: bool) -> dict[str, Any]:
    about = route.operation
    described: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", route.method.lower() + _VARIABLE.sub(r"by_\1", route.path)),
        "summary": about.summary,
        "tags": [route.name],
    }
    if keys and route.public:
        described["security"] = []
    parameters = [_parameter(m[1], "path") for m in _VARIABLE.finditer(route.path)]
    parameters += [_parameter(h.name, "header", h.meaning, h.values) for h in about.headers]
    if parameters:
        described["parameters"] = parameters
    if about.request is not None:
        described["requestBody"] = {"required": True, "content": _json(about.request)}
    described["responses"] = {"200": _success(about)} | _errors(route, keys=keys)
    return described


def _success(about: Operation) -> dict[str, Any]:
    content: dict[str, Any] = _json(about.answer) if about.answer is not None else {}
    if about.events:
        kinds = [{"$ref": _REF.format(name=kind.__name__)} for kind in (*about.events, about.error)]
        encoded = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
        data = {"anyOf": [encoded, {"const": "[DONE]"}]}
        content["text/event-stream"] = {
            "schema": {
                "type": "object",
                "description": f"One event; the last one {about.last}.",
                "properties": {"id": {"type": "string"}, "event": {"type": "string"}, "data": data},
            }
        }
    if about.text:
        content[about.text] = {"schema": {"type": "string"}}
    return {"description": "OK", "content": content}


def _errors(route: Described, *, keys: bool) -> dict[str, Any]:
    about = route.operation
    statuses = {*_ANY_ROUTE, *about.statuses}
    if about.request is not None:
        statuses.update(_WITH_BODY)
    if about.events and about.request is not None:
        statuses.update(_OF_COMPLETIONS)
    if "{" in route.path:
        statuses.add(404)
    if keys and not route.public:
        statuses.add(401)
    error = _json(about.error)
    return {str(s): {"description": HTTPStatus(s).phrase, "content": error} for s in sorted(statuses)}


def _json(type_: type[msgspec.Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(name=type_.__name__)}}}


def _parameter(name: str, place: str, meaning: str = "", values: tuple[str, ...] = ()) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"} | ({"enum": list(values)} if values else {})
    described = {"name": name, "in": place, "required": place == "path", "schema": schema}
    return described | ({"description": meaning} if meaning else {})

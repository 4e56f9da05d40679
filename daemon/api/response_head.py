"""The headers that all responses have, and whole heads for connections that aiohttp does not serve."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from email.utils import formatdate

from aiohttp import web

from daemon.api.errors import ApiError, ErrorShape
from daemon.api.origins import OriginPolicy
from daemon.api.request_id import request_id

STREAM_HEADER = "X-Llumd-Stream"  # id of a kept stream
EVENT_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
JSON_HEADERS = {"Content-Type": "application/json"}


def response_headers(http: web.Request, origins: OriginPolicy) -> dict[str, str]:
    """Return the headers that every response to this request has."""
    common = {"x-request-id": request_id(http), "Server": "llumd"}
    if "anthropic-version" in http.headers:  # its clients know the id by another name
        common["request-id"] = common["x-request-id"]
    return common | dict(origins.response_headers(http.headers.get("Origin")))


def common_headers() -> dict[str, str]:
    """Return the headers of a response without a request."""
    return {"Server": "llumd", "x-request-id": uuid.uuid4().hex}


def raw_head(status: int, reason: str, headers: Mapping[str, str], *, minor: int = 1) -> bytes:
    """Return the head of a response after which the connection is closed. `minor`: of the HTTP version."""
    fields = {**headers, "Date": formatdate(usegmt=True), "Connection": "close"}
    lines = [f"HTTP/1.{minor} {status} {reason}", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def raw_error(
    error: ApiError, headers: Mapping[str, str], *, minor: int = 1, shape: ErrorShape | None = None
) -> bytes:
    """Return a whole response with this error, after which the connection is closed. `shape`: as in `response`."""
    response = error.response(shape)
    body = response.body
    assert isinstance(body, bytes)
    fields = JSON_HEADERS | {"Content-Length": str(len(body))} | error.headers | dict(headers)
    return raw_head(error.status, response.reason, fields, minor=minor) + body

"""Errors of the HTTP API: OpenAI's error body, status codes and retry headers.

429 means that the capacity is used up, 503 that there is none; clients should retry both. Where a retry would only
repeat the failure, ``x-should-retry: false`` stops the official clients from retrying.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import msgspec
from aiohttp import web

from daemon.api.generator import EngineLost, NoEngine, Overloaded, ShuttingDown, TooLong, TooMany
from daemon.api.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
_failures = RateLimitedLog(log, logging.ERROR)

_NO_RETRY = {"x-should-retry": "false"}


class ApiError(Exception):
    """A failure as the fields of OpenAI's error object. `param` names the request field with the wrong value."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        # A message may repeat what the client sent. Unpaired surrogates in it cannot be encoded.
        self.message = message.encode("utf-8", "replace").decode()
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        self.request_id = ""  # of the request that failed, for the shapes that name it

    def body(self) -> dict[str, Any]:
        """Return ``{"error": {...}}`` with all four members."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self, shape: ErrorShape | None = None) -> web.Response:
        """Return the error as a whole response, in the shape of an API; None: OpenAI's."""
        body = msgspec.json.encode((shape or OPENAI_ERRORS).body(self))
        return web.Response(body=body, status=self.status, headers=self.headers, content_type="application/json")


class ErrorShape(Protocol):
    """How one API writes an error. The status and the headers are the same in all of them."""

    def body(self, error: ApiError) -> dict[str, Any]:
        """Return the body of a response that is an error."""
        ...

    def event(self, error: ApiError) -> bytes:
        """Return the last event of a stream that has begun."""
        ...


class _OpenAIErrors:
    """``{"error": {"message", "type", "param", "code"}}``"""

    def body(self, error: ApiError) -> dict[str, Any]:
        return error.body()

    def event(self, error: ApiError) -> bytes:
        return b"data: " + msgspec.json.encode(error.body()) + b"\n\n"


OPENAI_ERRORS: ErrorShape = _OpenAIErrors()


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def context_length_exceeded(message: str, param: str) -> ApiError:
    return bad_request(message, param, "context_length_exceeded")


def model_not_found(requested: str, served: Iterable[str]) -> ApiError:
    names = ", ".join(f"`{name}`" for name in served)
    message = f"The model `{requested}` does not exist here. This server serves {names}."
    return ApiError(404, message, param="model", code="model_not_found")


def unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def body_too_large(limit: int) -> ApiError:
    # Close the connection: otherwise the server parses the unread rest of the body as the next request.
    return ApiError(413, f"The request body is larger than {limit} bytes.", headers={"Connection": "close"})


def bodies_full(limit: int) -> ApiError:
    message = f"The request bodies that are being received fill the {limit} bytes for them; try again shortly."
    headers = {"Retry-After": "2", "Connection": "close"}
    return ApiError(503, message, type="server_error", code="bodies_full", headers=headers)


def body_timeout(message: str) -> ApiError:
    return ApiError(408, message, code="body_timeout", headers={"Connection": "close"})


def too_many_connections() -> ApiError:
    message = "This server has as many connections as it can hold; try again shortly."
    return ApiError(503, message, type="server_error", code="too_many_connections", headers={"Retry-After": "2"})


def forbidden(message: str) -> ApiError:
    return ApiError(403, message, type="permission_error", code="forbidden")


def deadline_exceeded(seconds: float) -> ApiError:
    message = f"The request did not finish within {seconds:g} seconds, so the server ended it."
    return ApiError(504, message, type="timeout_error", code="deadline_exceeded", headers=_NO_RETRY)


def dead_end(num_tokens: int) -> ApiError:
    message = f"After {num_tokens} tokens the grammar demands a text that no token of this model can write."
    return bad_request(f"{message} Allow other characters there.", code="grammar_dead_end")


def cancelled() -> ApiError:
    message = "An operator cancelled the request."
    return ApiError(503, message, type="server_error", code="cancelled", headers=_NO_RETRY)


def stream_cancelled() -> ApiError:
    return ApiError(409, "The client has cancelled this stream.", code="cancelled", headers=_NO_RETRY)


def idempotency_key_reused() -> ApiError:
    message = "This `Idempotency-Key` belongs to another request, with another body or path. Send a new key."
    return ApiError(422, message, param="Idempotency-Key", code="idempotency_key_reused", headers=_NO_RETRY)


def stream_not_found(id: str) -> ApiError:
    message = (
        f"There is no stream `{id}` here. It can be read again if its request had the header `X-Llumd-Keep: 1`: "
        "by the client that has sent it, and for a limited time after its end."
    )
    return ApiError(404, message, param="id", code="stream_not_found")


def lost(reason: str, *, retry: bool) -> ApiError:
    message = f"The engine could not finish this request: {reason}"
    return ApiError(500, message, type="server_error", code="engine_error", headers={} if retry else _NO_RETRY)


def internal() -> ApiError:
    return ApiError(500, "Internal error; the server's log has the details.", type="server_error")


def to_api_error(error: Exception) -> ApiError:
    """Return the error for the client. An unexpected exception goes to the log, never to the client."""
    known = _from_exception(error)
    if known is None:
        _failures.write("unexpected failure of a request", exc_info=error)
    return known or internal()


def _from_exception(error: Exception) -> ApiError | None:
    """Return the error for an exception of the generator or aiohttp; None if it is unexpected."""
    known: ApiError | None = None
    match error:
        case ApiError():
            known = error
        case Overloaded():
            headers = {"Retry-After": str(max(1, error.retry_after))}
            kind, code = "rate_limit_error", "rate_limit_exceeded"
            known = ApiError(429, str(error), type=kind, code=code, headers=headers)
        case NoEngine():
            message = str(error) or "No engine can serve requests now."
            headers = {"Retry-After": "2"}
            known = ApiError(503, message, type="server_error", code="no_engine", headers=headers)
        case ShuttingDown():
            headers = {"Retry-After": "2"}
            known = ApiError(503, str(error), type="server_error", code="shutting_down", headers=headers)
        case TooMany():
            known = bad_request(str(error))
        case TooLong():
            known = bad_request(str(error), code="context_length_exceeded")
        case EngineLost():
            known = lost(str(error), retry=error.retry)
        case web.HTTPException():
            known = _from_http(error)
    return known


def _from_http(error: web.HTTPException) -> ApiError:
    if error.status == 405:
        allow = error.headers.get("Allow", "")
        message = f"This method is not allowed here. Allowed: {allow}."
        return ApiError(405, message, code="method_not_allowed", headers={"Allow": allow})
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return ApiError(error.status, error.reason, type=kind)

"""The id by which client and operator name an HTTP request: the header `x-request-id`."""

from __future__ import annotations

import re
import uuid

from aiohttp import web

ANSWER_ID: web.RequestKey[str] = web.RequestKey("answer_id", str)  # `id` in the answer of a completion
_REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
_KEPT = re.compile(r"[a-z]+[-_]([0-9a-f])[0-9a-f]{31}")
_DIGITS = 32  # of the id of an answer, after the prefix of its API
_VALID = re.compile(r"[A-Za-z0-9_.:/+=-]{1,128}")


def kept_id(id: str, frontend: int) -> str:
    """Return this new id of an answer with the frontend that keeps it in its first digit."""
    prefix, digits = id[:-_DIGITS], id[-_DIGITS:]
    return f"{prefix}{frontend:x}{digits[1:]}"


def frontend_of(id: str) -> int | None:
    """Return the frontend that keeps the answer with this id; None if it is no id of an answer."""
    found = _KEPT.fullmatch(id)
    return int(found[1], 16) if found else None


def sent_request_id(http: web.Request) -> str:
    """Return the id that the client has sent; empty if it has sent none, or one that is not valid."""
    given = http.headers.get("x-request-id", "")
    return given if _VALID.fullmatch(given) else ""


def request_id(http: web.Request) -> str:
    """Return the id for the response: the client's own, else the answer's, else a new one; the same at each call."""
    known = http.get(_REQUEST_ID)
    if known is None:
        known = http[_REQUEST_ID] = sent_request_id(http) or http.get(ANSWER_ID) or uuid.uuid4().hex
    return known

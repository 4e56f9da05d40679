"""Answers requests with an `Idempotency-Key` once: sent again, they get the answer of the first, also while it runs.

Such a request is kept as a stream whose client asks for it: it goes on after a hang-up, and outlives its frontend.
All requests with one key are answered by one frontend.
"""

from __future__ import annotations

from aiohttp import web

from daemon.api.auth import client_name, current_key
from daemon.api.other_frontends import PassedOn
from daemon.api.request_id import ANSWER_ID
from daemon.api.request_identity import BODY_DIGEST, idempotency_key, identity
from daemon.api.respond import CheckedRequest, respond
from daemon.api.service import Service
from daemon.api.streams import send_events, send_whole

_REPLAYED = {"Idempotent-Replayed": "true"}


async def respond_once(service: Service, http: web.Request, request: CheckedRequest) -> web.StreamResponse:
    """Answer a request, with the answer of an earlier one if it is the same sent again. Raises as `respond` does.

    Raises ApiError (422) if its key belongs to another request.
    """
    key = idempotency_key(http)
    if not key or not service.config.keep_streams:
        return await respond(service, http, request)
    same = identity(request.client, key, http[BODY_DIGEST])
    async with service.kept.claim(same) as kept:
        if kept is None:
            request.identity = same
            return await respond(service, http, request)
    request.drop()
    http[ANSWER_ID] = kept.facts.id
    if kept.facts.form.stream:
        return await send_events(service, http, kept, "", kept.point_after(""), _REPLAYED)
    return await send_whole(service, http, kept, _REPLAYED)


async def pass_home(service: Service, http: web.Request) -> PassedOn | None:
    """Have the frontend that answers all requests with this one's key answer it; None if it is this frontend."""
    others, key = service.others, idempotency_key(http)
    if not key or others is None or not service.config.keep_streams:
        return None
    home = identity(client_name(current_key.get(), http.remote), key).home(others.count)
    if not others.reach(home):
        return None
    with service.bodies.hold() as held:
        return await others.pass_on(http, home, await held.read(http, service.config.max_body))

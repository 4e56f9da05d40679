"""The handler of the Responses API."""

from __future__ import annotations

import msgspec
from aiohttp import web

from daemon.api.chat import Chat, answer_chat, check_chat
from daemon.api.errors import ApiError
from daemon.api.render.apis import RESPONSES
from daemon.api.request_body import decode_body
from daemon.api.responses.lowering import extra, renamed, to_chat
from daemon.api.responses.schema import ResponsesRequest
from daemon.api.service import Service

_decoder = msgspec.json.Decoder(ResponsesRequest)


class Responses:
    """The handler of its route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, http: web.Request) -> web.StreamResponse:
        service = self._service
        try:
            with service.bodies.hold() as held:
                chat, rest = await service.read(http, held, self._parse)
                return await answer_chat(service, http, held, chat, api=RESPONSES, extra=rest)
        except ApiError as e:
            raise renamed(e) from None

    def _parse(self, raw: bytes, model: str | None) -> tuple[Chat, bytes]:
        body = decode_body(raw, _decoder)
        return check_chat(self._service, to_chat(body), model), extra(body)

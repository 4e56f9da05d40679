"""The handlers of the Messages API."""

from __future__ import annotations

import msgspec
from aiohttp import web

from daemon.api.chat import Chat, answer_chat, chat_prompt, check_chat
from daemon.api.errors import ApiError
from daemon.api.messages.lowering import renamed, to_chat
from daemon.api.messages.schema import CountTokensRequest, MessagesRequest
from daemon.api.render.apis import MESSAGES
from daemon.api.render.messages import MessageFacts
from daemon.api.request_body import decode_body
from daemon.api.service import Service

_create = msgspec.json.Decoder(MessagesRequest)
_count = msgspec.json.Decoder(CountTokensRequest)


class Messages:
    """The handlers of these routes. The headers `anthropic-version` and `anthropic-beta` change nothing."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, http: web.Request) -> web.StreamResponse:
        service = self._service
        try:
            with service.bodies.hold() as held:
                chat, extra = await service.read(http, held, self._parse)
                return await answer_chat(service, http, held, chat, api=MESSAGES, extra=extra)
        except ApiError as e:
            raise renamed(e) from None

    def _parse(self, raw: bytes, _: str | None) -> tuple[Chat, bytes]:
        body = decode_body(raw, _create)
        facts = MessageFacts(body.max_tokens)
        return self._check(body), msgspec.msgpack.encode(facts)

    async def count_tokens(self, http: web.Request) -> web.Response:
        service = self._service
        try:
            with service.bodies.hold() as held:
                chat = await service.read(http, held, lambda raw, _: self._check(decode_body(raw, _count)))
                prompt = await service.off_loop(lambda: chat_prompt(service, chat, MESSAGES.param), held.size)
        except ApiError as e:
            raise renamed(e) from None
        body = msgspec.json.encode({"input_tokens": len(prompt.tokens)})
        return web.Response(body=body, content_type="application/json")

    def _check(self, body: CountTokensRequest) -> Chat:
        return check_chat(self._service, to_chat(body, self._service.chat_template.variables))

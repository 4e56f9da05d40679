"""OpenAI's routes (chat completions, text completions, models) and vLLM's tokenizer routes."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from aiohttp import web

from daemon.api import schemas, validation
from daemon.api.answer import Prompt
from daemon.api.request_body import read_body
from daemon.api.respond import CheckedRequest, respond
from daemon.api.schemas import ChatRequest, CompletionRequest, Message
from daemon.api.service import Service

_chat = msgspec.json.Decoder(ChatRequest)
_completion = msgspec.json.Decoder(CompletionRequest)
_tokenize = msgspec.json.Decoder(schemas.TokenizeRequest)
_detokenize = msgspec.json.Decoder(schemas.DetokenizeRequest)


class OpenAI:
    """The handlers of these routes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._started = int(time.time())

    async def chat_completions(self, http: web.Request) -> web.StreamResponse:
        service = self._service
        body = await read_body(http, service.config.max_body, _chat)
        service.check_model(body.model)
        validation.check_chat(body, service.limits)

        variables = service.template_variables(body)

        def tokenise() -> list[Prompt]:
            text = service.render(body.messages, body.add_generation_prompt is not False, variables)
            # The template has written the special tokens, so the default is to add none.
            tokens = service.tokenizer.encode(text, bool(body.add_special_tokens))
            return [Prompt(tokens, _last_answer(body.messages))]

        size = _num_characters(body.messages)
        request = CheckedRequest(body, num_prompts=1, num_characters=size, tokenise=tokenise)
        return await respond(service, http, request)

    async def completions(self, http: web.Request) -> web.StreamResponse:
        service = self._service
        body = await read_body(http, service.config.max_body, _completion)
        service.check_model(body.model)
        validation.check_completion(body, service.limits)
        prompts = validation.split_prompts(body.prompt)
        special = body.add_special_tokens is not False

        def tokenise() -> list[Prompt]:
            encode = service.tokenizer.encode
            return [Prompt(encode(p, special), p) if isinstance(p, str) else Prompt(p, None) for p in prompts]

        size = sum(len(p) for p in prompts if isinstance(p, str))
        request = CheckedRequest(body, num_prompts=len(prompts), num_characters=size, tokenise=tokenise)
        return await respond(service, http, request)

    async def models(self, http: web.Request) -> web.Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, http: web.Request) -> web.Response:
        self._service.check_model(http.match_info["model"])
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        name = self._service.model_config.name
        owner = {"owned_by": "llumd", "root": name, "parent": None}
        length = {"max_model_len": self._service.max_model_len}
        return {"id": name, "object": "model", "created": self._started} | owner | length

    async def tokenize(self, http: web.Request) -> web.Response:
        service = self._service
        request = await read_body(http, service.config.max_body, _tokenize)
        service.check_model(request.model)
        validation.check_tokenize(request)
        variables = service.template_variables(request)
        size = len(request.prompt or "") + _num_characters(request.messages or [])
        tokens = await service.off_loop(lambda: self._tokens(request, variables), size)
        texts = [service.tokenizer.token_text(t) for t in tokens] if request.return_token_strs else None
        body = {"count": len(tokens), "max_model_len": service.max_model_len, "tokens": tokens}
        return _json(body | {"token_strs": texts})

    def _tokens(self, request: schemas.TokenizeRequest, variables: dict[str, Any]) -> list[int]:
        encode = self._service.tokenizer.encode
        if request.messages is None:
            return encode(request.prompt or "", request.add_special_tokens is not False)
        text = self._service.render(request.messages, request.add_generation_prompt is not False, variables)
        return encode(text, bool(request.add_special_tokens))

    async def detokenize(self, http: web.Request) -> web.Response:
        service = self._service
        request = await read_body(http, service.config.max_body, _detokenize)
        service.check_model(request.model)
        validation.check_tokens(request.tokens, service.limits.vocab_size, "tokens")
        text = await service.off_loop(lambda: service.spell(request.tokens), len(request.tokens))
        return _json({"prompt": text})


def _num_characters(messages: list[Message]) -> int:
    return sum(len(text) for message in messages for text in _texts(message))


def _last_answer(messages: list[Message]) -> str:
    """Return what a chat's `echo` repeats: the last message, if it is the assistant's."""
    return "".join(_texts(messages[-1])) if messages[-1].role == "assistant" else ""


def _texts(message: Message) -> list[str]:
    content = message.content
    return [part.text or "" for part in content] if isinstance(content, list) else [content or ""]


def _json(body: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")

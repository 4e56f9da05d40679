"""OpenAI's routes (chat completions, text completions, models) and vLLM's tokenizer routes."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from aiohttp import web

from daemon.api import schemas, validation
from daemon.api.chat import answer_chat, check_chat, check_tool_format
from daemon.api.grammar.requested import requested_grammar
from daemon.api.idempotency import respond_once
from daemon.api.prompt_encoder import PromptEncoder
from daemon.api.prompt_length import check_text_length
from daemon.api.render.answer import Prompt
from daemon.api.render.apis import COMPLETION
from daemon.api.request_body import decode_body
from daemon.api.respond import CheckedRequest
from daemon.api.schemas import ChatRequest, CompletionRequest
from daemon.api.service import Service
from daemon.api.tools import ToolUse, tool_use

MAX_TOKENIZE = 1 << 17  # tokens that /tokenize returns at most, if the model's context is not longer

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
        with service.bodies.hold() as held:
            chat = await service.read(
                http, held, lambda raw, model: check_chat(service, decode_body(raw, _chat), model)
            )
            return await answer_chat(service, http, held, chat)

    async def completions(self, http: web.Request) -> web.StreamResponse:
        service = self._service
        with service.bodies.hold() as held:
            body, num_prompts = await service.read(http, held, self._parse_completion)
            special, echo = body.add_special_tokens is not False, body.echo
            encoder = PromptEncoder.of(service, body, COMPLETION.param)

            def encode(prompt: str | list[int]) -> Prompt:
                tokens = encoder.encode(prompt, special) if isinstance(prompt, str) else encoder.cut(prompt)
                if not echo or (isinstance(prompt, str) and body.truncate_prompt_tokens is None):
                    return Prompt(tokens, prompt if echo and isinstance(prompt, str) else "")
                return Prompt(tokens, service.tokenizer.decode(tokens))

            def tokenise() -> list[Prompt]:
                return [encode(prompt) for prompt in validation.split_prompts(body.prompt)]

            request = CheckedRequest(
                http,
                body,
                api=COMPLETION,
                num_prompts=num_prompts,
                held=held,
                tokenise=tokenise,
                grammar=requested_grammar(body),
            )
            return await respond_once(service, http, request)

    def _parse_completion(self, raw: bytes, model: str | None) -> tuple[CompletionRequest, int]:
        body = decode_body(raw, _completion)
        self._service.check_model(model or body.model)
        validation.check_completion(body, self._service.limits)
        return body, len(validation.split_prompts(body.prompt))

    async def models(self, http: web.Request) -> web.Response:
        return _json({"object": "list", "data": [self._model(name) for name in self._service.model_names]})

    async def model(self, http: web.Request) -> web.Response:
        name = http.match_info["model"]
        self._service.check_model(name)
        return _json(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        owner = {"owned_by": "llumd", "root": self._service.model_config.name, "parent": None}
        length = {"max_model_len": self._service.max_model_len}
        return {"id": name, "object": "model", "created": self._started} | owner | length

    async def tokenize(self, http: web.Request) -> web.Response:
        service, length = self._service, self._service.max_model_len
        with service.bodies.hold() as held:
            request, variables = await service.read(http, held, self._parse_tokenize)
            return await service.off_loop(lambda: self._tokenized(request, variables, length), held.size)

    def _parse_tokenize(self, raw: bytes, model: str | None) -> tuple[schemas.TokenizeRequest, dict[str, Any]]:
        request = decode_body(raw, _tokenize)
        self._service.check_model(model or request.model)
        validation.check_tokenize(request, self._service.limits)
        self._tools(request)
        return request, self._service.template_variables(request)

    def _tools(self, request: schemas.TokenizeRequest) -> ToolUse | None:
        use = tool_use(request.tools, request.tool_choice, None)
        if use is not None:
            check_tool_format(self._service, use)
        return use

    def _tokenized(
        self, request: schemas.TokenizeRequest, variables: dict[str, Any], max_model_len: int
    ) -> web.Response:
        service, special = self._service, request.add_special_tokens
        if request.messages is None:
            text, param, special = request.prompt or "", "prompt", special is not False
        else:
            use = self._tools(request)
            text = service.render(
                request.messages,
                request.add_generation_prompt is not False,
                variables,
                use.tools if use is not None else None,
                open_end=bool(request.continue_final_message),
            )
            param = "messages"
        check_text_length(text, service.tokenizer, max(max_model_len, MAX_TOKENIZE), param)
        tokens = service.tokenizer.encode(text, bool(special))
        texts = [service.tokenizer.token_text(t) for t in tokens] if request.return_token_strs else None
        body = {"count": len(tokens), "max_model_len": max_model_len, "tokens": tokens}
        return _json(body | {"token_strs": texts})

    async def detokenize(self, http: web.Request) -> web.Response:
        service = self._service
        with service.bodies.hold() as held:
            request = await service.read(http, held, self._parse_detokenize)
            return await service.off_loop(lambda: _json({"prompt": service.spell(request.tokens)}), held.size)

    def _parse_detokenize(self, raw: bytes, model: str | None) -> schemas.DetokenizeRequest:
        request = decode_body(raw, _detokenize)
        self._service.check_model(model or request.model)
        known = max(self._service.tokenizer.vocab_size, self._service.limits.vocab_size)
        validation.check_tokens(request.tokens, known, "tokens")
        return request


def _json(body: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")

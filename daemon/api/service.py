"""What every handler works with, and the way from an HTTP body to tokens."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import PayloadEncodingError

from daemon.api.errors import ApiError, bad_request, body_too_large, from_exception, internal, model_not_found
from daemon.api.generator import Generator
from daemon.api.metrics import FrontendMetrics
from daemon.api.schemas import Message
from daemon.api.validation import Limits
from daemon.config import Config
from daemon.models.chat_template import ChatError, ChatTemplate
from daemon.models.model_config import ModelConfig
from daemon.models.tokenizer import Detokenizer, Tokenizer

T = TypeVar("T")
log = logging.getLogger(__name__)

_BODY_SECONDS = 60.0  # a client may take to send its body
_OFF_LOOP = 4096  # characters; what is longer is tokenised by a thread
_FIELD = re.compile(r"at `\$\.([A-Za-z_]\w*)|missing required field `(\w+)`")


class Service:
    """One frontend's routes share one of these."""

    def __init__(
        self,
        *,
        config: Config,
        generator: Generator,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        model_config: ModelConfig,
        metrics: FrontendMetrics,
    ) -> None:
        self.config = config
        self.generator = generator
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.model_config = model_config
        self.metrics = metrics
        self.page = metrics.page
        self.limits = Limits(
            vocab_size=model_config.vocab_size,
            max_choices=config.max_choices,
            max_queued=config.max_queued,
            max_prompt_tokens=config.max_prompt_tokens,
            max_output_tokens=config.max_output_tokens,
        )
        # Few: tokenising must not starve the loop of processors.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokenise")
        self._spelt: tuple[list[str | None], list[bytes]] | None = None

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, tokens; what the model allows until an engine says so."""
        served = self.config.max_model_len or self.model_config.max_position
        return self.generator.max_model_len or served

    def check_model(self, asked: str | None) -> None:
        """Raise ApiError (404) for a model that is not served. None means the one that is."""
        if asked is not None and asked != self.model_config.name:
            raise model_not_found(asked[:200], self.model_config.name)

    async def off_loop(self, work: Callable[[], T], size: int) -> T:
        """Run `work` here, or in a thread if it handles more than a few thousand characters (`size`)."""
        if size <= _OFF_LOOP:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """The prompt of a conversation. Raises ApiError (400) if the template refuses it."""
        try:
            return self.chat_template.render([_as_dict(m) for m in messages], add_generation_prompt)
        except ChatError as e:
            raise bad_request(str(e), "messages") from None

    def spell(self, tokens: list[int]) -> str:
        """Text of `tokens`, special ones spelt out."""
        if self.tokenizer.special_ids.isdisjoint(tokens):
            return self.tokenizer.decode(tokens)
        return b"".join(map(self.tokenizer.token_bytes, tokens)).decode("utf-8", "replace")

    def output_detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        """Turns an answer's tokens to text as they come."""
        if skip_special_tokens:
            return self.tokenizer.detokenizer(continuing=True)
        if self._spelt is None:
            raw = [self.tokenizer.token_bytes(i) for i in range(self.tokenizer.vocab_size)]
            self._spelt = [_whole(b) for b in raw], raw
        return Detokenizer(*self._spelt, strip_space=False)


def explain(error: Exception) -> ApiError:
    """What the client is told; what nobody expected goes to the log, never to the client."""
    known = from_exception(error)
    if known is None:
        log.error("unexpected failure of a request", exc_info=error)
    return known or internal()


async def read_body(http: web.Request, limit: int, decode: Callable[[bytes], T]) -> T:
    """The decoded JSON body. Raises ApiError: 408, 413, 415 or 400 naming the field that has a wrong type."""
    # A page in a browser can send any other type to a local server without being asked for permission.
    if http.content_type != "application/json":
        raise ApiError(415, "Send the body as JSON, with `Content-Type: application/json`.")
    if http.headers.get("Content-Encoding", "identity") != "identity":
        raise ApiError(415, "A compressed body is not supported.")
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            body = await http.read()
    except web.HTTPRequestEntityTooLarge:
        raise body_too_large(limit) from None
    except TimeoutError:
        raise ApiError(408, "The body took too long to arrive.") from None
    except (web.RequestPayloadError, PayloadEncodingError):
        raise bad_request("The body is cut short or badly encoded.") from None
    return decode_json(body, decode)


def decode_json(body: bytes, decode: Callable[[bytes], T]) -> T:
    try:
        return decode(body)
    except msgspec.ValidationError as e:
        found = _FIELD.search(str(e))
        raise bad_request(f"{e}.", found and (found[1] or found[2])) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise bad_request("The body is not valid JSON in UTF-8.") from None
    except RecursionError:
        raise bad_request("The body is nested too deeply.") from None


def _as_dict(message: Message) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text or "" for part in content)
    # `developer` is newer than most templates, and means the same.
    role = "system" if message.role == "developer" else message.role
    given = {"name": message.name, "tool_calls": message.tool_calls, "tool_call_id": message.tool_call_id}
    return {"role": role, "content": content or ""} | {k: v for k, v in given.items() if v is not None}


def _whole(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None

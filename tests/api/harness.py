"""The real HTTP application with a scripted generator in the same process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from daemon.api.app import build_app
from daemon.api.auth import KeyRing
from daemon.api.generator import EngineLost, NoEngine, Overloaded, RequestAttributes, TokenChunk, TooLong
from daemon.api.kept_streams import KeptStreams
from daemon.api.key_file import parse_key
from daemon.api.metrics import DaemonSnapshot, FrontendMetrics
from daemon.api.origins import OriginPolicy
from daemon.api.service import Service
from daemon.config import Config
from daemon.enums import EarlyEnd
from daemon.ipc.messages import Finish, SamplingParams, TokenLogprobs
from daemon.ipc.metrics_page import ENGINE, FRONTEND, MetricsPage, snapshot
from daemon.ipc.prompt_logprobs import PromptLogprob
from daemon.models.chat_template import ChatTemplate
from daemon.models.model_config import ModelConfig, read_model_config
from daemon.models.tokenizer import Tokenizer
from tests.models.tiny_model import EOS_ID, make_tiny_llama

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
ANSWER = "the quick brown fox jumps over the lazy dog, naïve café 🙂"


@dataclass(frozen=True)
class Model:
    model_config: ModelConfig
    tokenizer: Tokenizer
    chat: ChatTemplate


@dataclass
class Submission:
    prompt: list[int]
    params: SamplingParams
    label: str
    priority: int
    cache_salt: bytes
    client: str
    x_request_id: str


class ScriptedStream:
    """One choice: sends chunks of `generator.chunk_size` tokens, `generator.delay` seconds apart."""

    def __init__(
        self, generator: ScriptedGenerator, rid: int, prompt: list[int], tokens: list[int], params: SamplingParams
    ) -> None:
        self.rid = self.slot = rid
        self._prompt = prompt
        self.cancelled, self.why = False, None
        self.released = False
        self.accepted = 0  # tokens that were generated, as if a journal had them
        self.failure: Exception | None = None
        self._generator = generator
        self._params = params
        self._tokens = tokens[: params.max_tokens]
        self._finish = Finish.STOP if self._tokens and self._tokens[-1] == EOS_ID else Finish.LENGTH
        self._at = 0

    @property
    def done(self) -> bool:
        return self.cancelled or self.failure is not None or self.accepted >= len(self._tokens)

    @property
    def finish(self) -> Finish:
        if not self.done or self.failure is not None:
            return Finish.NONE
        if not self.cancelled:
            return self._generator.finish or self._finish
        return {None: Finish.STOP, EarlyEnd.DEADLINE: Finish.DEADLINE}.get(self.why, Finish.CANCELLED)

    async def next(self) -> TokenChunk:
        g, begin = self._generator, self._at
        if self.accepted == begin and not self.done:
            await asyncio.sleep(g.delay)
            if g.hang_after is not None and begin >= g.hang_after:
                await self._end()
            elif g.lose_after is not None and begin >= g.lose_after:
                self.failure = EngineLost("gone")
                g.running -= 1
            elif not self.cancelled:
                self.accepted = min(begin + g.chunk_size, len(self._tokens))
                if self.accepted == len(self._tokens):
                    g.running -= 1
        self._at = self.accepted
        tokens = self._tokens[begin : self._at]
        if self.failure is not None and not tokens:
            raise self.failure
        failed = self.finish in (Finish.CANCELLED, Finish.ERROR, Finish.DEADLINE)
        finish = Finish.NONE if tokens and failed else self.finish
        return TokenChunk(tokens, self._logprobs(tokens), finish, g.num_cached_tokens)

    async def _end(self) -> None:
        while not self.cancelled:
            await asyncio.sleep(0.01)

    def replay(self, position: int) -> TokenChunk:
        self._at = position
        tokens = self._tokens[:position]
        return TokenChunk(tokens, self._logprobs(tokens), Finish.NONE, self._generator.num_cached_tokens)

    def _logprobs(self, tokens: list[int]) -> list[TokenLogprobs | None] | None:
        k = self._params.logprobs
        if k < 0:
            return None
        return [TokenLogprobs(-0.5, list(range(10, 10 + k)), [-1.0 - i for i in range(k)]) for _ in tokens]

    def prompt(self) -> list[int]:
        return self._prompt

    def prompt_logprobs(self, start: int, stop: int) -> list[PromptLogprob]:
        """Token i has the logprob -i; its alternatives are tokens 10, 11, ..."""
        assert start >= 1 and (self.accepted or self.done)
        k = self._params.prompt_logprobs
        assert k >= 0
        return [
            PromptLogprob(-float(i), i + 1, list(range(10, 10 + k)), [-0.25 - n for n in range(k)])
            for i in range(start, stop)
        ]

    def cancel(self, why: EarlyEnd | None = None) -> None:
        if not self.done:
            self.cancelled, self.why = True, why
            self._generator.running -= 1

    def release(self) -> None:
        self.released = True


class _Admission:
    def __init__(self, generator: ScriptedGenerator, count: int) -> None:
        self._generator, self._count = generator, count

    def __enter__(self) -> _Admission:
        self._generator.places += self._count
        return self

    def submitted(self) -> None:
        self._generator.places -= 1
        self._count -= 1

    def __exit__(self, *exc: object) -> None:
        self._generator.places -= self._count


@dataclass
class ScriptedGenerator:
    """Implements Generator. `reply` returns the whole output for a prompt, with its end-of-sequence token.

    Streams never answer again after `hang_after` tokens, and raise EngineLost after `lose_after` tokens. `refusal` is
    raised by each submission, `no_room` before the first of several, and `finish` replaces the finish of every
    stream. `running` and `places` count choices against `limit`.
    """

    reply: Callable[[list[int], SamplingParams], list[int]]
    max_model_len: int = 256
    ready: bool = True
    chunk_size: int = 3
    delay: float = 0.0
    num_cached_tokens: int = 0
    finish: Finish | None = None
    hang_after: int | None = None
    lose_after: int | None = None
    refusal: Exception | None = None
    limit: int = 64
    retry_after: int = 3
    running: int = 0
    places: int = 0
    admitted: list[tuple[int, str, int]] = field(default_factory=list)
    no_room: Exception | None = None
    checked: list[tuple[list[tuple[int, int]], int]] = field(default_factory=list)
    submissions: list[Submission] = field(default_factory=list)
    streams: list[ScriptedStream] = field(default_factory=list)

    def admit(self, count: int, *, client: str = "", priority: int = 0) -> _Admission:
        if not self.ready:
            raise NoEngine("no engine is ready")
        if self.running + self.places + count > self.limit:
            raise Overloaded("full", self.retry_after)
        self.admitted.append((count, client, priority))
        return _Admission(self, count)

    def check_room(self, lengths: list[tuple[int, int]], params: SamplingParams, _: RequestAttributes) -> None:
        self.checked.append((lengths, params.logprobs))
        if self.no_room is not None:
            raise self.no_room

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        attributes: RequestAttributes,
    ) -> ScriptedStream:
        if self.refusal is not None:
            raise self.refusal
        if len(prompt) + params.max_tokens > self.max_model_len:
            raise TooLong("too long")
        self.submissions.append(Submission(list(prompt), params, *attributes))
        stream = ScriptedStream(self, len(self.streams), list(prompt), self.reply(prompt, params), params)
        self.streams.append(stream)
        self.running += not stream.done
        return stream


@dataclass
class ApiUnderTest:
    """An application, its collaborators and a client for it."""

    model: Model
    generator: ScriptedGenerator
    config: Config
    app: web.Application
    page: bytearray
    kept: KeptStreams
    client: TestClient | None = None

    def gauge(self, name: str) -> float:
        return snapshot(memoryview(self.page), FRONTEND).gauge(name)

    def counter(self, name: str, *values: str) -> float:
        return snapshot(memoryview(self.page), FRONTEND).counter(name, *values)


def make_model(directory: Path) -> Model:
    return model_of(make_tiny_llama(directory, weights=False, vocab=384))


def model_of(path: Path) -> Model:
    """Load what a frontend loads from a model directory."""
    return Model(read_model_config(path, "tiny"), Tokenizer(path), ChatTemplate(path))


def make_api(model: Model, *, keys: list[str] | None = None, **options: object) -> ApiUnderTest:
    """Build an application; `keys` are lines of a key file, `options` those of `Config`."""
    config = Config(**options)
    tokens = [*model.tokenizer.encode(ANSWER, False), EOS_ID]
    generator = ScriptedGenerator(reply=lambda prompt, params: tokens)
    page = bytearray(FRONTEND.nbytes)
    metrics = FrontendMetrics(
        MetricsPage(memoryview(page), FRONTEND),
        lambda: DaemonSnapshot(
            [snapshot(memoryview(page), FRONTEND)], [snapshot(memoryview(bytearray(ENGINE.nbytes)), ENGINE)], [None]
        ),
    )
    ring = KeyRing(filter(None, map(parse_key, keys))) if keys else None
    service = Service(
        config=config,
        generator=generator,
        tokenizer=model.tokenizer,
        chat_template=model.chat,
        model_config=model.model_config,
        metrics=metrics,
        origins=OriginPolicy(config, keys=ring is not None),
        guard=None,
    )
    service.kept = kept = KeptStreams(service)
    app = build_app(service, ring)
    return ApiUnderTest(model, generator, config, app, page, kept)


def with_client(api: ApiUnderTest, body: Callable[[TestClient], object]) -> None:
    """Serve the application and run the coroutine function `body` with a client for it."""

    async def run() -> None:
        server = TestServer(api.app)
        await server.start_server()
        async with TestClient(server) as client:
            api.client = client
            await body(client)

    asyncio.run(run())


def events(body: str) -> list[dict[str, Any]]:
    """Return the JSON events before [DONE]; every event must be one data line."""
    parts = body.split("\n\n")
    assert parts[-1] == "" and parts[-2] == "data: [DONE]"
    assert all(p.startswith("data: ") and "\n" not in p for p in parts[:-1])
    return [json.loads(p[6:]) for p in parts[:-2]]


async def stream(client: TestClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Send a streaming request and return its JSON events."""
    response = await client.post(path, json=body | {"stream": True})
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    return events(await response.text())


async def until(condition: Callable[[], bool]) -> None:
    """Wait up to 10 seconds until `condition` returns True."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("the condition did not become true")

"""One answer, of one or more choices: folded from pieces, and written out whole or chunk by chunk."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Any, NamedTuple

from daemon.api import sse
from daemon.api.choice import Choice
from daemon.api.errors import cancelled, lost
from daemon.api.generator import Piece
from daemon.api.logprobs import ChatLogprobs, LogprobsFormat, TextLogprobs
from daemon.api.params import wanted_logprobs
from daemon.api.request_metrics import REASONS, RequestMetrics
from daemon.api.schemas import ChatRequest, CompletionRequest
from daemon.api.service import Service
from daemon.ipc.messages import Finish, SamplingParams

Request = ChatRequest | CompletionRequest


class Prompt(NamedTuple):
    tokens: list[int]
    text: str | None  # what the client gave, if it gave text


class Answer:
    """The answer to one HTTP request. Choice k belongs to prompt ``k // n``.

    Times are seconds of CLOCK_MONOTONIC. A context: leaving it closes the account of every choice.
    """

    def __init__(self, service: Service, request: Request, prompts: list[Prompt], id: str, arrival: float) -> None:
        self._service = service
        self._request = request
        self._prompts = prompts
        self._n = request.n or 1
        self._arrival = arrival
        self.id = id
        self.chat = isinstance(request, ChatRequest)
        self.created = int(time.time())
        self.model = service.model_config.name
        self.choices: list[Choice] = []
        self._meters: list[RequestMetrics] = []
        self.unfinished = 0

    def add(self, params: SamplingParams) -> None:
        """The next choice, now that it was submitted."""
        request, service = self._request, self._service
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        eos = () if params.ignore_eos else service.model_config.eos_token_ids
        choice = Choice(
            service.output_detokenizer(request.skip_special_tokens is not False),
            stops=stops,
            min_tokens=params.min_tokens,
            ends=frozenset((*eos, *params.stop_token_ids)),
            logprobs=self._logprobs_format(),
        )
        prompt = self._prompts[len(self.choices) // self._n]
        self.choices.append(choice)
        self._meters.append(RequestMetrics(service.page, self._arrival, len(prompt.tokens), params.max_tokens))
        self.unfinished += 1

    def _logprobs_format(self) -> LogprobsFormat | None:
        top = wanted_logprobs(self._request)
        if top < 0:
            return None
        tokenizer = self._service.tokenizer
        return ChatLogprobs(tokenizer) if self.chat else TextLogprobs(tokenizer, top)

    def push(self, index: int, piece: Piece) -> str:
        """Fold a piece into its choice and return the text it brought. Raises ApiError if the choice failed."""
        choice, meter = self.choices[index], self._meters[index]
        before = choice.num_tokens
        text = choice.push(piece)
        if choice.num_tokens > before:
            meter.output(time.monotonic(), choice.num_tokens - before)
        if choice.finish:
            self.unfinished -= 1
            meter.end(time.monotonic(), choice.finish, choice.cached)
            if choice.finish is Finish.CANCELLED:
                raise cancelled()
            if choice.finish is Finish.ERROR:
                raise lost()
        return text

    def __enter__(self) -> Answer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What has not ended by now never will: it was given up (a hang-up, the deadline), or it failed."""
        gone = isinstance(error, asyncio.CancelledError | ConnectionError)
        for choice, meter in zip(self.choices, self._meters, strict=True):
            meter.end(time.monotonic(), Finish.CANCELLED if gone else Finish.ERROR, choice.cached)

    def echo(self, index: int) -> str:
        """What a choice's text begins with: its prompt, where the client asked for it."""
        if not (isinstance(self._request, CompletionRequest) and self._request.echo):
            return ""
        prompt = self._prompts[index // self._n]
        return self._service.tokenizer.decode(prompt.tokens) if prompt.text is None else prompt.text

    def usage(self) -> dict[str, Any]:
        """Tokens of the whole answer so far; each prompt counts once, however many choices it has."""
        prompt = sum(len(p.tokens) for p in self._prompts)
        output = sum(c.num_tokens for c in self.choices)
        cached = sum(c.cached for c in self.choices[:: self._n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def whole(self, texts: list[str]) -> dict[str, Any]:
        """The body of an answer that is not streamed; `texts` by choice."""
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self._choice(i, text) for i, text in enumerate(texts)]
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"choices": choices, "usage": self.usage()}

    def _choice(self, index: int, text: str) -> dict[str, Any]:
        choice = self.choices[index]
        logprobs = choice.logprobs.take() if choice.logprobs else None
        rest = {"logprobs": logprobs, "finish_reason": REASONS[choice.finish]}
        if self.chat:
            return {"index": index, "message": {"role": "assistant", "content": text, "refusal": None}} | rest
        return {"index": index, "text": self.echo(index) + text} | rest


class AnswerWriter:
    """Writes the pieces of an answer as chunks."""

    def __init__(self, answer: Answer, *, include_usage: bool, continuous: bool) -> None:
        """`include_usage`: totals at the end, and null before. `continuous`: in every chunk what there is so far."""
        self._answer = answer
        self._include_usage = include_usage
        self._continuous = continuous
        self._identity: dict[str, Any] = {
            "chat": answer.chat,
            "id": answer.id,
            "created": answer.created,
            "model": answer.model,
        }
        self._chunks = [
            sse.ChunkWriter(**self._identity, index=i, include_usage=include_usage)
            for i in range(len(answer.choices))
        ]
        self._begun = [False] * len(answer.choices)

    def write(self, index: int, text: str, out: list[bytes]) -> None:
        """Append the chunks of what `Answer.push` has just returned for this choice."""
        choice, chunks = self._answer.choices[index], self._chunks[index]
        if not self._begun[index]:
            self._begun[index] = True
            if self._answer.chat:
                out.append(chunks.role())
            elif echo := self._answer.echo(index):
                out.append(chunks.text(echo))
        logprobs = choice.logprobs.take() if choice.logprobs else None
        usage = self._answer.usage() if self._continuous else None
        if text or logprobs:
            out.append(chunks.text(text, logprobs, usage))
        if choice.finish:
            out.append(chunks.finish(REASONS[choice.finish], usage))

    def end(self, out: list[bytes]) -> None:
        """Append what follows the last choice."""
        if self._include_usage:
            out.append(sse.usage_chunk(sse.chunk_head(**self._identity), self._answer.usage()))
        out.append(sse.DONE)

"""One answer with one or more choices: built from token chunks, written as a whole or as events."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Any, NamedTuple

from daemon.api import sse
from daemon.api.choice import Choice
from daemon.api.errors import cancelled, lost
from daemon.api.generator import TokenChunk
from daemon.api.logprobs import ChatLogprobs, LogprobsFormat, TextLogprobs
from daemon.api.params import num_logprobs
from daemon.api.request_metrics import REASONS, RequestMetrics
from daemon.api.schemas import ChatRequest, CompletionRequest
from daemon.api.service import Service
from daemon.api.validation import stop_strings
from daemon.ipc.messages import Finish, SamplingParams

Request = ChatRequest | CompletionRequest


class Prompt(NamedTuple):
    tokens: list[int]
    text: str | None  # what `echo` repeats; None: the text of the tokens


class Answer:
    """The answer to one HTTP request. Choice k belongs to prompt ``k // n``.

    Times are seconds of CLOCK_MONOTONIC. A context: leaving it ends the metrics of every choice.
    """

    def __init__(
        self,
        service: Service,
        request: Request,
        prompts: list[Prompt],
        id: str,
        arrival: float,
        deadline: asyncio.Timeout,
    ) -> None:
        """`arrival`: of the request. `deadline`: if it expires, it ends the context with CancelledError."""
        self._service = service
        self._request = request
        self._prompts = prompts
        self._n = request.n or 1
        self._arrival = arrival
        self._deadline = deadline
        self.id = id
        self.chat = isinstance(request, ChatRequest)
        self.created = int(time.time())
        self.model = service.model_config.name
        self.choices: list[Choice] = []
        self._metrics: list[RequestMetrics] = []
        self.unfinished = 0
        # Running totals: the usage in every event must not cost more the more choices there are.
        self._prompt_tokens = sum(len(prompt.tokens) for prompt in prompts)
        self._output_tokens = 0
        self._cached_tokens = 0

    def add(self, params: SamplingParams) -> None:
        """Add the next choice. Call it after the submission of that choice."""
        request, service = self._request, self._service
        eos = () if params.ignore_eos else service.model_config.eos_token_ids
        skip_special = request.skip_special_tokens is not False
        choice = Choice(
            service.tokenizer.detokenizer(continuing=True, skip_special=skip_special),
            stops=stop_strings(request.stop),
            min_tokens=params.min_tokens,
            end_tokens=frozenset((*eos, *params.stop_token_ids)),
            logprobs=self._logprobs_format(),
        )
        prompt = self._prompts[len(self.choices) // self._n]
        self.choices.append(choice)
        self._metrics.append(RequestMetrics(service.page, self._arrival, len(prompt.tokens), params.max_tokens))
        self.unfinished += 1

    def _logprobs_format(self) -> LogprobsFormat | None:
        top = num_logprobs(self._request)
        if top < 0:
            return None
        tokenizer, ids = self._service.tokenizer, bool(self._request.return_tokens_as_token_ids)
        return ChatLogprobs(tokenizer, ids) if self.chat else TextLogprobs(tokenizer, top, ids)

    def push(self, index: int, chunk: TokenChunk) -> str:
        """Add a chunk to its choice and return its text. Raises ApiError if the choice failed."""
        choice, metrics = self.choices[index], self._metrics[index]
        before, cached_before = choice.num_tokens, choice.num_cached_tokens
        text = choice.push(chunk)
        if choice.num_tokens > before:
            self._output_tokens += choice.num_tokens - before
            metrics.output(time.monotonic(), choice.num_tokens - before)
        if index % self._n == 0:  # one choice of each prompt
            self._cached_tokens += choice.num_cached_tokens - cached_before
        if choice.finish:
            self.unfinished -= 1
            metrics.end(time.monotonic(), choice.finish, choice.num_cached_tokens)
            if choice.finish is Finish.CANCELLED:
                raise cancelled()
            if choice.finish is Finish.ERROR:
                raise lost("computing it failed; the server's log has the details", retry=False)
        return text

    def __enter__(self) -> Answer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Count each choice that has not ended: as cut by the deadline, cancelled after a hang-up, or failed."""
        finish = Finish.ERROR
        if isinstance(error, asyncio.CancelledError | ConnectionError):
            finish = Finish.DEADLINE if self._deadline.expired() else Finish.CANCELLED
        for choice, metrics in zip(self.choices, self._metrics, strict=True):
            metrics.end(time.monotonic(), finish, choice.num_cached_tokens)

    def echo(self, index: int) -> str:
        """Return the text that a choice's own text begins with if the request sets `echo`; otherwise ""."""
        if not self._request.echo:
            return ""
        prompt = self._prompts[index // self._n]
        return self._service.tokenizer.decode(prompt.tokens) if prompt.text is None else prompt.text

    def num_tokens(self) -> tuple[int, int]:
        """Return the numbers of prompt tokens and of output tokens so far."""
        return self._prompt_tokens, self._output_tokens

    def usage(self) -> dict[str, Any]:
        """Return the token counts of the whole answer so far; a prompt counts once, however many choices it has."""
        prompt, output = self.num_tokens()
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }

    def whole(self, texts: list[str]) -> dict[str, Any]:
        """Return the body of a response that is not streamed; `texts` by choice."""
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self._choice(i, text) for i, text in enumerate(texts)]
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"choices": choices, "usage": self.usage()}

    def _choice(self, index: int, text: str) -> dict[str, Any]:
        choice, text = self.choices[index], self.echo(index) + text
        logprobs = choice.logprobs.take() if choice.logprobs else None
        rest = {"logprobs": logprobs, "finish_reason": REASONS[choice.finish]}
        if self.chat:
            return {"index": index, "message": {"role": "assistant", "content": text, "refusal": None}} | rest
        return {"index": index, "text": text} | rest


class AnswerWriter:
    """Writes an answer as events, one choice chunk at a time."""

    def __init__(self, answer: Answer, *, include_usage: bool, continuous: bool) -> None:
        """`include_usage`: send totals at the end, and null before. `continuous`: send the usage in every event."""
        self._answer = answer
        self._include_usage = include_usage
        self._continuous = continuous
        self._identity: dict[str, Any] = {
            "chat": answer.chat,
            "id": answer.id,
            "created": answer.created,
            "model": answer.model,
        }
        self._writers = [
            sse.ChunkWriter(**self._identity, index=i, include_usage=include_usage)
            for i in range(len(answer.choices))
        ]
        self._begun = [False] * len(answer.choices)

    def begin(self, index: int, out: list[bytes]) -> None:
        """Append the events that come before the first output of this choice, if they are not sent yet.

        Call it before `Answer.push`: these events count none of the output that follows them.
        """
        if self._begun[index]:
            return
        self._begun[index] = True
        writer, usage = self._writers[index], self._usage()
        if self._answer.chat:
            out.append(writer.role(usage))
        if echo := self._answer.echo(index):
            out.append(writer.text(echo, None, usage))

    def write(self, index: int, text: str, out: list[bytes]) -> None:
        """Append the events for the text that `Answer.push` has just returned for this choice."""
        choice, writer = self._answer.choices[index], self._writers[index]
        logprobs = choice.logprobs.take() if choice.logprobs else None
        usage = self._usage()
        if text or logprobs:
            out.append(writer.text(text, logprobs, usage))
        if choice.finish:
            out.append(writer.finish(REASONS[choice.finish], usage))

    def end(self, out: list[bytes]) -> None:
        """Append the events after the end of the last choice."""
        if self._include_usage:
            out.append(sse.usage_chunk(sse.chunk_head(**self._identity), self._answer.usage()))
        out.append(sse.DONE)

    def _usage(self) -> dict[str, Any] | None:
        return self._answer.usage() if self._continuous else None

"""One answer with one or more choices, built from token chunks. A renderer writes it."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Any, NamedTuple

from daemon.api.errors import cancelled, dead_end, deadline_exceeded, lost
from daemon.api.generator import TokenChunk, TokenStream
from daemon.api.logprobs import ChatLogprobs, LogprobsFormat, TextLogprobs
from daemon.api.parse.formats import new_parser, shown_texts
from daemon.api.parse.parts import Part
from daemon.api.render.choice import Choice
from daemon.api.render.prompt_details import add_echo, prompt_details
from daemon.api.request_metrics import REASONS, RequestMetrics
from daemon.api.response_facts import AnswerForm, ChoicePosition, PromptFacts
from daemon.api.service import Service
from daemon.ipc.messages import Finish

_COMPLETE = (Finish.STOP, Finish.LENGTH)  # ends of a request whose prompt is computed


class Prompt(NamedTuple):
    tokens: list[int]
    echo: str  # the text that each of its answers begins with
    thinking: bool = False  # it ends with the marker that begins reasoning


class Answer:
    """The answer to one HTTP request. Choice k belongs to prompt ``k // n``.

    Times are seconds of CLOCK_MONOTONIC. A context: leaving it ends the metrics of every choice.
    """

    def __init__(
        self,
        service: Service,
        form: AnswerForm,
        prompts: list[PromptFacts],
        id: str,
        created: int,
        arrival: float,
        deadline: asyncio.Timeout,
        *,
        kept: bool = False,
    ) -> None:
        """`created`: seconds of the epoch. `deadline`: if it expires, it ends the context with CancelledError.

        `kept`: the answer goes on after this reader of it has hung up.
        """
        self._service = service
        self.form = form
        self.describes_prompt = form.describes_prompt
        self.prompts = prompts
        self.arrival = arrival
        self._deadline = deadline
        self._kept = kept
        self.id = id
        self.created = created
        self.model = service.model_config.name
        self.choices: list[Choice] = []
        self._streams: list[TokenStream] = []
        self._metrics: list[RequestMetrics] = []
        self.unfinished = 0
        # Running totals: the usage in every event must not cost more the more choices there are.
        self._prompt_tokens = sum(prompt.num_tokens for prompt in prompts)
        self._output_tokens = 0
        self._cached_tokens = 0

    def add(self, stream: TokenStream, max_tokens: int) -> None:
        """Add the next choice, of at most `max_tokens` tokens, which `stream` brings."""
        prompt = self.prompts[len(self.choices) // self.form.n]
        self._add(stream, RequestMetrics(self._service.page, self.arrival, prompt.num_tokens, max_tokens))

    async def resume(
        self, stream: TokenStream, state: ChoicePosition, metrics: RequestMetrics | None = None
    ) -> list[Part]:
        """Add the next choice, of which all output up to `state` is written already. Return its parts.

        `metrics`: those of the choice; None: a former process has counted this output.
        """
        index = len(self.choices)
        chunk = stream.replay(state.position)._replace(finish=state.finish)
        self._add(stream, metrics or RequestMetrics.resumed(self._service.page, self.arrival, len(chunk.tokens)))
        choice = self.choices[index]
        if self.describes_prompt and (stream.accepted or stream.finish in _COMPLETE):
            await self._describe_prompt(index)
        parts = choice.push(chunk)
        self._count(index, choice.num_tokens, choice.num_cached_tokens)
        if choice.finish:
            self._metrics[index].close()
            self.unfinished -= 1
        return parts

    def detach(self) -> list[RequestMetrics]:
        """Return the metrics of all choices and forget the choices: another answer goes on with them."""
        metrics, self._metrics, self.choices = self._metrics, [], []
        return metrics

    async def describe_prompt(self, index: int, chunk: TokenChunk) -> None:
        """Read what the answer has of its prompt, if it is not read yet, before `chunk` is pushed to choice `index`.

        The prompt is computed before there is output. Raises EngineLost if its logprobs are lost all the same.
        """
        if self.choices[index].prompt is None and (chunk.tokens or chunk.finish in _COMPLETE):
            await self._describe_prompt(index)

    async def _describe_prompt(self, index: int) -> None:
        form, choice, stream = self.form, self.choices[index], self._streams[index]
        tokenizer = self._service.tokenizer
        choice.prompt = await prompt_details(stream, tokenizer, ids=form.ids, logprobs=form.prompt_logprobs)
        if form.echo_logprobs and isinstance(choice.logprobs, TextLogprobs):
            await add_echo(stream, choice.logprobs, tokenizer, form.logprobs)

    def _add(self, stream: TokenStream, metrics: RequestMetrics) -> None:
        form, tokenizer, index = self.form, self._service.tokenizer, len(self.choices)
        prompt = self.prompts[index // form.n]
        choice = Choice(
            tokenizer.detokenizer(continuing=True, skip_special=form.skip_special, shown=shown_texts(form.parsing)),
            stops=list(form.stops),
            min_tokens=form.min_tokens,
            end_tokens=form.end_tokens,
            logprobs=self._logprobs_format(),
            parser=new_parser(form.parsing, answer=self.id, choice=index, thinking=prompt.thinking),
            show_stop=form.show_stop,
            ids=form.ids,
        )
        self._streams.append(stream)
        self.choices.append(choice)
        self._metrics.append(metrics)
        self.unfinished += 1

    def _logprobs_format(self) -> LogprobsFormat | None:
        top = self.form.logprobs
        if top < 0:
            return None
        tokenizer, ids = self._service.tokenizer, self.form.token_ids
        if self.form.api != "completion":
            return ChatLogprobs(tokenizer, ids)
        shown = tokenizer.detokenizer(continuing=True, skip_special=self.form.skip_special)
        return TextLogprobs(tokenizer, shown, top, ids)

    def _count(self, index: int, tokens: int, cached: int) -> None:
        """Add to the totals: output tokens, and prompt tokens of choice `index` from a prefix cache."""
        self._output_tokens += tokens
        if index % self.form.n == 0:  # one choice of each prompt
            self._cached_tokens += cached

    def push(self, index: int, chunk: TokenChunk) -> list[Part]:
        """Add a chunk to its choice and return its parts. Raises ApiError if the choice failed."""
        choice, metrics = self.choices[index], self._metrics[index]
        before, cached_before = choice.num_tokens, choice.num_cached_tokens
        parts = choice.push(chunk)
        if choice.num_tokens > metrics.tokens:  # an earlier reader of a kept stream may have had some of them
            metrics.output(time.monotonic(), choice.num_tokens - metrics.tokens)
        self._count(index, choice.num_tokens - before, choice.num_cached_tokens - cached_before)
        if choice.finish:
            self.unfinished -= 1
            metrics.end(time.monotonic(), choice.finish, choice.num_cached_tokens)
            if choice.finish is Finish.CANCELLED:
                raise cancelled()
            if choice.finish is Finish.DEADLINE:
                raise deadline_exceeded(self._service.config.request_deadline)
            if choice.finish is Finish.DEAD_END:
                raise dead_end(choice.num_tokens)
            if choice.finish is Finish.ERROR:
                raise lost("computing it failed; the server's log has the details", retry=False)
        return parts

    async def leave_deadline(self) -> None:
        """Let the deadline end the answer no more: it is only sent now, and the connection has a limit for that."""
        if self._deadline.expired():
            await asyncio.sleep(0)  # raises the cancellation that is on its way
        self._deadline.reschedule(None)

    def __enter__(self) -> Answer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Count each choice that has not ended: as cut by the deadline, cancelled after a hang-up, or failed."""
        finish = Finish.ERROR
        if isinstance(error, asyncio.CancelledError | ConnectionError):
            finish = Finish.DEADLINE if self._deadline.expired() else Finish.CANCELLED
            if self._kept and finish is Finish.CANCELLED:
                return
        for choice, metrics in zip(self.choices, self._metrics, strict=True):
            metrics.end(time.monotonic(), finish, choice.num_cached_tokens)

    def echo(self, index: int) -> str:
        """Return the text that comes before a choice's own text: that of its prompt if the request sets `echo`."""
        return self.prompts[index // self.form.n].echo

    def num_tokens(self) -> tuple[int, int]:
        """Return the numbers of prompt tokens and of output tokens so far."""
        return self._prompt_tokens, self._output_tokens

    def usage(self) -> dict[str, Any]:
        """Return the token counts of the whole answer so far; a prompt counts once, however many choices it has."""
        prompt, output = self.num_tokens()
        found: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }
        if self.form.parsing is not None and self.form.parsing.reasoning:
            found["completion_tokens_details"] = {"reasoning_tokens": self.num_reasoning_tokens}
        return found

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that came from a prefix cache."""
        return self._cached_tokens

    @property
    def num_reasoning_tokens(self) -> int:
        return sum(choice.num_reasoning_tokens for choice in self.choices)

    def reason(self, index: int) -> str:
        """Return OpenAI's word for how choice `index` has ended."""
        choice, parsing = self.choices[index], self.form.parsing
        if choice.finish is Finish.STOP and choice.num_calls and not (parsing and parsing.forced):
            return "tool_calls"
        return REASONS[choice.finish]

"""One choice of an answer: its parts, token counts and logprobs from its chunks. No clock, no I/O."""

from __future__ import annotations

from daemon.api.generator import TokenChunk
from daemon.api.logprobs import LogprobsFormat
from daemon.api.parse.parts import CallBegin, Part, PartParser, Text
from daemon.api.render.prompt_details import PromptDetails
from daemon.ipc.messages import Finish
from daemon.models.stop_strings import StopStrings
from daemon.models.tokenizer import Detokenizer


class Choice:
    """State of one choice. `finish` is NONE until its engine or a stop string ends it."""

    __slots__ = (
        "_detokenizer",
        "_end_tokens",
        "_min_tokens",
        "_parser",
        "_show_stop",
        "_stops",
        "finish",
        "ids",
        "logprobs",
        "num_cached_tokens",
        "num_calls",
        "num_reasoning_tokens",
        "num_tokens",
        "position",
        "prompt",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stops: list[str],
        min_tokens: int,
        end_tokens: frozenset[int],
        logprobs: LogprobsFormat | None,
        parser: PartParser | None = None,
        show_stop: bool = False,
        ids: bool = False,
    ) -> None:
        """`end_tokens`: tokens that end the output and are not part of its text. `min_tokens`: a stop string counts
        only if a later token completes it. `parser`: finds the parts of the text; None: all of it is plain text.
        `show_stop`: what ends the output is part of its text. `ids`: keep the ids of its tokens.
        """
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops) if stops else None
        self._min_tokens = min_tokens
        self._end_tokens = end_tokens
        self._parser = parser
        self._show_stop = show_stop
        self.logprobs = logprobs
        self.ids: list[int] | None = [] if ids else None
        self.prompt: PromptDetails | None = None  # None: they are not read yet
        self.finish = Finish.NONE
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.num_reasoning_tokens = 0  # with those of the marker that ends the reasoning
        self.num_calls = 0  # tool calls that have begun
        self.position = 0  # output tokens that were pushed; those after a stop string do not count as `num_tokens`

    @property
    def stop_string(self) -> str | None:
        """The stop string that has ended it."""
        return self._stops.matched if self._stops is not None else None

    def push(self, chunk: TokenChunk) -> list[Part]:
        """Add the chunk and return its parts, without an end that may still become a stop string or a character.

        After this `logprobs` and `ids`, if requested, hold an entry for each token of the chunk that counts.
        """
        self.num_cached_tokens = max(self.num_cached_tokens, chunk.num_cached_tokens)
        self.finish = chunk.finish
        self.position += len(chunk.tokens)
        if self._parser is None:
            count, text, stopped = self._read(chunk.tokens, chunk.finish, self.num_tokens)
            parts: list[Part] = [Text(text)] if text else []
        else:
            count, parts, stopped = self._parse(chunk, self._parser)
        if stopped:
            self.finish = Finish.STOP
        self.num_tokens += count
        if self.logprobs is not None:
            self.logprobs.add(chunk.tokens[:count], chunk.logprobs)
        if self.ids is not None:
            self.ids += chunk.tokens[:count]
        return parts

    def take_ids(self) -> list[int] | None:
        """Return the ids of the tokens since the last call; None if the answer has none."""
        ids, self.ids = self.ids, None if self.ids is None else []
        return ids

    def _parse(self, chunk: TokenChunk, parser: PartParser) -> tuple[int, list[Part], bool]:
        """Return the number of tokens that count, the parts, and True if a stop string ends them.

        While the model may think it goes token by token, to count those of its reasoning.
        """
        parts: list[Part] = []
        count, total, stopped = 0, len(chunk.tokens), False
        while not stopped:
            watching = parser.watching
            end = count + 1 if watching and count + 1 < total else total
            finish = chunk.finish if end == total else Finish.NONE
            read, text, stopped = self._read(chunk.tokens[count:end], finish, self.num_tokens + count)
            parts += parser.push(text)
            count += read
            if watching and parser.reasoned:
                self.num_reasoning_tokens = self.num_tokens + count
            if end == total:
                break
        if stopped or chunk.finish:
            parts += parser.finish()
        self.num_calls += sum(isinstance(part, CallBegin) for part in parts)
        return count, parts, stopped

    def _read(self, tokens: list[int], finish: Finish, before: int) -> tuple[int, str, bool]:
        """Return the number of tokens that count, their text, and True if a stop string ends it.

        `finish`: of the choice, if these are its last tokens. `before`: tokens that count before these. The search
        for a stop string goes token by token, so the result does not depend on the bounds of the chunks.
        """
        detokenizer, stops = self._detokenizer, self._stops
        # The token that ended the output has no text.
        ended = finish is Finish.STOP and tokens and tokens[-1] in self._end_tokens and not self._show_stop
        visible = tokens[:-1] if ended else tokens
        if stops is None:
            text = detokenizer.push(visible)
            return len(tokens), text + detokenizer.finish() if finish else text, False
        out: list[str] = []
        for i, token in enumerate(visible, 1):
            text = detokenizer.push([token])
            if before + i <= self._min_tokens:
                out.append(text)
                continue
            emit, stopped = stops.push(text)
            out.append(emit)
            if stopped:
                return i, "".join(out) + self._shown_stop(stops), True
        if finish:
            emit, stopped = stops.push(detokenizer.finish())
            out.append(emit)
            if stopped:
                return len(tokens), "".join(out) + self._shown_stop(stops), True
            out.append(stops.flush())
        return len(tokens), "".join(out), False

    def _shown_stop(self, stops: StopStrings) -> str:
        return (stops.matched or "") if self._show_stop else ""

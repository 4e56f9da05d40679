"""One choice of an answer: text, stop strings, token counts and logprobs from its chunks. No clock, no I/O."""

from __future__ import annotations

from daemon.api.generator import TokenChunk
from daemon.api.logprobs import LogprobsFormat
from daemon.ipc.messages import Finish
from daemon.models.stop_strings import StopStrings
from daemon.models.tokenizer import Detokenizer


class Choice:
    """State of one choice. `finish` is NONE until its engine or a stop string ends it."""

    __slots__ = (
        "_detokenizer",
        "_end_tokens",
        "_min_tokens",
        "_stops",
        "finish",
        "logprobs",
        "num_cached_tokens",
        "num_tokens",
        "position",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stops: list[str],
        min_tokens: int,
        end_tokens: frozenset[int],
        logprobs: LogprobsFormat | None,
    ) -> None:
        """`end_tokens`: tokens that end the output and are not part of its text. `min_tokens`: a stop string counts
        only if a later token completes it.
        """
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops) if stops else None
        self._min_tokens = min_tokens
        self._end_tokens = end_tokens
        self.logprobs = logprobs
        self.finish = Finish.NONE
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.position = 0  # output tokens that were pushed; those after a stop string do not count as `num_tokens`

    def push(self, chunk: TokenChunk) -> str:
        """Add the chunk and return its text, without an end that may still become a stop string or a character.

        After this `logprobs`, if requested, holds an entry for each token of the chunk that counts.
        """
        self.num_cached_tokens = max(self.num_cached_tokens, chunk.num_cached_tokens)
        self.finish = chunk.finish
        self.position += len(chunk.tokens)
        if self._stops is None:
            count, text = len(chunk.tokens), self._text(chunk)
        else:
            count, text = self._text_until_stop(chunk, self._stops)
        self.num_tokens += count
        if self.logprobs is not None:
            self.logprobs.add(chunk.tokens[:count], chunk.logprobs)
        return text

    def _text(self, chunk: TokenChunk) -> str:
        text = self._detokenizer.push(self._visible(chunk))
        return text + self._detokenizer.finish() if chunk.finish else text

    def _visible(self, chunk: TokenChunk) -> list[int]:
        """Return the tokens of the chunk without the token that ended the output."""
        tokens = chunk.tokens
        ended = chunk.finish is Finish.STOP and tokens and tokens[-1] in self._end_tokens
        return tokens[:-1] if ended else tokens

    def _text_until_stop(self, chunk: TokenChunk, stops: StopStrings) -> tuple[int, str]:
        """Return the number of tokens and the text up to a stop string.

        The search goes token by token, so the result does not depend on the bounds of the chunks.
        """
        out: list[str] = []
        for i, token in enumerate(self._visible(chunk), 1):
            text = self._detokenizer.push([token])
            if self.num_tokens + i <= self._min_tokens:
                out.append(text)
                continue
            emit, stopped = stops.push(text)
            out.append(emit)
            if stopped:
                self.finish = Finish.STOP
                return i, "".join(out)
        if chunk.finish:
            emit, stopped = stops.push(self._detokenizer.finish())
            out.append(emit)
            if stopped:
                self.finish = Finish.STOP
            else:
                out.append(stops.flush())
        return len(chunk.tokens), "".join(out)

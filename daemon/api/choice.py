"""One choice of an answer, folded from its pieces: text, stop strings, counts, logprobs. No clock, no I/O."""

from __future__ import annotations

from daemon.api.generator import Piece
from daemon.api.logprobs import LogprobsFormat
from daemon.ipc.messages import Finish
from daemon.models.stop_strings import StopStrings
from daemon.models.tokenizer import Detokenizer


class Choice:
    """What has come of one choice so far. `finish` is NONE until it ended, by its engine or a stop string."""

    __slots__ = ("_detokenizer", "_ends", "_min_tokens", "_stops", "cached", "finish", "logprobs", "num_tokens")

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stops: list[str],
        min_tokens: int,
        ends: frozenset[int],
        logprobs: LogprobsFormat | None,
    ) -> None:
        """`ends`: tokens that end an answer and are no part of its text. `min_tokens`: a stop string counts
        only if it is completed after that many."""
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops) if stops else None
        self._min_tokens = min_tokens
        self._ends = ends
        self.logprobs = logprobs
        self.finish = Finish.NONE
        self.num_tokens = 0
        self.cached = 0

    def push(self, piece: Piece) -> str:
        """Fold the piece; the text it brought, short of what may still become a stop string or a character.

        After this `logprobs`, if wanted, holds an entry for each token of the piece that counts.
        """
        self.cached = max(self.cached, piece.cached)
        self.finish = piece.finish
        if self._stops is None:
            count, text = len(piece.tokens), self._plain(piece)
        else:
            count, text = self._until_stop(piece, self._stops)
        self.num_tokens += count
        if self.logprobs is not None:
            self.logprobs.add(piece.tokens[:count], piece.logprobs)
        return text

    def _plain(self, piece: Piece) -> str:
        text = self._detokenizer.push(self._visible(piece))
        return text + self._detokenizer.finish() if piece.finish else text

    def _visible(self, piece: Piece) -> list[int]:
        """Without the token that ended the answer."""
        tokens = piece.tokens
        return tokens[:-1] if piece.finish is Finish.STOP and tokens and tokens[-1] in self._ends else tokens

    def _until_stop(self, piece: Piece, stops: StopStrings) -> tuple[int, str]:
        """Tokens and text up to a stop string. Token by token, so that it does not matter how they were
        cut into pieces."""
        out: list[str] = []
        for i, token in enumerate(self._visible(piece), 1):
            text = self._detokenizer.push([token])
            if self.num_tokens + i <= self._min_tokens:
                out.append(text)
                continue
            emit, stopped = stops.push(text)
            out.append(emit)
            if stopped:
                self.finish = Finish.STOP
                return i, "".join(out)
        if piece.finish:
            emit, stopped = stops.push(self._detokenizer.finish())
            out.append(emit)
            if stopped:
                self.finish = Finish.STOP
            else:
                out.append(stops.flush())
        return len(piece.tokens), "".join(out)

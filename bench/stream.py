"""Reader of streamed completions: server-sent events in, an `Outcome` with arrival times out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec


class EventSplitter:
    """Splits a byte stream into the data of its server-sent events, at any chunk boundaries."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, part: bytes) -> list[bytes]:
        """Return the data of the events that `part` completes. Comments and other fields are dropped."""
        *lines, self._rest = (self._rest + part).split(b"\n")
        events = []
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events


class Delta(msgspec.Struct):
    """A chat chunk's new text; servers use different names for a model's reasoning."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChunkChoice(msgspec.Struct):
    delta: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chunk(msgspec.Struct):
    id: str = ""
    choices: list[ChunkChoice] = []
    usage: Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(Chunk).decode


@dataclass(slots=True)
class Outcome:
    """One request as its client saw it. Times are perf_counter seconds."""

    index: int
    id: str = ""  # given by the server
    sent: float = 0.0
    lag: float = 0.0  # seconds from its scheduled arrival to its sending
    arrivals: list[float] = field(default_factory=list)  # of chunks with text
    reported: list[int] = field(default_factory=list)  # completion tokens so far, reported with each arrival
    ended: float = 0.0
    usage: Usage | None = None
    finish: str = ""
    text: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)  # token strings, only with logprobs
    error: str = ""  # kind of failure; empty: none

    @property
    def ok(self) -> bool:
        """True if the request has not failed."""
        return not self.error

    @property
    def output_tokens(self) -> int:
        """Number of output tokens from `usage`; without it the number of chunks."""
        return self.usage.completion_tokens if self.usage else len(self.arrivals)

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first text."""
        return self.arrivals[0] - self.sent

    @property
    def e2e(self) -> float:
        """Seconds from sending to the end of the stream."""
        return self.ended - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first chunk; None if all tokens arrived at once."""
        after_first = self.output_tokens - max(1, self._chunk_tokens()[0])
        return (self.arrivals[-1] - self.arrivals[0]) / after_first if after_first >= 1 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between chunks with text."""
        return [b - a for a, b in pairwise(self.arrivals)]

    @property
    def gap_tokens(self) -> list[float]:
        """Tokens in the chunk that ended each gap: as reported, or otherwise the request's mean."""
        return self._chunk_tokens()[1:]

    def _chunk_tokens(self) -> list[float]:
        if len(self.reported) == len(self.arrivals):
            return [float(b - a) for a, b in pairwise([0, *self.reported])]
        return [self.output_tokens / len(self.arrivals)] * len(self.arrivals)

    def digest(self) -> str:
        """Return the SHA-256 of the token strings if there are logprobs, or otherwise of the text."""
        parts = self.tokens or ["".join(self.text)]
        return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


class StreamReader:
    """Writes a streamed answer into its outcome."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self._events = EventSplitter()
        self._done = False

    def feed(self, now: float, part: bytes) -> None:
        """Process body bytes that arrived at `now`."""
        for event in self._events.feed(part):
            if event == b"[DONE]":
                self._done = True
            elif not self.outcome.error:
                self._process(now, event)

    def _process(self, now: float, event: bytes) -> None:
        out = self.outcome
        try:
            chunk = _decode_chunk(event)
        except msgspec.DecodeError:
            out.error = "unreadable event"
            return
        if chunk.error:
            out.error = "error event"
            return
        out.id = chunk.id
        if chunk.usage is not None:
            out.usage = chunk.usage
        text = "".join(self._text_of(choice) for choice in chunk.choices)
        if text:
            out.arrivals.append(now)
            out.text.append(text)
            if chunk.usage is not None:
                out.reported.append(chunk.usage.completion_tokens)

    def _text_of(self, choice: ChunkChoice) -> str:
        out, delta = self.outcome, choice.delta
        if choice.finish_reason:
            out.finish = choice.finish_reason
        if choice.logprobs:
            out.tokens += choice.logprobs.get("tokens") or [t["token"] for t in choice.logprobs.get("content") or ()]
        if delta is None:
            return choice.text or ""
        return delta.content or delta.reasoning or delta.reasoning_content or ""

    def end(self, now: float, status: int) -> None:
        """Record the end of the body. The request has failed if anything is missing from it."""
        out = self.outcome
        out.ended = now
        if status != 200:
            out.error = f"HTTP {status}"
        elif out.error:
            return
        elif not self._done:
            out.error = "no [DONE]"
        elif not out.finish:
            out.error = "no finish_reason"
        elif not out.arrivals:
            out.error = "no text"

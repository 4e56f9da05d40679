"""What a streamed completion says, and when: server-sent events in, an `Outcome` out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec


class EventSplitter:
    """Cuts a byte stream into the data of its server-sent events, however the bytes are cut."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """Data of the events that `piece` completes. Comments and other fields are dropped."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
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
    """A chat chunk's addition; servers differ in what they call a model's thoughts."""

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
    id: str = ""  # the server's name for it
    sent: float = 0.0
    lag: float = 0.0  # seconds it was sent after its scheduled arrival
    arrivals: list[float] = field(default_factory=list)  # of chunks with text, none before it may be read
    reported: list[int] = field(default_factory=list)  # completion tokens so far, as told with each of them
    ended: float = 0.0
    usage: Usage | None = None
    finish: str = ""
    text: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)  # token strings, where logprobs were asked for
    error: str = ""  # kind of failure; empty: none

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def output_tokens(self) -> int:
        """From `usage`; without it, chunks are counted."""
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
        """Seconds per output token after the first chunk; None where all came at once."""
        after_first = self.output_tokens - max(1, self._chunk_tokens()[0])
        return (self.arrivals[-1] - self.arrivals[0]) / after_first if after_first >= 1 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between chunks with text."""
        return [b - a for a, b in pairwise(self.arrivals)]

    @property
    def gap_tokens(self) -> list[float]:
        """Tokens in the chunk that ended each gap: as reported, else the request's mean."""
        return self._chunk_tokens()[1:]

    def _chunk_tokens(self) -> list[float]:
        if len(self.reported) == len(self.arrivals):
            return [float(b - a) for a, b in pairwise([0, *self.reported])]
        return [self.output_tokens / len(self.arrivals)] * len(self.arrivals)

    def digest(self) -> str:
        """SHA-256 of the token strings where logprobs brought them, else of the text."""
        parts = self.tokens or ["".join(self.text)]
        return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


class StreamReader:
    """Folds a streamed answer into its outcome."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self._events = EventSplitter()
        self._done = False

    def feed(self, now: float, piece: bytes) -> None:
        """Take body bytes that arrived at `now`."""
        for event in self._events.feed(piece):
            if event == b"[DONE]":
                self._done = True
            elif not self.outcome.error:
                self._take(now, event)

    def _take(self, now: float, event: bytes) -> None:
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
        """The body is complete. Whatever is missing from it makes the request a failed one."""
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

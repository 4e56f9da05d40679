"""The requests of a run, as a function of its seed. Pure.

A run has a few *templates*. Each is sent once without faults; that answer, its *twin*, is what every later answer to
the same template must equal. So templates set a seed and a fixed length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
STOPS = ("ab", "er", "xyz", "the q", "\n\n")
WORDS = ("river", "stone", "the", "lamp", "over", "a", "quiet", "seven", "north", "paper", "and", "glass", "runs")
TOKEN_IDS = (100, 40_000)  # range of random prompts: the demo model's words, without special tokens
HEADERS = ("", "Connection: close\r\n")


@dataclass(frozen=True)
class Template:
    """A request: its path and its body."""

    number: int
    path: str
    body: dict[str, Any]

    @property
    def stream(self) -> bool:
        return bool(self.body["stream"])

    @property
    def num_tokens(self) -> int:
        """The number of output tokens of all choices, at most."""
        return int(self.body["max_tokens"]) * int(self.body.get("n", 1))


def templates(seed: int, count: int, *, longest: int, text: bool = False) -> list[Template]:
    """Return `count` requests of up to `longest` output tokens. `text`: prompts are words, otherwise token ids."""
    rng = Random(f"templates {seed}")
    return [_template(rng, number, longest, text) for number in range(count)]


def _template(rng: Random, number: int, longest: int, text: bool) -> Template:
    stream = rng.random() < 0.75
    body: dict[str, Any] = {
        "max_tokens": rng.randint(max(1, longest // 8), longest),
        "seed": rng.getrandbits(32),
        "ignore_eos": True,
        "stream": stream,
        "temperature": rng.choice((0, 1)),
    }
    chat = rng.random() < 0.4
    if rng.random() < 0.3:
        body["n"] = rng.randint(2, 4)
        body["max_tokens"] = max(1, body["max_tokens"] // body["n"])
    if rng.random() < 0.3:
        body["stop"] = rng.sample(STOPS, 2)
        body["min_tokens"] = rng.randint(0, body["max_tokens"] // 2)
    if rng.random() < 0.4:
        top = rng.choice((0, 2))
        body |= {"logprobs": True, "top_logprobs": top} if chat else {"logprobs": top}
    if stream and rng.random() < 0.6:
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": rng.random() < 0.3}
    if chat:
        words = rng.choices(WORDS, k=rng.randint(2, 40))
        return Template(number, CHAT, body | {"messages": [{"role": "user", "content": " ".join(words)}]})
    if rng.random() < 0.2:
        body["echo"] = True
    length = rng.randint(2, 120)
    body["prompt"] = " ".join(rng.choices(WORDS, k=length)) if text else rng.choices(range(*TOKEN_IDS), k=length)
    if body.get("echo"):
        body.pop("logprobs", None)
    return Template(number, TEXT, body)


def lane_script(seed: int, lane: int, count: int) -> Iterator[int]:
    """Yield the numbers of the templates that one client sends, one after the other, for ever."""
    rng = Random(f"lane {seed} {lane}")
    while True:
        yield rng.randrange(count)

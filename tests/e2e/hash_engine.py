"""Requests to the hash engine, and the one answer to each that proves its KV whole."""

from __future__ import annotations

from functools import cache
from typing import Any

from daemon.api.seeds import choice_seed
from daemon.engine.fake.hash import expected_stream
from daemon.models import store
from daemon.models.model_config import read_model_config
from daemon.models.tokenizer import Tokenizer
from tests.e2e.load_client import Outcome

ENDLESS = 4000  # tokens of output: nobody waits for the end of such an answer


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(store.resolve("demo", "dummy", print))


@cache
def vocab_size() -> int:
    return read_model_config(store.resolve("demo", "dummy", print), "", "dummy").vocab_size


def prompt_of(i: int, length: int, shared: int = 0) -> list[int]:
    """`length` token ids, the first `shared` of them the same for all `i`."""
    own = [(7919 * (i + 1) + 104729 * j) % 40000 + 100 for j in range(length - shared)]
    return [(31 * j) % 40000 + 100 for j in range(shared)] + own


def request(i: int, *, length: int = 40, output: int = 60, shared: int = 0, stream: bool = True) -> dict[str, Any]:
    """The body of request `i`."""
    prompt = prompt_of(i, length, shared)
    return {"prompt": prompt, "max_tokens": output, "seed": i, "logprobs": 0, "stream": stream}


def expected(body: dict[str, Any]) -> list[str]:
    """The texts of the tokens that a sound engine answers with."""
    stream = expected_stream(body["prompt"], choice_seed(body["seed"], 0), body["max_tokens"], vocab_size())
    return [tokenizer().token_text(token) for token in stream]


def tokens_of(outcome: Outcome) -> list[str]:
    """The token texts of an answer, streamed or not."""
    return outcome.tokens or (outcome.body["choices"][0]["logprobs"]["tokens"] if "choices" in outcome.body else [])


def exact(body: dict[str, Any], outcome: Outcome) -> bool:
    """Whether the answer is whole and right to the last token."""
    return outcome.whole and tokens_of(outcome) == expected(body)


def exact_so_far(body: dict[str, Any], outcome: Outcome) -> bool:
    """Whether what came of a broken-off answer was right."""
    return outcome.tokens == expected(body)[: len(outcome.tokens)]

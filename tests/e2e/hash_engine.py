"""Requests to the hash engine and their only correct answers, which prove that the KV is intact."""

from __future__ import annotations

from functools import cache
from typing import Any

from daemon.api.params import choice_seed
from daemon.engine.fake.hash import expected_prompt_logprobs, expected_stream
from daemon.models import store
from daemon.models.model_config import read_model_config
from daemon.models.tokenizer import Tokenizer
from tests.e2e.load_client import Outcome

ENDLESS = 4000  # tokens of output: such a request outlasts every test


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(store.resolve("demo", "dummy", print))


@cache
def vocab_size() -> int:
    return read_model_config(store.resolve("demo", "dummy", print), "").vocab_size


def prompt_of(i: int, length: int, shared: int = 0) -> list[int]:
    """Return `length` token ids; the first `shared` of them are the same for all `i`."""
    own = [(7919 * (i + 1) + 104729 * j) % 40000 + 100 for j in range(length - shared)]
    return [(31 * j) % 40000 + 100 for j in range(shared)] + own


def request(
    i: int, *, length: int = 40, output: int = 60, shared: int = 0, stream: bool = True, echo: bool = False
) -> dict[str, Any]:
    """Return the body of request `i`. `echo`: its prompt is scored."""
    prompt = prompt_of(i, length, shared)
    body = {"prompt": prompt, "max_tokens": output, "seed": i, "logprobs": 0, "stream": stream}
    return body | {"echo": True} if echo else body


def expected(body: dict[str, Any]) -> list[str]:
    """Return the texts of the tokens of the only correct answer."""
    stream = expected_stream(body["prompt"], choice_seed(body["seed"], 0), body["max_tokens"], vocab_size())
    echoed = body["prompt"] if body.get("echo") else []
    return [tokenizer().token_text(token) for token in (*echoed, *stream)]


def expected_logprobs(body: dict[str, Any]) -> list[float | None]:
    """Return the logprobs of the same tokens."""
    scored = [None, *expected_prompt_logprobs(body["prompt"])] if body.get("echo") else []
    return [*scored, *[0.0] * body["max_tokens"]]


def tokens_of(outcome: Outcome) -> list[str]:
    """Return the token texts of an answer, streamed or not."""
    return outcome.tokens or (outcome.body["choices"][0]["logprobs"]["tokens"] if "choices" in outcome.body else [])


def logprobs_of(outcome: Outcome) -> list[float | None]:
    """Return the logprobs of the tokens of an answer, streamed or not."""
    if outcome.tokens:
        return [logprob for logprob, _ in outcome.logprobs]
    return outcome.body["choices"][0]["logprobs"]["token_logprobs"] if "choices" in outcome.body else []


def exact(body: dict[str, Any], outcome: Outcome) -> bool:
    """Return True if the answer is complete and every token is correct, and every logprob."""
    right = outcome.ok and tokens_of(outcome) == expected(body)
    return right and logprobs_of(outcome) == expected_logprobs(body)


def exact_so_far(body: dict[str, Any], outcome: Outcome) -> bool:
    """Return True if every token received so far is correct."""
    return outcome.tokens == expected(body)[: len(outcome.tokens)]

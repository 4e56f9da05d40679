"""The sampling parameters of a checked request's choices. Pure: the seed is an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from msgspec.structs import replace

from daemon.api.schemas import ChatRequest, CompletionRequest, SamplingRequest
from daemon.ipc.messages import SamplingParams
from daemon.splitmix import GOLDEN_GAMMA, MASK64, mix64

T = TypeVar("T")

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for text completions


def requested_max_tokens(request: SamplingRequest) -> int | None:
    """Return the maximum of output tokens that the request sets; None if it sets none."""
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        return request.max_completion_tokens
    return request.max_tokens


def default_max_tokens(request: SamplingRequest, limit: int) -> int:
    """Return the maximum of output tokens for a request that sets none; `limit` is the server's.

    `min_tokens` is what the client asks for, so it goes over both defaults.
    """
    default = min(limit, COMPLETION_MAX_TOKENS) if isinstance(request, CompletionRequest) else limit
    return max(default, request.min_tokens or 0)


def num_logprobs(request: SamplingRequest) -> int:
    """Return `SamplingParams.logprobs`: -1 for none, otherwise the number of alternatives to the sampled token."""
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else -1
    if isinstance(request, CompletionRequest) and request.logprobs is not None:
        return request.logprobs
    return -1


def num_prompt_logprobs(request: SamplingRequest) -> int:
    """Return `SamplingParams.prompt_logprobs`: the most that `prompt_logprobs` and `echo` with `logprobs` ask for."""
    asked = -1 if request.prompt_logprobs is None else request.prompt_logprobs
    echoes = isinstance(request, CompletionRequest) and request.echo
    return max(asked, num_logprobs(request)) if echoes else asked


def bad_word_tokens(words: list[str] | None, encode: Callable[[str], list[int]]) -> tuple[tuple[int, ...], ...]:
    """Return the sequences of tokens that spell the words, at the beginning of a text and after a space."""
    spelled = [tuple(encode(space + word.lstrip())) for word in words or () for space in ("", " ")]
    return tuple(dict.fromkeys(tokens for tokens in spelled if tokens))


def truncated(tokens: list[int], request: SamplingRequest, max_model_len: int) -> list[int]:
    """Return what `truncate_prompt_tokens` leaves of a prompt; -1 leaves as much as fits, with the output."""
    most = request.truncate_prompt_tokens
    if most is None:
        return tokens
    if most < 0:
        output = requested_max_tokens(request)
        most = max(0, max_model_len - (1 if output is None else output))
    return tokens[:most] if request.truncation_side == "right" else tokens[max(0, len(tokens) - most) :]


def sampling_params(
    request: SamplingRequest, max_tokens: int, seed: int, choice: int, bad_words: tuple[tuple[int, ...], ...] = ()
) -> SamplingParams:
    """Return the parameters of one choice of `n`. Equal seed and choice give equal output, whatever `n` is.

    `bad_words`: those of the request, in tokens.
    """
    return SamplingParams(
        max_tokens=max_tokens,
        seed=choice_seed(seed, choice),
        temperature=_or_default(request.temperature, 1.0),
        top_k=max(_or_default(request.top_k, 0), 0),
        top_p=_or_default(request.top_p, 1.0),
        min_p=_or_default(request.min_p, 0.0),
        min_tokens=_or_default(request.min_tokens, 0),
        ignore_eos=bool(request.ignore_eos),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        presence_penalty=_or_default(request.presence_penalty, 0.0),
        frequency_penalty=_or_default(request.frequency_penalty, 0.0),
        repetition_penalty=_or_default(request.repetition_penalty, 1.0),
        logit_bias=tuple((int(token), bias) for token, bias in (request.logit_bias or {}).items()),
        logprobs=num_logprobs(request),
        prompt_logprobs=num_prompt_logprobs(request),
        allowed_token_ids=tuple(request.allowed_token_ids or ()),
        bad_words=bad_words,
    )


def constrained(params: SamplingParams, grammar: str, end_tokens: tuple[int, ...]) -> SamplingParams:
    """Return `params` for an output that matches `grammar` and ends with one of `end_tokens`. "": no grammar."""
    if not grammar:
        return params
    # For the engines without a model, too, which have no end tokens of their own.
    return replace(params, grammar=grammar, stop_token_ids=(*params.stop_token_ids, *end_tokens))


def prefix_salt(tenant: str, salt: str | None) -> bytes:
    """Return the salt of a request's prefix blocks, from its tenant (ASCII; "": none) and its own `cache_salt`.

    Different pairs give different salts, because UTF-8 never contains the byte 0xff. Without a tenant it is the
    request's own.
    """
    own = (salt or "").encode()
    return b"\xff" + tenant.encode() + b"\xff" + own if tenant else own


def choice_seed(seed: int, choice: int) -> int:
    """Return H(seed, choice): the sampling seed of choice `choice` (0, 1, ...) of a request, in [0, 2^64).

    `seed` is any integer, taken modulo 2^64. For one seed all choices differ. Choice 0 is mixed like the others,
    so the small and sequential seeds of users do not collide with the seeds of other requests' choices.
    """
    return mix64(mix64(seed & MASK64) + GOLDEN_GAMMA * (choice + 1))


def _or_default(value: T | None, default: T) -> T:
    return default if value is None else value

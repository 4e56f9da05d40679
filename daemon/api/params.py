"""From a checked request to the parameters of its choices. Pure: the seed is given."""

from __future__ import annotations

from typing import TypeVar

from daemon.api.schemas import ChatRequest, CompletionRequest, SamplingRequest
from daemon.api.seeds import choice_seed
from daemon.ipc.messages import SamplingParams

T = TypeVar("T")

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for text completions


def asked_max_tokens(request: SamplingRequest) -> int:
    """Output tokens the client asked for; 0 if it left that to the server."""
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        return request.max_completion_tokens
    return request.max_tokens or 0


def default_max_tokens(request: SamplingRequest, limit: int) -> int:
    """Output tokens where the client names none; `limit` is the server's."""
    return min(limit, COMPLETION_MAX_TOKENS) if isinstance(request, CompletionRequest) else limit


def wanted_logprobs(request: SamplingRequest) -> int:
    """SamplingParams.logprobs: -1 for none, else how many alternatives beside the chosen token's."""
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else -1
    if isinstance(request, CompletionRequest) and request.logprobs is not None:
        return request.logprobs
    return -1


def sampling_params(request: SamplingRequest, max_tokens: int, seed: int, choice: int) -> SamplingParams:
    """Parameters of one choice of `n`. The same seed and choice give the same answer, whatever `n` is."""
    return SamplingParams(
        max_tokens=max_tokens,
        seed=choice_seed(seed, choice),
        temperature=_given(request.temperature, 1.0),
        top_k=max(_given(request.top_k, 0), 0),
        top_p=_given(request.top_p, 1.0),
        min_p=_given(request.min_p, 0.0),
        min_tokens=min(_given(request.min_tokens, 0), max_tokens),
        ignore_eos=bool(request.ignore_eos),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        presence_penalty=_given(request.presence_penalty, 0.0),
        frequency_penalty=_given(request.frequency_penalty, 0.0),
        repetition_penalty=_given(request.repetition_penalty, 1.0),
        logit_bias=tuple((int(token), bias) for token, bias in (request.logit_bias or {}).items()),
        logprobs=wanted_logprobs(request),
    )


def _given(value: T | None, default: T) -> T:
    return default if value is None else value

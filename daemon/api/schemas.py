"""Request bodies: the fields of each route, their types and their fixed bounds.

msgspec checks types and bounds when it decodes a body. Relations between fields, and bounds that depend on the
configuration or the model, are in `validation`. Unknown fields are ignored, so new clients continue to work. A field
of type Any is here only to be refused by `validation`, if its value would change the answer.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from daemon.control.policy.priority import HIGHEST, LOWEST

MAX_MESSAGES = 8192
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_CACHE_SALT = 256
MIN_REPETITION_PENALTY = 1e-6
"""Logits are divided by the penalty in float32. A quotient by this or more is finite; 1e-46 is 0 in float32."""
_MAX_COUNT = (1 << 31) - 1  # of tokens

_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Bias = Annotated[float, Meta(ge=-100, le=100)]
_NumTokens = Annotated[int, Meta(ge=1, le=_MAX_COUNT)]
_NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
_StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingRequest(Struct, kw_only=True):
    """Fields that chat and text completions share."""

    model: str | None = None
    # -- sampling
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_MAX_COUNT)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=MIN_REPETITION_PENALTY, le=100)] | None = None
    logit_bias: Annotated[dict[str, _Bias], Meta(max_length=MAX_LOGIT_BIAS)] | None = None
    # -- length
    max_tokens: _NumTokens | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=_MAX_COUNT)] | None = None
    ignore_eos: bool | None = None
    stop: _StopString | Annotated[list[_StopString], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    # -- output
    n: Annotated[int, Meta(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    # -- scheduling
    priority: Annotated[int, Meta(ge=LOWEST, le=HIGHEST)] | str | None = None
    cache_salt: Annotated[str, Meta(max_length=MAX_CACHE_SALT)] | None = None
    # -- refused unless neutral
    best_of: Any = None
    use_beam_search: Any = None
    prompt_logprobs: Any = None
    prompt_embeds: Any = None
    truncate_prompt_tokens: Any = None
    include_stop_str_in_output: Any = None
    return_token_ids: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    logits_processors: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None


class ContentPart(Struct):
    type: str
    text: str | None = None


class Message(Struct):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


Messages = Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]


class ChatRequest(SamplingRequest, kw_only=True):
    """Body of ``POST /v1/chat/completions``."""

    messages: Messages
    max_completion_tokens: _NumTokens | None = None
    logprobs: bool | None = None
    top_logprobs: _NumLogprobs | None = None
    add_generation_prompt: bool | None = None
    # -- refused unless neutral
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None
    continue_final_message: Any = None
    documents: Any = None


# A list holds strings, or token ids, or lists of token ids; `validation.split_prompts` refuses mixtures.
Prompt = str | list[str | int | list[int]]


class CompletionRequest(SamplingRequest, kw_only=True):
    """Body of ``POST /v1/completions``."""

    prompt: Prompt
    logprobs: _NumLogprobs | None = None
    echo: bool | None = None
    # -- refused unless neutral
    suffix: Any = None


class TokenizeRequest(Struct, kw_only=True):
    """Body of ``POST /tokenize``: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, kw_only=True):
    """Body of ``POST /detokenize``."""

    tokens: list[int]
    model: str | None = None

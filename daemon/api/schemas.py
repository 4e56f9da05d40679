"""Bodies of requests, as clients may send them: types alone. `limits` says which values are acceptable.

Fields that are not listed are ignored, so that new clients keep working. Fields of type Any are here
only to be refused by `limits` where they ask for something that would change the answer.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingRequest(Struct, kw_only=True):
    """What chat and text completions have in common."""

    model: str | None = None
    # -- sampling
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # -- length
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    # -- output
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    # -- scheduling
    priority: int | str | None = None
    cache_salt: str | None = None
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


class ChatRequest(SamplingRequest, kw_only=True):
    """``POST /v1/chat/completions``"""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
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


# A list holds strings, or token ids, or lists of token ids; `limits` refuses mixtures.
Prompt = str | list[str | int | list[int]]


class CompletionRequest(SamplingRequest, kw_only=True):
    """``POST /v1/completions``"""

    prompt: Prompt
    logprobs: int | None = None
    echo: bool | None = None
    # -- refused unless neutral
    suffix: Any = None


class TokenizeRequest(Struct, kw_only=True):
    """``POST /tokenize``: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, kw_only=True):
    """``POST /detokenize``"""

    tokens: list[int]
    model: str | None = None

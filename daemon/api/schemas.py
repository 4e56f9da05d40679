"""Request bodies: the fields of each route, their types and their fixed bounds.

msgspec checks types and bounds when it decodes a body. Relations between fields, and bounds that depend on the
configuration or the model, are in `validation`. A field of type Any is here to be refused if its value would change
the answer: see `unsupported`. Unknown fields are ignored, so new clients continue to work. docs/fields.md says what
becomes of each field of OpenAI's and vLLM's schemas; tests/api/test_fields.py compares it with this file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType, field

from daemon.api.grammar.forms import Choices, ResponseFormat, StructuredOutputs
from daemon.api.unsupported import unsupported
from daemon.control.policy.priority import HIGHEST, LOWEST

# No option allows more than these.
MAX_MESSAGES = 1 << 16
MAX_STOPS = 64
MAX_TOOLS = 4096
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_ALLOWED_TOKENS = 4096
MAX_BAD_WORDS = 128
MAX_CACHE_SALT = 256
MIN_REPETITION_PENALTY = 1e-6
"""Logits are divided by the penalty in float32. A quotient by this or more is finite; 1e-46 is 0 in float32."""
_MAX_COUNT = (1 << 31) - 1  # of tokens

_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Bias = Annotated[float, Meta(ge=-100, le=100)]
_NumTokens = Annotated[int, Meta(ge=0, le=_MAX_COUNT)]
_NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
_StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]

# What several refused fields advise.
_FUNCTIONS_ADVICE = "Use `tools` and `tool_choice`."
_BEAMS = unsupported("Send `n` instead, and choose among the choices.")
_PROCESSOR = unsupported("Clients cannot send code.")
_REPETITION = unsupported("Use `repetition_penalty`, or watch the stream and close it.", 0)
_TRANSFER = unsupported("Engines here move KV among themselves.")
_OTHER_MAX = unsupported("Its name here is `max_tokens`.", -1)
_TEMPLATE = unsupported("Clients cannot send code. Write the prompt yourself, and send it to /v1/completions.")
_DOCUMENTS = unsupported("Put the documents in a message.")


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
    allowed_token_ids: Annotated[list[int], Meta(max_length=MAX_ALLOWED_TOKENS)] | None = None
    bad_words: Annotated[list[_StopString], Meta(max_length=MAX_BAD_WORDS)] | None = None
    # -- length
    max_tokens: _NumTokens | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=_MAX_COUNT)] | None = None
    ignore_eos: bool | None = None
    stop: _StopString | Annotated[list[_StopString], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    # -- output
    n: Annotated[int, Meta(ge=1)] | None = None
    best_of: Annotated[int, Meta(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: _NumLogprobs | None = None
    # -- prompt
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=_MAX_COUNT)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    # -- scheduling
    priority: Annotated[int, Meta(ge=LOWEST, le=HIGHEST)] | str | None = None
    cache_salt: Annotated[str, Meta(max_length=MAX_CACHE_SALT)] | None = None
    # -- form of the output, see `grammar.requested`
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Raw = field(default_factory=Raw)
    guided_json_object: bool | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | None = None
    json_schema: Raw = field(default_factory=Raw)
    # -- refused unless neutral
    use_beam_search: Annotated[Any, _BEAMS] = None
    length_penalty: Annotated[Any, unsupported("It is for beam search, which is not supported.", 1)] = None
    logprob_token_ids: Annotated[Any, unsupported("Ask for the most likely tokens instead.")] = None
    prompt_embeds: Annotated[Any, unsupported("Send text or token ids.")] = None
    logits_processors: Annotated[Any, _PROCESSOR] = None
    custom_logit_processor: Annotated[Any, _PROCESSOR] = None
    stop_regex: Annotated[Any, unsupported("Use `stop` with plain strings.")] = None
    thinking_token_budget: Annotated[Any, unsupported("Use `max_tokens`.", -1)] = None
    repetition_detection: Annotated[Any, _REPETITION] = None
    max_repetition_pattern_size: Annotated[Any, _REPETITION] = None
    min_repetition_pattern_size: Annotated[Any, _REPETITION] = None
    repetition_min_count: Annotated[Any, _REPETITION] = None
    watermarking: Annotated[Any, unsupported("Output has no watermark.")] = None
    kv_transfer_params: Annotated[Any, _TRANSFER] = None
    ec_transfer_params: Annotated[Any, _TRANSFER] = None
    vllm_xargs: Annotated[Any, unsupported("This server has no extensions that read it.")] = None
    lora_path: Annotated[Any, unsupported("Adapters are not supported. Serve the merged model.")] = None
    return_hidden_states: Annotated[Any, unsupported("An answer has text and logprobs only.")] = None
    max_new_tokens: Annotated[Any, _OTHER_MAX] = None
    n_predict: Annotated[Any, _OTHER_MAX] = None
    repeat_penalty: Annotated[Any, unsupported("Its name here is `repetition_penalty`.", 1)] = None
    typical_p: Annotated[Any, unsupported("Use `top_p` or `min_p`.", 1)] = None
    mirostat: Annotated[Any, unsupported("Use `top_p` or `min_p`.", 0)] = None


ROLES = ("system", "developer", "user", "assistant", "tool")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class ContentPart(Struct):
    """A part of a message. `type`: one of TEXT_PARTS, or `refusal`; others are here to be refused."""

    type: str = "text"
    text: str | None = None
    refusal: str | None = None


TEXT_PARTS = ("text", "input_text", "output_text")


class Message(Struct):
    role: Annotated[str, Meta(extra_json_schema={"enum": [*ROLES]})]
    content: str | list[str | ContentPart] | UnsetType | None = UNSET
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None  # an older name of `reasoning`
    # -- refused unless neutral
    refusal: Annotated[Any, unsupported("Put its text in `content`.")] = None
    function_call: Annotated[Any, unsupported("Use `tool_calls`.")] = None
    audio: Annotated[Any, unsupported("Messages are text.")] = None


# `tools` checks what is in them.
Tools = Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)]
ToolChoice = str | dict[str, Any]
Messages = Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]


class ChatRequest(SamplingRequest, kw_only=True):
    """Body of ``POST /v1/chat/completions``."""

    messages: Messages
    max_completion_tokens: _NumTokens | None = None
    logprobs: bool | None = None
    top_logprobs: _NumLogprobs | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None
    reasoning_effort: Annotated[str, Meta(extra_json_schema={"enum": [*EFFORTS]})] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    # -- refused unless neutral
    functions: Annotated[Any, unsupported(_FUNCTIONS_ADVICE)] = None
    function_call: Annotated[Any, unsupported(_FUNCTIONS_ADVICE, "none", "auto")] = None
    modalities: Annotated[Any, unsupported("Output is text.", ["text"])] = None
    audio: Annotated[Any, unsupported("Output is text.")] = None
    web_search_options: Annotated[
        Any, unsupported("This server does not search. Put what you found in a message.")
    ] = None
    moderation: Annotated[Any, unsupported("This server does not moderate. Check input and output yourself.")] = None
    verbosity: Annotated[Any, unsupported("Say in a message how long the answer is to be.", "medium")] = None
    return_prompt_text: Annotated[Any, unsupported("Use /tokenize, then /detokenize.")] = None
    chat_template: Annotated[Any, _TEMPLATE] = None
    documents: Annotated[Any, _DOCUMENTS] = None


# A list holds strings, or token ids, or lists of token ids; `validation.split_prompts` refuses mixtures.
Prompt = str | list[str | int | list[int]]


class CompletionRequest(SamplingRequest, kw_only=True):
    """Body of ``POST /v1/completions``."""

    prompt: Prompt
    logprobs: _NumLogprobs | None = None
    echo: bool | None = None
    # -- refused unless neutral
    suffix: Annotated[Any, unsupported("Write prefix and suffix into `prompt` in your model's own form.")] = None


class TokenizeRequest(Struct, kw_only=True):
    """Body of ``POST /tokenize``: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    reasoning_effort: Annotated[str, Meta(extra_json_schema={"enum": [*EFFORTS]})] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    # -- refused unless neutral, as in a chat
    functions: Annotated[Any, unsupported(_FUNCTIONS_ADVICE)] = None
    chat_template: Annotated[Any, _TEMPLATE] = None
    documents: Annotated[Any, _DOCUMENTS] = None


class DetokenizeRequest(Struct, kw_only=True):
    """Body of ``POST /detokenize``."""

    tokens: list[int]
    model: str | None = None

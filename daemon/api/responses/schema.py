"""Body of ``POST /v1/responses``. What holds for the fields of `daemon.api.schemas` holds for these."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Raw, Struct, field

from daemon.api.grammar.forms import StructuredOutputs
from daemon.api.schemas import (
    MAX_CACHE_SALT,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_STOP_CHARS,
    MAX_STOPS,
    MIN_REPETITION_PENALTY,
)
from daemon.api.unsupported import unsupported
from daemon.control.policy.priority import HIGHEST, LOWEST

MAX_TOOLS = 512
_MAX_COUNT = (1 << 31) - 1  # of tokens
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Bias = Annotated[float, Meta(ge=-100, le=100)]
_StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
_MetadataKey = Annotated[str, Meta(max_length=64)]
_MetadataValue = Annotated[str, Meta(max_length=512)]

_STORED = unsupported("This server stores no responses. Send `store: false`, and the whole conversation in `input`.")
_HISTORY = unsupported("This server stores no responses. Send the whole conversation in `input`.")


class InputPart(Struct):
    """A part of a message, of an output or of reasoning. Parts of other types are here to be refused."""

    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(Struct):
    """An item of `input`: a message, a call, the output of a call, or reasoning. Others are here to be refused.

    `arguments` and `output` may have any type in an item of another type.
    """

    type: str | None = None
    role: str | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: Any = None
    output: Any = None
    summary: list[InputPart] | None = None
    encrypted_content: str | None = None


class TextFormat(Struct):
    """`text.format`. `schema`: JSON, an object."""

    type: str
    name: str | None = None
    description: str | None = None
    schema: Raw = field(default_factory=Raw)
    strict: bool | None = None


class TextConfig(Struct):
    """`text`."""

    format: TextFormat | None = None
    # -- refused unless neutral
    verbosity: Annotated[Any, unsupported("Say in a message how long the answer is to be.", "medium")] = None


class ReasoningConfig(Struct):
    """`reasoning`. A summary is not made: the reasoning itself is in the answer."""

    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(Struct, kw_only=True):
    """Body of ``POST /v1/responses``."""

    input: str | Annotated[list[InputItem], Meta(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    instructions: str | None = None
    # -- sampling, as in a chat
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_MAX_COUNT)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=MIN_REPETITION_PENALTY, le=100)] | None = None
    logit_bias: Annotated[dict[str, _Bias], Meta(max_length=MAX_LOGIT_BIAS)] | None = None
    stop: _StopString | Annotated[list[_StopString], Meta(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=_MAX_COUNT)] | None = None
    # -- what the answer may be
    tools: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    structured_outputs: StructuredOutputs | None = None
    reasoning: ReasoningConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # -- output
    include: list[str] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    # -- scheduling
    priority: Annotated[int, Meta(ge=LOWEST, le=HIGHEST)] | str | None = None
    cache_salt: Annotated[str, Meta(max_length=MAX_CACHE_SALT)] | None = None
    # -- repeated in the answer, without another effect
    metadata: Annotated[dict[_MetadataKey, _MetadataValue], Meta(max_length=16)] | None = None
    max_tool_calls: Annotated[int, Meta(ge=1, le=_MAX_COUNT)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # -- refused unless neutral
    store: Annotated[Any, _STORED] = None
    background: Annotated[Any, unsupported("Responses run in the foreground. Keep the connection open.")] = None
    previous_response_id: Annotated[Any, _HISTORY] = None
    previous_response: Annotated[Any, _HISTORY] = None
    previous_input_messages: Annotated[Any, _HISTORY] = None
    conversation: Annotated[Any, _HISTORY] = None
    prompt: Annotated[Any, unsupported("This server stores no prompts. Send its text in `instructions`.")] = None
    truncation: Annotated[Any, unsupported("Leave out the items that you can spare.", "disabled")] = None
    context_management: Annotated[Any, unsupported("Summarise the conversation yourself.")] = None
    moderation: Annotated[Any, unsupported("This server does not moderate. Check input and output yourself.")] = None
    include_stop_str_in_output: Annotated[Any, unsupported("Append the stop string yourself.")] = None
    enable_response_messages: Annotated[Any, unsupported("/tokenize tells what a conversation becomes.")] = None
    vllm_xargs: Annotated[Any, unsupported("This server has no extensions that read it.")] = None

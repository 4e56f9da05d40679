"""What the routes answer, as types. They are the source of the description at /openapi.json.

The bytes of answers are written elsewhere, for speed; tests compare them with these types. A field of type UnsetType
may be absent.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType


class ErrorDetails(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Struct):
    """The body of an error, and the data of the last event of a stream that ends with one."""

    error: ErrorDetails


class PromptTokensDetails(Struct):
    cached_tokens: int


class CompletionTokensDetails(Struct):
    reasoning_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class LikelyToken(Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[LikelyToken]


class ChatTokenLogprobs(Struct):
    content: list[TokenLogprob]
    refusal: UnsetType | None = UNSET


class TextTokenLogprobs(Struct):
    """Four lists with one item for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CalledFunction(Struct):
    name: str
    arguments: str


class ToolCall(Struct):
    id: str
    type: Literal["function"]
    function: CalledFunction


class CalledFunctionDelta(Struct):
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallDelta(Struct):
    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: CalledFunctionDelta | UnsetType = UNSET


FinishReason = Literal["stop", "length", "tool_calls"]


class AnswerMessage(Struct):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    reasoning_content: str | UnsetType | None = UNSET


class ChatChoice(Struct):
    index: int
    message: AnswerMessage
    logprobs: ChatTokenLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Struct):
    """The answer of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class ChunkChoice(Struct):
    index: int
    delta: Delta
    logprobs: ChatTokenLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(Struct):
    """An event of a streamed chat completion. `usage` is there if the request asks for it."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class TextChoice(Struct):
    index: int
    text: str
    logprobs: TextTokenLogprobs | None
    finish_reason: FinishReason | None


class Completion(Struct):
    """The answer of ``POST /v1/completions``, and an event of it if it is streamed."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET


class Model(Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(Struct):
    object: Literal["list"]
    data: list[Model]


class Tokens(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Struct):
    prompt: str


class StreamDeleted(Struct):
    id: str
    object: Literal["stream"]
    deleted: Literal[True]


class Status(Struct):
    status: Literal["ok", "ready"]


class Version(Struct):
    version: str


class Load(Struct):
    server_load: int


class Description(Struct):
    """This description."""

    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]
    components: dict[str, Any]
    security: list[dict[str, Any]] | UnsetType = UNSET

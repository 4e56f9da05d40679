"""What these routes answer, as types, with what holds for those in `daemon.api.routes.answers`."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType


class MessageTokensDetails(Struct):
    thinking_tokens: int


class MessageUsage(Struct):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: MessageTokensDetails
    service_tier: Literal["standard"]


class MessageBlock(Struct):
    """A content block. `text`, or `thinking` and `signature`, or `id`, `name` and `input`, as its type says."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET
    id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    input: dict[str, Any] | UnsetType = UNSET


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class AnsweredMessage(Struct):
    """The answer of ``POST /v1/messages``."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageDelta(Struct):
    """What an event adds: to a block, with a type, or to the message."""

    type: Literal["text_delta", "thinking_delta", "signature_delta", "input_json_delta"] | UnsetType = UNSET
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET
    partial_json: str | UnsetType = UNSET
    stop_reason: StopReason | UnsetType | None = UNSET
    stop_sequence: str | UnsetType | None = UNSET


class MessageEvent(Struct):
    """An event of a streamed message; `type` is its name, too."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "ping",
    ]
    message: AnsweredMessage | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: MessageBlock | UnsetType = UNSET
    delta: MessageDelta | UnsetType = UNSET
    usage: MessageUsage | UnsetType = UNSET


class MessageErrorCode(Struct):
    error_code: str


class MessageErrorDetails(Struct):
    type: str
    message: str
    details: MessageErrorCode | UnsetType = UNSET


class MessageError(Struct):
    """The body of an error of these routes; without `request_id` the last event of a stream that ends with one."""

    type: Literal["error"]
    error: MessageErrorDetails
    request_id: str | UnsetType | None = UNSET


class MessageTokens(Struct):
    """The answer of ``POST /v1/messages/count_tokens``."""

    input_tokens: int

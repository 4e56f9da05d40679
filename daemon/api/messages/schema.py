"""Bodies of ``POST /v1/messages`` and of its ``count_tokens``, with what holds for those in `daemon.api.schemas`."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Raw, Struct, field

from daemon.api.schemas import MAX_CACHE_SALT, MAX_MESSAGES, MAX_STOP_CHARS, MAX_STOPS
from daemon.api.unsupported import unsupported
from daemon.control.policy.priority import HIGHEST, LOWEST

MAX_TOOLS = 512
_MAX_COUNT = (1 << 31) - 1  # of tokens
_StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
_NO_TOOLS = unsupported("This server runs no tools and no code. Run them yourself, and send `tools` of type custom.")


class Block(Struct):
    """A content block of any type; `conversation` says which are supported. Only one of text has a `text`."""

    type: str
    text: str | None = None
    id: str | None = None  # from here: of tool_use
    name: str | None = None
    input: Any = None
    tool_use_id: str | None = None  # from here: of tool_result
    content: Any = None
    is_error: bool | None = None
    thinking: str | None = None


class InputMessage(Struct):
    """One turn of the conversation."""

    role: str
    content: str | list[Block]


class Tool(Struct):
    """A tool. Those of a type other than custom are refused: servers run them, or models know them by name."""

    name: str = ""
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(Struct):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct):
    """`budget_tokens` has no effect: how long a model thinks is up to it."""

    type: str
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(Struct):
    type: str
    schema: Raw = field(default_factory=Raw)  # JSON: an object


class OutputConfig(Struct):
    effort: str | None = None
    format: OutputFormat | None = None


class Thread(Struct):
    """A conversation that a server keeps. This one keeps none: see `lowering`."""

    type: str


class CountTokensRequest(Struct, kw_only=True):
    """Body of ``POST /v1/messages/count_tokens``."""

    messages: Annotated[list[InputMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    system: str | list[Block] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # an older name of `output_config.format`
    context_management: Any = None
    thread: Thread | None = None
    # -- refused unless neutral
    mcp_servers: Annotated[Any, _NO_TOOLS] = None
    compaction: Annotated[Any, unsupported("Shorten the conversation yourself.")] = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """Body of ``POST /v1/messages``."""

    max_tokens: Annotated[int, Meta(ge=1, le=_MAX_COUNT)]
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_MAX_COUNT)] | None = None
    stop_sequences: Annotated[list[_StopString], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    # -- fields of this server, as in a chat
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    priority: Annotated[int, Meta(ge=LOWEST, le=HIGHEST)] | str | None = None
    cache_salt: Annotated[str, Meta(max_length=MAX_CACHE_SALT)] | None = None
    # -- refused unless neutral
    container: Annotated[Any, _NO_TOOLS] = None
    inference_geo: Annotated[Any, unsupported("This server is one machine, where it is.")] = None

"""The fields of a request that constrain the form of its answer."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Raw, Struct, field

from daemon.api.unsupported import unsupported

MAX_CHOICES = 8192  # strings that an answer can be one of

Choices = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=MAX_CHOICES)]


class JsonSchemaFormat(Struct, kw_only=True):
    """OpenAI's `json_schema` of a `response_format`."""

    name: str | None = None
    description: str | None = None
    schema: Raw = field(default_factory=Raw)  # JSON: an object
    strict: bool | None = None


class ResponseFormat(Struct, kw_only=True):
    """`response_format`. `schema` at this place is the form of servers older than OpenAI's `json_schema`."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    schema: Raw = field(default_factory=Raw)


class StructuredOutputs(Struct, kw_only=True):
    """vLLM's `structured_outputs`."""

    json: Raw = field(default_factory=Raw)  # a schema, or its text as a string
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None
    # -- refused unless neutral
    structural_tag: Annotated[Any, unsupported("Use `tools`, or `grammar`.")] = None

"""docs/fields.md agrees with the schemas, with what a request gets, and with the fields of other servers' APIs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_count_tokens_params as beta_count_tokens_params
from anthropic.types.beta import message_create_params as beta_create_params
from msgspec import Struct
from openai.types import completion_create_params
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionStreamOptionsParam
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from daemon.api.messages.schema import CountTokensRequest, MessagesRequest
from daemon.api.responses.schema import ResponsesRequest
from daemon.api.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    StreamOptions,
    TokenizeRequest,
)
from daemon.api.unsupported import NEUTRAL, Rule, rules
from tests.api.harness import CHAT, HELLO, TEXT, with_client
from tests.api.peer_fields import OTHERS, VLLM
from tests.api.responses_client import PATH as RESPONSES

PAGE = Path(__file__).parents[2] / "docs" / "fields.md"
SCHEMAS: dict[str, type[Struct]] = {
    "chat": ChatRequest,
    "completions": CompletionRequest,
    "responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "stream_options": StreamOptions,
    "messages": Message,
}
OPENAI = {
    "chat": frozenset(get_type_hints(chat_create_params.CompletionCreateParamsStreaming)),
    "completions": frozenset(get_type_hints(completion_create_params.CompletionCreateParamsStreaming)),
    "responses": frozenset(get_type_hints(response_create_params.ResponseCreateParamsStreaming)),
    "stream_options": frozenset(get_type_hints(ChatCompletionStreamOptionsParam)),
    "messages": frozenset(name for kind in get_args(ChatCompletionMessageParam) for name in get_type_hints(kind)),
}
ANTHROPIC = {
    "/v1/messages": frozenset(get_type_hints(message_create_params.MessageCreateParamsStreaming)),
    "/v1/messages/count_tokens": frozenset(get_type_hints(message_count_tokens_params.MessageCountTokensParams)),
}
BETAS = {
    "/v1/messages": frozenset(get_type_hints(beta_create_params.MessageCreateParamsStreaming)),
    "/v1/messages/count_tokens": frozenset(get_type_hints(beta_count_tokens_params.MessageCountTokensParams)),
}


class Row(NamedTuple):
    """One line of a table: a field, the servers that know it, its fate by route, and a note."""

    field: str
    known_to: str
    fates: dict[str, str]
    note: str


def rows() -> list[Row]:
    """Return the rows of all tables on the page."""
    found, head = [], []
    for line in PAGE.read_text().splitlines():
        if line.startswith("| field"):
            head = line.replace("`", "").strip("| ").split(" | ")[2:]
        elif line.startswith("| `"):
            field, known_to, *rest = (cell.strip() for cell in line[2:].removesuffix("|").split("|"))
            found.append(Row(field.strip("`"), known_to, dict(zip(head, rest[:-1], strict=True)), rest[-1]))
    return found


def accepted(rule: Rule) -> str:
    """Return the end of the note on a refused field: its neutral values besides the usual ones."""
    values = ", ".join(f"`{json.dumps(value)}`" for value in rule.neutral)
    return f" Accepted: {values}." if values else ""


ROWS = rows()
ROUTES = {
    "chat": (CHAT, HELLO),
    "completions": (TEXT, {"prompt": "x"}),
    "responses": (RESPONSES, {"input": "x"}),
    "/v1/messages": ("/v1/messages", HELLO | {"max_tokens": 9}),
    "/v1/messages/count_tokens": ("/v1/messages/count_tokens", HELLO),
    "/tokenize": ("/tokenize", HELLO),
}
OF_ROUTE = {
    route: OPENAI.get(route, frozenset())
    | VLLM.get(route, frozenset())
    | ANTHROPIC.get(route, frozenset())
    | BETAS.get(route, frozenset())
    | (frozenset().union(*OTHERS.values()) if route in ("chat", "completions") else frozenset())
    for route in SCHEMAS
}


def fate(route: str, field: str) -> str:
    """Return what the code does with a field, in the words of the page."""
    if field in rules(SCHEMAS[route]):
        return "refused"
    if field in SCHEMAS[route].__struct_fields__:
        return "honoured"
    return "ignored" if field in OF_ROUTE[route] else "-"


@pytest.mark.parametrize("route", SCHEMAS)
def test_each_field_of_a_schema_has_a_row(route):
    listed = {row.field for row in ROWS if route in row.fates}
    missing = (OF_ROUTE[route] | set(SCHEMAS[route].__struct_fields__)) - listed
    assert not missing, f"docs/fields.md lacks fields of {route}: does a value of theirs change the answer?"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.field}-{'+'.join(row.fates)}")
def test_a_row_says_what_the_schemas_do(row):
    assert row.fates == {route: fate(route, row.field) for route in row.fates}
    for peer, fields in (("OpenAI", OPENAI), ("vLLM", VLLM), ("Anthropic", ANTHROPIC)):
        knows = any(row.field in fields.get(route, ()) for route in row.fates)
        assert (peer in row.known_to.split(", ")) == knows, f"{peer} {'has' if knows else 'has no'} {row.field}"
    for route in row.fates:
        if row.field in (of := rules(SCHEMAS[route])):
            assert row.note == of[row.field].advice + accepted(of[row.field])
    assert row.note or "ignored" not in row.fates.values(), "say why it is harmless to ignore it"


@pytest.mark.parametrize("route", [route for route in ROUTES if route not in ANTHROPIC])
def test_refused_fields_are_refused_unless_neutral(api, route):
    path, request = ROUTES[route]

    async def body(client):
        for field, rule in rules(SCHEMAS[route]).items():
            for value in ({"a": 1}, "x", 7, True):
                if not rule.accepts(value):
                    answer = await client.post(path, json=request | {field: value})
                    error = (await answer.json())["error"]
                    assert (answer.status, error["param"], error["code"]) == (400, field, "unsupported_parameter")
                    assert field in error["message"] and rule.advice in error["message"]
            for value in (*NEUTRAL, *rule.neutral):
                assert (await client.post(path, json=request | {field: value})).status == 200, (field, value)

    with_client(api, body)


@pytest.mark.parametrize("route", ROUTES)
def test_ignored_and_unknown_fields_change_nothing(api, route):
    path, request = ROUTES[route]
    ignored: dict[str, Any] = {row.field: {"a": [1]} for row in ROWS if row.fates.get(route) == "ignored"}

    async def body(client):
        for extra in (ignored, {"some_new_field": 1}):
            plain, more = [await client.post(path, json=request | {"seed": 1} | e) for e in ({}, extra)]
            assert (plain.status, more.status) == (200, 200)
        assert len({(tuple(s.prompt), s.params) for s in api.generator.submissions}) <= 1

    with_client(api, body)


def test_zero_is_not_neutral_where_it_asks_for_something():
    refused = rules(ChatRequest)
    assert not refused["logprob_token_ids"].accepts(0) and not refused["thinking_token_budget"].accepts(0)

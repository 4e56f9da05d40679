"""The routes of Anthropic's Messages API: answers whole and streamed, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from daemon.api.generator import Overloaded
from daemon.api.messages import answers
from daemon.api.messages.schema import CountTokensRequest, MessagesRequest
from daemon.api.unsupported import NEUTRAL, rules
from daemon.ipc.messages import Finish
from tests.api.harness import ANSWER, ApiUnderTest, Model, make_api, with_client
from tests.api.test_openapi import strict
from tests.models.tiny_model import EOS_ID

MESSAGES = "/v1/messages"
HELLO: dict[str, Any] = {"max_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}
WEATHER = {
    "name": "weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '{"name": "weather", "arguments": {"city": "Rome", "days": 12345678901234567890}}'
SCHEMA = {"type": "json_schema", "schema": {"type": "object", "properties": {"title": {"type": "string"}}}}
INPUT = {"city": "Rome", "days": 12345678901234567890}


@pytest.fixture
def api(model: Model) -> ApiUnderTest:
    found = make_api(model)
    found.generator.max_model_len = 2048  # the descriptions of tools are long
    return found


def says(api: ApiUnderTest, text: str, *, end: bool = True) -> None:
    tokens = [*api.model.tokenizer.encode(text, False), *([EOS_ID] if end else ())]
    api.generator.reply = lambda prompt, params: tokens


def events(body: str) -> list[dict[str, Any]]:
    """Return the data of each event, which has the name that its type says."""
    found = []
    for event in body.split("\n\n")[:-1]:
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def folded(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the message that the events tell, as a client puts it together."""
    assert [found[0]["type"], *(event["type"] for event in found[-2:])] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]
    message = found[0]["message"]
    assert message["content"] == [] and message["stop_reason"] is None
    texts: list[str] = []
    for event in found[1:-2]:
        assert event["index"] == len(message["content"]) - (event["type"] != "content_block_start")
        match event["type"]:
            case "content_block_start":
                message["content"].append(event["content_block"])
                texts = []
            case "content_block_delta":
                _, *rest = event["delta"].items()
                (name, text), *_ = rest
                texts.append(text)
                block = message["content"][-1]
                if name == "partial_json":
                    block["input"] = json.loads("".join(texts)) if _is_json("".join(texts)) else {}
                else:
                    block[name] += text
    message |= found[-2]["delta"] | {"usage": found[-2]["usage"]}
    return message


def _is_json(text: str) -> bool:
    try:
        return bool(json.loads(text)) or True
    except ValueError:
        return False


async def both(client: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request, which is the same streamed and not."""
    response = await client.post(MESSAGES, json=request)
    whole = json.loads(await response.text())
    assert response.status == 200, whole
    strict(answers.AnsweredMessage, whole)
    response = await client.post(MESSAGES, json=request | {"stream": True})
    found = events(await response.text())
    for event in found:
        strict(answers.MessageEvent, event)
    streamed = folded(found)
    for message in (whole, streamed):
        assert message.pop("id").startswith("msg_")
        for block in message["content"]:
            if block["type"] == "thinking":
                assert len(block.pop("signature")) == 32
            if block["type"] == "tool_use":
                assert block.pop("id")
    assert streamed == whole
    return whole


def test_an_answer(api: ApiUnderTest):
    api.generator.num_cached_tokens = 2

    async def body(client: Any) -> None:
        found = await both(client, HELLO | {"system": "Be brief.", "metadata": {"user_id": "u"}, "model": "tiny"})
        assert found["content"] == [{"type": "text", "text": ANSWER}]
        assert (found["stop_reason"], found["stop_sequence"]) == ("end_turn", None)
        assert (found["role"], found["type"], found["model"]) == ("assistant", "message", "tiny")
        usage, prompt = found["usage"], len(api.generator.submissions[0].prompt)
        assert usage["cache_read_input_tokens"] == 2 and usage["input_tokens"] == prompt - 2
        assert usage["output_tokens"] > 5
        assert api.counter("http_requests", "messages", "2xx") == 2

    with_client(api, body)


def test_the_limit_of_tokens(api: ApiUnderTest):
    async def body(client: Any) -> None:
        found = await both(client, HELLO | {"max_tokens": 3})
        assert (found["stop_reason"], found["usage"]["output_tokens"]) == ("max_tokens", 3)

    with_client(api, body)


def test_more_tokens_than_the_context_has_room_for(api: ApiUnderTest):
    api.generator.max_model_len = 256
    says(api, "x" * 400, end=False)

    async def body(client: Any) -> None:
        found = await both(client, HELLO | {"max_tokens": 64000})
        assert found["stop_reason"] == "model_context_window_exceeded"
        assert sum(found["usage"][name] for name in ("input_tokens", "output_tokens")) == api.generator.max_model_len
        long = HELLO | {"messages": [{"role": "user", "content": "x " * 300}]}
        response = await client.post(MESSAGES, json=long)
        assert response.status == 400 and "maximum context length" in await response.text()

    with_client(api, body)


def test_a_stop_sequence_is_named(api: ApiUnderTest):
    async def body(client: Any) -> None:
        found = await both(client, HELLO | {"stop_sequences": ["cat", " fox"]})
        assert found["content"] == [{"type": "text", "text": "the quick brown"}]
        assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", " fox")

    with_client(api, body)


def test_an_empty_answer_has_no_blocks(api: ApiUnderTest):
    says(api, "")

    async def body(client: Any) -> None:
        found = await both(client, HELLO)
        assert (found["content"], found["stop_reason"]) == ([], "end_turn")

    with_client(api, body)


@pytest.mark.parametrize("choice", [None, {"type": "auto"}])
def test_a_tool_call(api: ApiUnderTest, choice: Any):
    says(api, CALL)

    async def body(client: Any) -> None:
        found = await both(client, HELLO | {"tools": [WEATHER]} | ({"tool_choice": choice} if choice else {}))
        assert found["content"] == [{"type": "tool_use", "name": "weather", "input": INPUT}]
        assert found["stop_reason"] == "tool_use"
        prompt = api.model.tokenizer.decode(api.generator.submissions[0].prompt)
        assert "Tells the weather." in prompt

    with_client(api, body)


def test_two_calls_or_one(api: ApiUnderTest):
    says(api, f"[{CALL}, {CALL}]")

    async def body(client: Any) -> None:
        found = await both(client, HELLO | {"tools": [WEATHER]})
        assert [block["type"] for block in found["content"]] == ["tool_use"] * 2
        choice = {"type": "auto", "disable_parallel_tool_use": True}
        found = await both(client, HELLO | {"tools": [WEATHER], "tool_choice": choice})
        assert [block["type"] for block in found["content"]] == ["tool_use"]

    with_client(api, body)


def test_a_call_that_is_cut_has_no_input(api: ApiUnderTest):
    says(api, CALL)

    async def body(client: Any) -> None:
        cut = len(api.model.tokenizer.encode(CALL[:-20], False))
        found = await both(client, HELLO | {"tools": [WEATHER], "max_tokens": cut})
        assert found["content"] == [{"type": "tool_use", "name": "weather", "input": {}}]
        assert found["stop_reason"] == "max_tokens"

    with_client(api, body)


def test_tools_that_may_not_be_called(api: ApiUnderTest):
    says(api, CALL)

    async def body(client: Any) -> None:
        found = await both(client, HELLO | {"tools": [WEATHER], "tool_choice": {"type": "none"}})
        assert found["content"] == [{"type": "text", "text": CALL}]

    with_client(api, body)


def test_the_result_of_a_tool_reaches_the_model(api: ApiUnderTest):
    async def body(client: Any) -> None:
        call = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}
        turns = [
            *HELLO["messages"],
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "sunny there"}]},
        ]
        await both(client, HELLO | {"messages": turns, "tools": [WEATHER]})
        prompt = api.model.tokenizer.decode(api.generator.submissions[0].prompt)
        assert "sunny there" in prompt and "Rome" in prompt

    with_client(api, body)


@pytest.mark.parametrize(
    ("thinking", "shown"),
    [
        (None, True),
        ({"type": "enabled", "budget_tokens": 1024}, True),
        ({"type": "disabled"}, False),
        ({"type": "adaptive"}, True),
        ({"type": "adaptive", "display": "omitted"}, False),
    ],
)
def test_thinking(model: Model, thinking: Any, shown: bool):
    api = make_api(model, reasoning_format="think")
    says(api, "<think>Let me see.</think>It is.")

    async def body(client: Any) -> None:
        found = await both(client, HELLO | ({"thinking": thinking} if thinking else {}))
        blocks = [{"type": "thinking", "thinking": "Let me see."}, {"type": "text", "text": "It is."}]
        assert found["content"] == blocks[not shown :]
        assert found["usage"]["output_tokens_details"]["thinking_tokens"] > 0

    with_client(api, body)


def test_an_answer_that_the_client_has_begun_goes_on(api: ApiUnderTest):
    async def body(client: Any) -> None:
        begun = [*HELLO["messages"], {"role": "assistant", "content": "The answer is"}]
        await both(client, HELLO | {"messages": begun})
        assert api.model.tokenizer.decode(api.generator.submissions[0].prompt).endswith("The answer is")

    with_client(api, body)


@pytest.mark.parametrize("form", [{"output_config": {"format": SCHEMA}}, {"output_format": SCHEMA}])
def test_a_form_of_the_answer(api: ApiUnderTest, form: dict[str, Any]):
    says(api, '{"title": "x"}')

    async def body(client: Any) -> None:
        await both(client, HELLO | form)
        assert '"title"' in api.generator.submissions[0].params.grammar

    with_client(api, body)


def test_counting_tokens(api: ApiUnderTest):
    async def body(client: Any) -> None:
        request = {"messages": HELLO["messages"], "tools": [WEATHER], "system": "Be brief."}
        response = await client.post(f"{MESSAGES}/count_tokens", json=request)
        count = json.loads(await response.text())
        strict(answers.MessageTokens, count)
        await both(client, request | {"max_tokens": 5})
        assert count["input_tokens"] == len(api.generator.submissions[0].prompt)

    with_client(api, body)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "`max_tokens` must be from 1"),
        ({"temperature": 1.5}, "`temperature` must be from 0 to 1"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "`web_search_20250305`"),
        ({"tools": [{"name": "x"}]}, "tools.0: A tool needs an `input_schema`."),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "`tool_choice` needs `tools`"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "`x`"),
        ({"tools": [WEATHER], "tool_choice": {"type": "some"}}, "auto, any, none and tool"),
        ({"thinking": {"type": "some"}}, "`thinking.type` must be one of"),
        ({"output_config": {"effort": "some"}}, "`output_config.effort` must be one of"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "a `schema`"),
        ({"output_config": {"format": SCHEMA | {"schema": {"type": "some"}}}}, "`output_config.format`"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"mcp_servers": [{"url": "x"}]}, "`mcp_servers` with this value is not supported"),
        ({"container": "x"}, "`container` with this value is not supported"),
        ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "`compact_20260112`"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages.0.content.0: Blocks of type `image`",
        ),
        ({"messages": []}, "messages"),
    ],
)
def test_what_is_refused(api: ApiUnderTest, change: dict[str, Any], why: str):
    async def body(client: Any) -> None:
        request = {name: value for name, value in (HELLO | change).items() if value is not None}
        response = await client.post(MESSAGES, json=request, headers={"x-request-id": "mine"})
        error = json.loads(await response.text())
        strict(answers.MessageError, error)
        assert (response.status, error["error"]["type"]) == (400, "invalid_request_error")
        assert why in error["error"]["message"] and error["request_id"] == "mine"

    with_client(api, body)


@pytest.mark.parametrize("path", [MESSAGES, f"{MESSAGES}/count_tokens"])
def test_refused_fields_are_refused_unless_neutral(api: ApiUnderTest, path: str):
    schema = MessagesRequest if path == MESSAGES else CountTokensRequest

    async def body(client: Any) -> None:
        for field, rule in rules(schema).items():
            response = await client.post(path, json=HELLO | {field: {"a": 1}})
            message = json.loads(await response.text())["error"]["message"]
            assert response.status == 400 and f"`{field}`" in message and rule.advice in message
            for value in NEUTRAL:
                assert (await client.post(path, json=HELLO | {field: value})).status == 200, (field, value)

    with_client(api, body)


@pytest.mark.parametrize(
    "more",
    [
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        {"service_tier": "auto", "metadata": {}, "cache_control": {"type": "ephemeral"}, "mcp_servers": []},
        {"output_config": {"effort": "high"}},
    ],
)
def test_what_changes_nothing_is_accepted(api: ApiUnderTest, more: dict[str, Any]):
    async def body(client: Any) -> None:
        assert (await both(client, HELLO | more))["stop_reason"] == "end_turn"
        headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "interleaved-thinking-2025-05-14"}
        response = await client.post(f"{MESSAGES}?beta=true", json=HELLO | more, headers=headers)
        assert response.status == 200 and response.headers["request-id"] == response.headers["x-request-id"]

    with_client(api, body)


def test_a_thread_begins_and_is_not_found_later(api: ApiUnderTest):
    async def body(client: Any) -> None:
        await both(client, HELLO | {"thread": {"type": "create"}})
        later = HELLO | {"thread": {"type": "continue", "previous_message_id": "msg_1"}}
        response = await client.post(MESSAGES, json=later)
        error = json.loads(await response.text())
        strict(answers.MessageError, error)
        assert (response.status, error["error"]["details"]) == (404, {"error_code": "thread_not_found"})

    with_client(api, body)


def test_other_errors_have_the_shape_too(model: Model):
    api = make_api(model, keys=["secret"])

    async def error(client: Any, request: dict[str, Any], **headers: str) -> tuple[int, str]:
        response = await client.post(MESSAGES, json=request, headers=headers)
        body = json.loads(await response.text())
        strict(answers.MessageError, body)
        return response.status, body["error"]["type"]

    async def body(client: Any) -> None:
        key = {"x-api-key": "secret"}
        assert await error(client, HELLO) == (401, "authentication_error")
        assert await error(client, HELLO, **{"x-api-key": "other"}) == (401, "authentication_error")
        assert await error(client, HELLO | {"model": "claude"}, **key) == (404, "not_found_error")
        api.generator.refusal = Overloaded("full", 3)
        assert await error(client, HELLO, **key) == (429, "rate_limit_error")
        api.generator.refusal = None
        api.generator.finish = Finish.ERROR
        assert await error(client, HELLO, **key) == (500, "api_error")
        api.generator.ready = False
        assert await error(client, HELLO, **key) == (503, "overloaded_error")

    with_client(api, body)


def test_a_stream_that_fails_ends_with_an_error(api: ApiUnderTest):
    api.generator.lose_after = 6

    async def body(client: Any) -> None:
        response = await client.post(MESSAGES, json=HELLO | {"stream": True})
        found = events(await response.text())
        assert [event["type"] for event in found[:2]] == ["message_start", "content_block_start"]
        strict(answers.MessageError, found[-1])
        assert found[-1]["error"]["type"] == "api_error"

    with_client(api, body)


def test_a_slow_stream_is_kept_open_by_pings(model: Model):
    api = make_api(model, heartbeat=0.02)
    api.generator.chunk_size, api.generator.delay = 50, 0.3

    async def body(client: Any) -> None:
        response = await client.post(MESSAGES, json=HELLO | {"stream": True})
        found = events(await response.text())
        assert found[0]["type"] == "ping"
        assert folded([event for event in found if event["type"] != "ping"])["stop_reason"] == "end_turn"

    with_client(api, body)

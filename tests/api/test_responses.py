"""POST /v1/responses: what an answer is made of, its events, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from daemon.api.responses import answers
from tests.api.harness import ANSWER, CHAT, HELLO, make_api, until, with_client
from tests.api.responses_client import CALLS, PATH, THOUGHT, TURN, WEATHER, agent_api, create, merged, refusal, stream
from tests.api.test_openapi import strict

LOGPROBS = "message.output_text.logprobs"


def test_a_whole_response(api):
    asked = {"input": "hello", "metadata": {"a": "b"}, "instructions": "Be brief.", "user": "u", "temperature": 0.5}
    api.generator.num_cached_tokens = 7

    async def body(client):
        found = await create(client, asked)
        assert found["id"].startswith("resp_") and found["object"] == "response" and found["model"] == "tiny"
        assert (found["status"], found["error"], found["incomplete_details"]) == ("completed", None, None)
        assert found["output"] == [
            {
                "id": found["output"][0]["id"],
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": ANSWER, "annotations": [], "logprobs": []}],
            }
        ]
        usage = found["usage"]
        assert usage["input_tokens_details"]["cached_tokens"] == 7
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 7
        repeated = ("metadata", "instructions", "user", "temperature")
        assert {name: found[name] for name in repeated} == {name: asked[name] for name in repeated}
        # What is not asked for is said as it is.
        assert found["store"] is False and found["truncation"] == "disabled" and found["tool_choice"] == "auto"
        assert found["top_p"] == 1.0 and found["parallel_tool_calls"] is True and found["tools"] == []
        assert api.counter("http_requests", "responses", "2xx") == 1

    with_client(api, body)


def test_all_events_in_their_order(api):
    async def body(client):
        events = await stream(client, {"input": "hello"})
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        kinds = [event["type"].removeprefix("response.") for event in merged(events)]
        assert kinds == [
            *("created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
            *("output_text.done", "content_part.done", "output_item.done", "completed"),
        ]
        text = next(event["delta"] for event in merged(events) if "delta" in event)
        assert text == ANSWER == events[-4]["text"]
        created, done = events[0]["response"], events[-1]["response"]
        assert created["status"] == "in_progress" and created["output"] == [] and created["usage"] is None
        assert done["output"] == [events[-2]["item"]]

    with_client(api, body)


def _without_ids(response: dict[str, Any]) -> dict[str, Any]:
    output = [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in response["output"]]
    return {k: v for k, v in response.items() if k not in ("id", "created_at")} | {"output": output}


@pytest.mark.parametrize("chunk_size", [1, 5, 400])
@pytest.mark.parametrize("text", [TURN, THOUGHT, CALLS, "", " ", "No <tool_call> here."])
@pytest.mark.parametrize("limit", [None, 1, 20])
def test_a_stream_ends_with_the_whole_response(model, text, chunk_size, limit):
    api = agent_api(model, text)
    api.generator.chunk_size = chunk_size
    asked = {"input": "hello", "tools": [WEATHER], "max_output_tokens": limit}

    async def body(client):
        whole = await create(client, asked)
        events = await stream(client, asked)
        last = events[-1]["response"]
        assert _without_ids(last) == _without_ids(whole)
        assert events[-1]["type"] == f"response.{whole['status']}"
        assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == last["output"]
        assert len({item["id"] for item in last["output"]}) == len(last["output"]) > 0

    with_client(api, body)


def test_reasoning_and_calls(model):
    async def body(client):
        found = await create(client, {"input": "hello", "tools": [WEATHER]})
        reasoning, message, *calls = found["output"]
        assert reasoning["content"] == [{"type": "reasoning_text", "text": "Which city? Köln."}]
        assert reasoning["summary"] == []
        assert message["content"][0]["text"] == "Let me see."
        assert [call["arguments"] for call in calls] == ['{"city": "Köln"}', '{"city": "Rom 🙂"}']
        assert {call["type"] for call in calls} == {"function_call"} and calls[0]["call_id"] != calls[1]["call_id"]
        assert found["usage"]["output_tokens_details"]["reasoning_tokens"] > 5
        assert found["tools"] == [WEATHER]
        events = merged(await stream(client, {"input": "hello", "tools": [WEATHER]}))
        assert [event["delta"] for event in events if "delta" in event] == [
            *("Which city? Köln.", "Let me see.", '{"city": "Köln"}', '{"city": "Rom 🙂"}')
        ]

    with_client(agent_api(model, TURN), body)


@pytest.mark.parametrize("asked", [{}, {"tools": [WEATHER]}, {"include": [LOGPROBS], "max_output_tokens": 30}])
def test_answers_have_the_types_of_the_description(model, asked):
    api = agent_api(model, TURN)

    async def body(client):
        strict(answers.Response, await create(client, {"input": "hello"} | asked))
        for event in await stream(client, {"input": "hello"} | asked):
            strict(answers.ResponseEvent, event)
        api.generator.lose_after = 6
        for event in await stream(client, {"input": "hello"} | asked):
            strict(answers.ResponseEvent, event)

    with_client(api, body)


def test_a_call_of_a_function_in_a_namespace(model):
    space = {"type": "namespace", "name": "space", "description": "d", "tools": [WEATHER]}
    text = '<tool_call>{"name": "space.get_weather", "arguments": {}}</tool_call>'

    async def body(client):
        asked = {"input": "hello", "tools": [space, {"type": "web_search"}]}
        (call,) = (await create(client, asked))["output"]
        assert (call["namespace"], call["name"]) == ("space", "get_weather")
        for event in await stream(client, asked):
            strict(answers.ResponseEvent, event)
            if "item" in event:
                assert (event["item"]["namespace"], event["item"]["name"]) == ("space", "get_weather")
        # What came back goes into the next request as it is.
        again = [{"role": "user", "content": "hello"}, call]
        again += [{"type": "function_call_output", "call_id": call["call_id"], "output": "12 °C"}]
        assert (await create(client, asked | {"input": again}))["status"] == "completed"

    with_client(agent_api(model, text), body)


SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}, "required": ["b"]}
IN_CHAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize(
    ("asked", "in_chat"),
    [
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}},
            {"response_format": IN_CHAT},
        ),
        ({"structured_outputs": {"regex": "a+"}}, {"structured_outputs": {"regex": "a+"}}),
    ],
)
def test_the_form_of_the_text(api, asked, in_chat):
    async def body(client):
        found = await create(client, {"input": "hello"} | asked)
        assert found["text"]["format"].get("schema", SCHEMA) == SCHEMA
        assert (await client.post(CHAT, json=HELLO | in_chat)).status == 200
        first, second = (submission.params.grammar for submission in api.generator.submissions)
        assert first == second != ""
        bad = {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": 5}}}}
        error = await refusal(client, {"input": "hello"} | bad)
        assert error["param"] == "text.format" and "`text.format`" in error["message"]

    with_client(api, body)


def test_an_answer_that_is_cut_off_is_incomplete(api):
    async def body(client):
        for found in (
            await create(client, {"input": "hello", "max_output_tokens": 4}),
            (await stream(client, {"input": "hello", "max_output_tokens": 4}))[-1]["response"],
        ):
            assert found["status"] == "incomplete"
            assert found["incomplete_details"] == {"reason": "max_output_tokens"}
            assert found["output"][0]["status"] == "incomplete"
            assert found["output"][0]["content"][0]["text"] == "the quick bro"

    with_client(api, body)


def test_a_stream_that_fails(api):
    api.generator.lose_after = 6

    async def body(client):
        last = (await stream(client, {"input": "hello"}))[-1]
        assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
        assert last["response"]["error"]["code"] == "server_error"
        assert "could not finish" in last["response"]["error"]["message"]
        (item,) = last["response"]["output"]
        assert item["status"] == "incomplete" and ANSWER.startswith(item["content"][0]["text"])
        answer = await client.post(PATH, json={"input": "hello"})
        assert answer.status == 500 and (await answer.json())["error"]["code"] == "engine_error"

    with_client(api, body)


def test_logprobs_are_those_of_the_text(model):
    api = agent_api(model, f"{THOUGHT}fox")
    asked = {"input": "hello", "include": [LOGPROBS, "reasoning.encrypted_content"], "top_logprobs": 2}

    async def body(client):
        for size in (1, 3, 400):
            api.generator.chunk_size = size
            message = (await create(client, asked))["output"][1]
            entries = message["content"][0]["logprobs"]
            events = merged(await stream(client, asked))
            assert [event["logprobs"] for event in events if "logprobs" in event] == [entries] * 2
            # What follows the end of the reasoning, and the token that ends the answer.
            assert "".join(entry["token"] for entry in entries).strip() == "fox<|im_end|>"
            assert len(entries[0]["top_logprobs"]) == 2

    with_client(api, body)


def test_the_client_hangs_up(api):
    api.generator.hang_after = 6

    async def body(client):
        answer = await client.post(PATH, json={"input": "hello", "stream": True})
        await answer.content.readuntil(b"delta")
        answer.close()
        await until(lambda: api.generator.streams[0].released)
        assert api.generator.running == api.generator.places == 0

    with_client(api, body)


def test_too_many_requests(api):
    api.generator.limit = 0

    async def body(client):
        for streamed in (False, True):
            answer = await client.post(PATH, json={"input": "hello", "stream": streamed})
            assert answer.status == 429 and answer.headers["Retry-After"] == "3"
            assert (await answer.json())["error"]["code"] == "rate_limit_exceeded"

    with_client(api, body)


@pytest.mark.parametrize(
    ("change", "param", "word"),
    [
        ({"store": True}, "store", "stores no responses"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "whole conversation"),
        ({"conversation": "conv_1"}, "conversation", "whole conversation"),
        ({"background": True}, "background", "foreground"),
        ({"prompt": {"id": "p"}}, "prompt", "instructions"),
        ({"truncation": "auto"}, "truncation", "Leave out"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "how long"),
        ({"tools": [{"type": "web_search"}]}, "tools", "'web_search'"),
        ({"tools": [WEATHER, {"type": "mcp", "server_url": "x"}]}, "tools", "`tools[1].type` is 'mcp'"),
        ({"tools": [{"type": "function"}]}, "tools", "name"),
        ({"tools": [{"type": "namespace", "name": "n"}]}, "tools", "`tools[0]` needs"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [1]}]}, "tools", "`tools[0].tools[0]`"),
        ({"tools": [WEATHER], "tool_choice": {"type": "file_search"}}, "tool_choice", "'file_search'"),
        ({"tools": [WEATHER], "tool_choice": "some"}, "tool_choice", "auto"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "`f`"),
        ({"tools": [WEATHER], "include": [LOGPROBS]}, "include", "tools"),
        ({"include": ["x"]}, "include", "`x`"),
        ({"top_logprobs": 1}, "top_logprobs", "include"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "json_object"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "schema"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort", "`reasoning.effort`"),
        ({"max_output_tokens": 0}, "max_output_tokens", "from 1"),
        ({"max_output_tokens": 100_000}, "input", "context length"),
        ({"temperature": 3}, "temperature", "from 0 to 2"),
        ({"metadata": {"k": 1}}, "metadata", "string"),
        ({"model": "other"}, "model", "`other`"),
        ({"input": []}, "input", "1 to "),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "stores no items"),
        ({"input": [{"type": "computer_call_output", "output": {"a": 1}}]}, "input[0].type", "computer_call_output"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "user, assistant"),
        ({"input": [{"type": "reasoning"}]}, "input", "no text"),
        ({"tools": [WEATHER | {"parameters": 5}]}, "tools", "`tools[0].parameters`"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice", "`tool_choice`"),
        ({"input": [{"role": "user"}]}, "input[0].content", "content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0]",
            "input_image",
        ),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "call_id"),
        (
            {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}]},
            "input[0].arguments",
            "JSON object",
        ),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id", "call_id"),
        (
            {"input": [{"type": "function_call_output", "call_id": "1", "output": {"a": 1}}]},
            "input[0].output",
            "string",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "1", "output": [{"type": "input_file"}]}]},
            "input[0].output[0]",
            "input_file",
        ),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0].encrypted_content", "cannot read"),
    ],
)
def test_refusals_name_the_field(model, change, param, word):
    api = make_api(model)

    async def body(client):
        error = await refusal(client, {"input": "hello"} | change)
        assert error["param"] == param and word in error["message"], error
        assert api.generator.submissions == []

    with_client(api, body)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")],
)
def test_stored_responses_are_refused(api, method, path):
    async def body(client):
        answer = await client.request(method, f"{PATH}/resp_1{path}")
        error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (404, "unsupported_url") and "stores no responses" in error[
            "message"
        ]

    with_client(api, body)


def test_what_asks_for_nothing_is_accepted(api):
    neutral = {
        "store": False, "background": False, "previous_response_id": None, "truncation": "disabled", "tools": [],
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "reasoning": {"effort": None, "summary": "auto"},
        "include": ["reasoning.encrypted_content"], "service_tier": "auto",
        "stream_options": {"include_obfuscation": False},
        "max_tool_calls": 3, "prompt_cache_key": "k", "safety_identifier": "s", "unknown": 1, "top_logprobs": 0,
        "stream": True,
    }  # fmt: skip

    async def body(client):
        done = (await stream(client, {"input": "hello"} | neutral))[-1]["response"]
        assert done["prompt_cache_key"] == "k" and done["max_tool_calls"] == 3

    with_client(api, body)

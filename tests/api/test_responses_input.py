"""From the items of a Responses request to the messages of a chat, its tools and its form."""

from __future__ import annotations

from typing import Any

import msgspec

from daemon.api.errors import ApiError
from daemon.api.request_body import decode_body
from daemon.api.responses.lowering import extra, renamed, to_chat
from daemon.api.responses.schema import ResponsesRequest
from daemon.api.schemas import ChatRequest
from tests.api.responses_client import WEATHER

_decoder = msgspec.json.Decoder(ResponsesRequest)


def chat(input: Any = "x", **rest: Any) -> ChatRequest:
    return to_chat(decode_body(msgspec.json.encode({"input": input} | rest), _decoder))


def messages(input: Any, **rest: Any) -> list[dict[str, Any]]:
    """Return the messages without members that are not set."""
    found = [msgspec.structs.asdict(message) for message in chat(input, **rest).messages]
    return [{k: v for k, v in message.items() if v not in (None, msgspec.UNSET)} for message in found]


def call(id: str, arguments: str = "{}") -> dict[str, Any]:
    return {"type": "function_call", "id": f"fc_{id}", "call_id": id, "name": "f", "arguments": arguments}


def output(id: str, text: Any = "r") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": id, "output": text}


def in_chat(id: str, arguments: str = "{}") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}}


def say(text: str, role: str = "assistant") -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    content = [{"type": kind, "text": text, "annotations": [], "logprobs": []}]
    return {"type": "message", "id": "msg_1", "status": "completed", "role": role, "content": content}


def think(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


USER = {"role": "user", "content": "q"}


def test_a_string():
    assert messages("hello") == [{"role": "user", "content": "hello"}]
    assert messages("hello", instructions="Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
    ]


def test_messages_of_all_forms():
    several = {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}]}
    refused = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    *rest, parts, refusal = messages([{"role": "developer", "content": "d"}, USER, several, refused])
    assert rest == [{"role": "developer", "content": "d"}, USER]
    assert [part.text for part in parts["content"]] == ["a", "b"]
    assert refusal == {"role": "assistant", "content": "no"}


def test_the_items_of_a_turn_are_one_message():
    items = [USER, think("hm"), say("I look."), call("1", '{"a": 1}'), call("2"), output("1", "one"), output("2", "")]
    assert messages(items) == [
        USER,
        {
            "role": "assistant",
            "reasoning": "hm",
            "content": "I look.",
            "tool_calls": [in_chat("1", '{"a": 1}'), in_chat("2")],
        },
        {"role": "tool", "content": "one", "tool_call_id": "1"},
        {"role": "tool", "content": "", "tool_call_id": "2"},
    ]


def test_reasoning_between_calls_and_after_the_last():
    items = [USER, think("a"), call("1"), think("b"), call("2"), output("1"), output("2"), think("c"), USER]
    found = messages(items)
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "tool", "assistant", "user"]
    assert found[1]["reasoning"] == "a\nb" and found[1]["tool_calls"] == [in_chat("1"), in_chat("2")]
    assert found[4] == {"role": "assistant", "reasoning": "c", "content": ""}


def test_two_answers_in_a_row_stay_two():
    assert [message["content"] for message in messages([say("a"), say("b"), call("1"), output("1")])[:2]] == [
        "a",
        "b",
    ]


def test_a_summary_counts_without_the_reasoning_itself():
    summary = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}], "encrypted_content": "x"}
    assert messages([USER, summary, say("a")])[1] == {"role": "assistant", "content": "a", "reasoning": "s"}
    both = summary | think("all") | {"summary": summary["summary"]}
    assert messages([USER, both, say("a")])[1]["reasoning"] == "all"


def test_an_output_of_parts():
    parts = [{"type": "input_text", "text": "one"}]
    assert messages([call("1"), output("1", parts)])[1]["content"] == "one"


def test_tools():
    asked = chat(tools=[WEATHER], tool_choice={"type": "function", "name": "get_weather"}, parallel_tool_calls=False)
    function = {name: WEATHER[name] for name in ("name", "description", "parameters")}
    assert asked.tools == [{"type": "function", "function": function}]
    assert asked.tool_choice == {"type": "function", "function": {"name": "get_weather"}}
    assert asked.parallel_tool_calls is False
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]}
    assert chat(tools=[WEATHER], tool_choice=allowed).tool_choice == {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "required",
            "tools": [{"type": "function", "function": {"name": "get_weather"}}],
        },
    }


SPACE = {"type": "namespace", "name": "space", "description": "d", "tools": [WEATHER]}


def test_functions_in_a_namespace():
    asked = {"input": "x", "tools": [WEATHER, SPACE, {"type": "web_search", "filters": None}]}
    found = chat(**asked).tools
    assert [tool["function"]["name"] for tool in found or ()] == ["get_weather", "space.get_weather"]
    told = msgspec.json.decode(extra(decode_body(msgspec.json.encode(asked), _decoder)))
    assert told["members"]["tools"] == [WEATHER, SPACE]
    assert told["namespaces"] == {"space.get_weather": ["space", "get_weather"]}
    (message,) = messages([call("1") | {"namespace": "space"}])
    assert message["tool_calls"][0]["function"]["name"] == "space.f"


def test_what_is_repeated_is_what_was_sent():
    schema = {"type": "object"}
    text_format = {"type": "json_schema", "name": "n", "schema": schema, "strict": True, "description": None}
    sent = {"text": {"format": text_format}, "tools": [WEATHER], "tool_choice": "required", "metadata": {"a": "b"}}
    request = decode_body(msgspec.json.encode({"input": "x"} | sent), _decoder)
    found = msgspec.json.decode(extra(request))["members"]
    assert found["text"]["format"] == text_format
    assert {name: found[name] for name in sent if name != "text"} == {k: v for k, v in sent.items() if k != "text"}


def test_errors_of_a_chat_have_the_names_of_this_api():
    error = ApiError(400, "`max_completion_tokens` and `messages`.", param="messages.[3].content")
    assert (renamed(error).message, error.param) == ("`max_output_tokens` and `input`.", "input")
    assert renamed(ApiError(400, "m", param="response_format.type")).param == "text.format.type"
    assert renamed(ApiError(400, "m", param="tools")).param == "tools"
    assert renamed(ApiError(400, "m")).param is None

"""Tools and reasoning in chats: prompts, whole and streamed answers, refusals, the official client's tool loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.api.parse.formats import PARSERS, write_calls
from daemon.models.chat_template import ChatTemplate
from tests.api.harness import CHAT, HELLO, ApiUnderTest, Model, make_api, stream, with_client
from tests.api.test_kept_streams import keep, resume
from tests.api.test_refusals import refused
from tests.api.test_sdk import with_sdk
from tests.models.tiny_model import EOS_ID

HERMES = (
    "{% if tools %}TOOLS{% for t in tools %} {{ t | tojson }}{% endfor %} <tool_call>\n{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function.name }}={{ c.function.arguments | tojson }}{% endfor %}{{ '\n' }}{% endfor %}"
)
THINK = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n{# </think> #}"
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no ' + m.role) }}"
    "{% endif %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city. hi<|im_end|>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ASK = HELLO | {"tools": [WEATHER, CLOCK]}
CALLS = [("get_weather", '{"city": "Köln"}'), ("clock", "{}")]


def api_with(model: Model, path: Path, template: str, **options: Any) -> ApiUnderTest:
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return roomy(make_api(Model(model.model_config, model.tokenizer, ChatTemplate(path)), **options))


def roomy(api: ApiUnderTest) -> ApiUnderTest:
    """Let prompts with tools fit."""
    api.generator.max_model_len = 8192
    return api


def say(api: ApiUnderTest, text: str) -> None:
    tokens = [*api.model.tokenizer.encode(text, False), EOS_ID]
    api.generator.reply = lambda prompt, params: tokens


def prompt_of(api: ApiUnderTest) -> str:
    return api.model.tokenizer.detokenizer(continuing=True, skip_special=False).push(
        api.generator.submissions[-1].prompt
    )


@pytest.fixture
def hermes(model: Model, tmp_path: Path) -> ApiUnderTest:
    return api_with(model, tmp_path, HERMES)


def put_together(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the message that streamed chunks of one choice make, and how it has ended."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            assert set(delta) <= {"role", "content", "reasoning", "reasoning_content", "tool_calls"}
            for name in ("content", "reasoning_content"):
                message[name] += delta.get(name) or ""
            for piece in delta.get("tool_calls", []):
                if piece["index"] == len(message["tool_calls"]):
                    assert set(piece) == {"index", "id", "type", "function"} and piece["function"]["arguments"] == ""
                    message["tool_calls"].append(
                        json.loads(json.dumps({k: piece[k] for k in ("id", "type", "function")}))
                    )
                else:
                    assert set(piece) == {"index", "function"} and set(piece["function"]) == {"arguments"}
                    assert piece["index"] == len(message["tool_calls"]) - 1
                    message["tool_calls"][-1]["function"]["arguments"] += piece["function"]["arguments"]
            message["finish_reason"] = choice["finish_reason"] or message.get("finish_reason")
    return message


@pytest.mark.parametrize("tool_format", list(PARSERS))
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_calls_streamed_and_whole(model: Model, tmp_path: Path, tool_format: str, chunk_size: int):
    api = api_with(model, tmp_path, HERMES, tool_format=tool_format)
    api.generator.chunk_size = chunk_size
    say(api, write_calls(tool_format, CALLS))

    async def body(client: Any) -> None:
        whole = await (await client.post(CHAT, json=ASK)).json()
        choice = whole["choices"][0]
        message = choice["message"]
        assert (message["content"], choice["finish_reason"]) == (None, "tool_calls")
        assert [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]] == CALLS
        assert all(call["type"] == "function" for call in message["tool_calls"])
        assert len({call["id"] for call in message["tool_calls"]}) == 2
        found = put_together(await stream(client, CHAT, ASK))
        assert [(c["function"]["name"], c["function"]["arguments"]) for c in found["tool_calls"]] == CALLS
        assert (found["content"], found["finish_reason"]) == ("", "tool_calls")

    with_client(api, body)


def test_text_before_a_call_and_a_call_that_is_cut(hermes: ApiUnderTest):
    text = 'I look.\n<tool_call>{"name": "clock", "arguments": {"zone": "UTC'
    say(hermes, text)
    cut = len(hermes.model.tokenizer.encode(text, False)) - 2

    async def body(client: Any) -> None:
        for request in (ASK | {"max_tokens": 200}, ASK | {"max_tokens": cut}):
            found = put_together(await stream(client, CHAT, request))
            choice = (await (await client.post(CHAT, json=request)).json())["choices"][0]
            assert choice["message"]["content"] == found["content"] == "I look."
            assert choice["message"]["tool_calls"][0]["function"] == found["tool_calls"][0]["function"]
            assert choice["finish_reason"] == found["finish_reason"]
        assert found["finish_reason"] == "length" and '{"zone": "UTC'.startswith(
            found["tool_calls"][0]["function"]["arguments"]
        )

    with_client(hermes, body)


def test_without_tools_the_text_stays(hermes: ApiUnderTest):
    text = write_calls("hermes", CALLS)
    say(hermes, text)

    async def body(client: Any) -> None:
        for fields in ({}, {"tools": []}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": [WEATHER]}):
            choice = (await (await client.post(CHAT, json=HELLO | fields)).json())["choices"][0]
            found = put_together(await stream(client, CHAT, HELLO | fields))
            if fields == {"tools": [WEATHER]}:  # a tool that the request has not is no call
                assert choice["finish_reason"] == "tool_calls" and len(choice["message"]["tool_calls"]) == 1
                assert '"clock"' in choice["message"]["content"]
            else:
                assert choice["message"]["content"] == found["content"] == text
                assert choice["finish_reason"] == found["finish_reason"] == "stop"
                assert "tool_calls" not in choice["message"] and "TOOLS" not in prompt_of(hermes)

    with_client(hermes, body)


def test_at_most_one_call_unless_they_may_be_parallel(hermes: ApiUnderTest):
    say(hermes, write_calls("hermes", CALLS))

    async def body(client: Any) -> None:
        answer = await (await client.post(CHAT, json=ASK | {"parallel_tool_calls": False})).json()
        assert [c["function"]["name"] for c in answer["choices"][0]["message"]["tool_calls"]] == ["get_weather"]

    with_client(hermes, body)


def test_the_template_gets_tools_calls_and_results(hermes: ApiUnderTest):
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": 1}'}}
    messages = [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]

    async def body(client: Any) -> None:
        assert (await client.post(CHAT, json=ASK | {"messages": messages})).status == 200
        prompt = prompt_of(hermes)
        assert prompt.startswith("TOOLS " + json.dumps(WEATHER, ensure_ascii=False) + " " + json.dumps(CLOCK))
        assert prompt.endswith('user:time?\nassistant:<tool_call>clock={"zone": 1}\ntool:noon\n')
        counted = await (await client.post("/tokenize", json=ASK | {"messages": messages})).json()
        assert counted["tokens"] == hermes.generator.submissions[0].prompt
        assert 2 not in counted["tokens"]  # the control token in a description is text

    with_client(hermes, body)


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
@pytest.mark.parametrize("takes_system", [True, False])
def test_a_message_describes_the_tools_if_the_template_takes_none(
    model: Model, tmp_path: Path, system: list[Any], takes_system: bool
):
    api = roomy(make_api(model)) if takes_system else api_with(model, tmp_path, NO_SYSTEM)
    say(api, json.dumps({"name": "clock", "arguments": {}}))
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        *system,
        {"role": "user", "content": [{"type": "text", "text": "time?"}]},
        {"role": "assistant", "content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]

    async def body(client: Any) -> None:
        answer = await client.post(CHAT, json={"messages": messages, "tools": [WEATHER, CLOCK]})
        assert (await answer.json())["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "clock"
        prompt = prompt_of(api)
        for text in (*(m["content"] for m in system), json.dumps(WEATHER["function"]), json.dumps(CLOCK["function"])):
            assert prompt.count(text) == 1
        order = ["You can call functions", "time?", 'Hm.\n\n{"name": "clock", "arguments": {}}']
        order.append(
            "user\nResult of the function clock:\n\nnoon"
            if takes_system
            else "user:Result of the function clock:\n\nnoon"
        )
        assert [prompt.find(text) for text in order] == sorted(prompt.find(text) for text in order) and prompt.find(
            order[0]
        ) >= 0
        assert all(text in prompt for text in order)
        assert ("system" in prompt) == takes_system

    with_client(api, body)


BAD = [
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "description": 1}}]}, "tools"),
    ({"tools": [CLOCK] * 513}, "tools"),
    ({"tools": [CLOCK], "tool_choice": "maybe"}, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "tool"}}, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [1]}}}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
]


def test_bad_tools_are_refused(hermes: ApiUnderTest):
    async def body(client: Any) -> None:
        for fields, param in BAD:
            error = await refused(client, CHAT, HELLO | fields)
            assert error["param"] == param, (fields, error)

    with_client(hermes, body)


@pytest.mark.parametrize(
    ("template", "options", "word"),
    [(HERMES, {"tool_format": "none"}, "tool_format is none"), (HERMES + "<function=x>", {}, "can set tool_format")],
)
def test_tools_are_refused_if_calls_cannot_be_read(
    model: Model, tmp_path: Path, template: str, options: dict[str, Any], word: str
):
    async def body(client: Any) -> None:
        for path in (CHAT, "/tokenize"):
            error = await refused(client, path, ASK)
            assert (error["param"], error["code"]) == ("tools", "unsupported_parameter") and word in error["message"]
        assert (await client.post(CHAT, json=ASK | {"tool_choice": "none"})).status == 200

    with_client(api_with(model, tmp_path, template, **options), body)


def test_allowed_tools(hermes: ApiUnderTest):
    say(hermes, write_calls("hermes", CALLS))
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "clock"}}]}

    async def body(client: Any) -> None:
        choice = {"type": "allowed_tools", "allowed_tools": allowed}
        message = (await (await client.post(CHAT, json=ASK | {"tool_choice": choice})).json())["choices"][0][
            "message"
        ]
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["clock"]
        assert "get_weather" in prompt_of(hermes)  # the model knows all of them

    with_client(hermes, body)


# -- reasoning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
@pytest.mark.parametrize("begun", [True, False])
def test_reasoning_is_apart(model: Model, tmp_path: Path, chunk_size: int, begun: bool):
    api = api_with(model, tmp_path, THINK if begun else HERMES + "{# <think> #}")
    api.generator.chunk_size = chunk_size
    say(api, ("" if begun else "<think>\n") + "hm, so\n</think>\n\nHello!")
    tokens = api.model.tokenizer.encode(("" if begun else "<think>\n") + "hm, so\n</think>", False)

    async def body(client: Any) -> None:
        whole = await (await client.post(CHAT, json=HELLO)).json()
        message = whole["choices"][0]["message"]
        assert (message["reasoning_content"], message["reasoning"], message["content"]) == (
            "hm, so",
            "hm, so",
            "Hello!",
        )
        reasoned = whole["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert abs(reasoned - len(tokens)) <= 1  # a token may reach over the end of the marker
        chunks = await stream(client, CHAT, HELLO | {"stream_options": {"include_usage": True}})
        found = put_together(chunks)
        assert (found["reasoning_content"], found["content"]) == ("hm, so", "Hello!")
        assert chunks[-1]["usage"] == whole["usage"]
        hidden = HELLO | {"include_reasoning": False}
        message = (await (await client.post(CHAT, json=hidden)).json())["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "Hello!", "refusal": None}
        assert put_together(await stream(client, CHAT, hidden))["reasoning_content"] == ""

    with_client(api, body)


def test_reasoning_stays_in_the_text_if_the_option_says_so(model: Model, tmp_path: Path):
    api = api_with(model, tmp_path, THINK, reasoning_format="none")
    say(api, "hm</think>Hello")

    async def body(client: Any) -> None:
        whole = await (await client.post(CHAT, json=HELLO)).json()
        assert whole["choices"][0]["message"]["content"] == "hm</think>Hello"
        assert "completion_tokens_details" not in whole["usage"]

    with_client(api, body)


def test_logprobs_of_calls_and_reasoning(model: Model, tmp_path: Path):
    api = api_with(model, tmp_path, HERMES + "{# <think> #}")
    say(api, "<think>hm</think>" + write_calls("hermes", CALLS))

    async def body(client: Any) -> None:
        request = ASK | {"logprobs": True}
        whole = await (await client.post(CHAT, json=request)).json()
        chunks = await stream(client, CHAT, request)
        entries = [e for c in chunks for e in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
        assert entries == whole["choices"][0]["logprobs"]["content"]
        assert len(entries) == whole["usage"]["completion_tokens"]

    with_client(api, body)


# -- what outlives a reader -----------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(list(PARSERS)), st.sampled_from([1, 3, 11, 100]), st.booleans(), st.data())
def test_a_kept_stream_of_calls_goes_on_after_any_event(
    tmp_path_factory: pytest.TempPathFactory, model: Model, tool_format: str, chunk_size: int, think: bool, data: Any
):
    api = api_with(model, tmp_path_factory.mktemp("kept"), HERMES + "{# <think> #}", tool_format=tool_format)
    api.generator.chunk_size = chunk_size
    say(api, ("<think> one moment </think>\n" if think else "") + write_calls(tool_format, CALLS))

    async def run(client: Any) -> None:
        events = await keep(client, CHAT, ASK | {"stream": True})
        expected = put_together([event for _, event in events if event])
        assert len(expected["tool_calls"]) == 2
        ids = [id for id, event in events if event]
        assert len(set(ids)) == len(ids)
        stream_id = events[0][1]["id"]
        for i in data.draw(st.sets(st.integers(0, len(ids) - 1), max_size=6)):
            rest = await resume(client, stream_id, ids[i])
            assert put_together([event for _, event in events[: i + 1] + rest if event]) == expected, ids[i]

    with_client(api, run)


# -- the official client --------------------------------------------------------------------------------


def test_the_tool_loop_of_the_official_client(hermes: ApiUnderTest):
    replies = [write_calls("hermes", [("get_weather", '{"city": "Köln"}')]), "It rains."]

    def reply(prompt: list[int], params: Any) -> list[int]:
        text = replies[1] if "tool:rain" in hermes.model.tokenizer.decode(prompt) else replies[0]
        return [*hermes.model.tokenizer.encode(text, False), EOS_ID]

    hermes.generator.reply = reply

    async def body(sdk: Any) -> None:
        ask = {"model": "tiny", "tools": [WEATHER, CLOCK]}
        for streamed in (False, True):
            messages: list[Any] = [{"role": "user", "content": "weather?"}]
            for _ in range(2):
                if streamed:
                    async with sdk.chat.completions.stream(messages=messages, **ask) as s:
                        answer = await s.get_final_completion()
                else:
                    answer = await sdk.chat.completions.create(messages=messages, **ask)
                message = answer.choices[0].message
                messages.append(message.model_dump(exclude_none=True, exclude={"parsed"}))
                for call in message.tool_calls or []:
                    assert json.loads(call.function.arguments) == {"city": "Köln"}
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": "rain"})
            assert (message.content, answer.choices[0].finish_reason) == ("It rains.", "stop")

    with_sdk(hermes, body)

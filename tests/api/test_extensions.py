"""Fields that vLLM adds to OpenAI's API: length, echo, names of tokens, the chat template's variables, usage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from daemon.models.chat_template import ChatTemplate
from tests.api.harness import ANSWER, CHAT, HELLO, TEXT, Model, make_api, stream, with_client
from tests.api.test_refusals import refused

THINKING = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}({{ m.reasoning_content }})\n{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<quiet>{% endif %}{{ reasoning_effort }}"
)


@pytest.fixture
def thinking(model: Model, tmp_path: Path):
    """An application whose chat template reads `enable_thinking`, `reasoning_effort` and `reasoning_content`."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": THINKING}))
    return make_api(Model(model.model_config, model.tokenizer, ChatTemplate(tmp_path)))


@pytest.mark.parametrize(
    ("path", "request_body", "maximum"),
    [
        (TEXT, {"prompt": "x", "min_tokens": 40}, 40),
        (TEXT, {"prompt": "x", "min_tokens": 7}, 16),
        (TEXT, {"prompt": "x", "min_tokens": 7, "max_tokens": 7}, 7),
        (CHAT, HELLO | {"min_tokens": 60}, 60),
    ],
)
def test_min_tokens_goes_over_the_default_maximum(model, path, request_body, maximum):
    api = make_api(model, max_output_tokens=50)

    async def body(client):
        assert (await client.post(path, json=request_body)).status == 200
        params = api.generator.submissions[0].params
        assert (params.max_tokens, params.min_tokens) == (maximum, request_body["min_tokens"])

    with_client(api, body)


def test_min_tokens_above_the_maximum_or_the_context_is_refused(api):
    async def body(client):
        for fields in (
            {"max_tokens": 5},
            {"max_completion_tokens": 5},
            {"max_tokens": 50, "max_completion_tokens": 5},
        ):
            error = await refused(client, CHAT, HELLO | {"min_tokens": 6} | fields)
            assert error["param"] == "min_tokens" and "maximum of output tokens, 5" in error["message"]
        for path, request in ((CHAT, HELLO), (TEXT, {"prompt": "x"})):
            error = await refused(client, path, request | {"min_tokens": 256})
            assert error["code"] == "context_length_exceeded" and "256 for the output" in error["message"]

    with_client(api, body)


@pytest.mark.parametrize(("role", "prefix"), [("assistant", "Once \nupon "), ("user", "")])
def test_echo_of_a_chat_repeats_the_last_message_of_the_assistant(api, role, prefix):
    parts = [{"type": "text", "text": "Once "}, {"type": "text", "text": "upon "}]
    request = {"messages": [*HELLO["messages"], {"role": role, "content": parts}], "echo": True}

    async def body(client):
        whole = await (await client.post(CHAT, json=request)).json()
        assert whole["choices"][0]["message"]["content"] == prefix + ANSWER
        deltas = [c["choices"][0]["delta"] for c in await stream(client, CHAT, request)]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(d.get("content", "") for d in deltas) == prefix + ANSWER
        assert (await refused(client, CHAT, request | {"logprobs": True}))["param"] == "echo"

    with_client(api, body)


def test_tokens_of_logprobs_are_named_by_their_ids(api):
    async def body(client):
        named = {"return_tokens_as_token_ids": True, "max_tokens": 3}
        request = HELLO | named | {"logprobs": True, "top_logprobs": 2}
        entries = (await (await client.post(CHAT, json=request)).json())["choices"][0]["logprobs"]["content"]
        tokens = api.generator.streams[0]._tokens[:3]
        assert [e["token"] for e in entries] == [f"token_id:{t}" for t in tokens]
        assert [t["token"] for t in entries[0]["top_logprobs"]] == ["token_id:10", "token_id:11"]
        assert bytes(entries[0]["bytes"]) == api.model.tokenizer.token_bytes(tokens[0])
        answer = await (await client.post(TEXT, json={"prompt": "x", "logprobs": 1} | named)).json()
        found = answer["choices"][0]["logprobs"]
        assert found["tokens"] == [f"token_id:{t}" for t in tokens]
        assert set(found["top_logprobs"][0]) == {"token_id:10", f"token_id:{tokens[0]}"}
        texts = [api.model.tokenizer.token_text(t) for t in tokens]
        assert found["text_offset"] == [0, len(texts[0]), len(texts[0] + texts[1])]

    with_client(api, body)


@pytest.mark.parametrize(
    ("fields", "tail"),
    [
        ({}, ""),
        ({"reasoning_effort": "high"}, "high"),
        ({"reasoning_effort": "none"}, "<quiet>none"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "<quiet>"),
        ({"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"}, "none"),
    ],
)
def test_the_chat_template_gets_its_variables(thinking, fields, tail):
    messages = [
        {"role": "user", "content": "a", "reasoning": ""},
        {"role": "assistant", "content": "b", "reasoning": "why"},
        {"role": "assistant", "content": "c", "reasoning_content": "how"},
    ]
    expected = thinking.model.tokenizer.encode(f"user:a()\nassistant:b(why)\nassistant:c(how)\n{tail}", False)

    async def body(client):
        assert (await client.post(CHAT, json={"messages": messages} | fields)).status == 200
        assert thinking.generator.submissions[0].prompt == expected
        counted = await (await client.post("/tokenize", json={"messages": messages} | fields)).json()
        assert counted["tokens"] == expected

    with_client(thinking, body)


def test_variables_that_the_chat_template_does_not_read_have_no_effect(thinking):
    async def body(client):
        for path in (CHAT, "/tokenize"):
            for name in ("thinking", "m", "some_new_switch"):
                extra = {"chat_template_kwargs": {name: 1}}
                assert (await client.post(path, json=HELLO | extra)).status == 200
            shown = [await client.post("/tokenize", json=HELLO | more) for more in ({}, extra)]
            assert await shown[0].json() == await shown[1].json()

    with_client(thinking, body)


def test_variables_that_the_server_sets_are_refused(thinking):
    async def body(client):
        for path in (CHAT, "/tokenize"):
            for name in ("messages", "tools", "add_generation_prompt", "range", "bos_token", "self"):
                error = await refused(client, path, HELLO | {"chat_template_kwargs": {name: 1}})
                assert error["param"] == "chat_template_kwargs" and f"`{name}`" in error["message"]
                off = {"chat_template_kwargs": {name: False}}  # asks for nothing
                assert (await client.post(path, json=HELLO | off)).status == 200
            error = await refused(client, path, HELLO | {"reasoning_effort": "lots"})
            assert error["param"] == "reasoning_effort" and "minimal" in error["message"]

    with_client(thinking, body)


def test_tokenize_refuses_what_a_chat_refuses(api):
    async def body(client):
        for fields in (
            {"chat_template": "{{ 1 }}"},
            {"tools": [{"type": "function"}]},
            {"documents": [{"a": "b"}]},
        ):
            for path in (CHAT, "/tokenize"):
                assert (await refused(client, path, HELLO | fields))["param"] == next(iter(fields))
        off = HELLO | {"tools": [{"type": "function"}], "tool_choice": "none"}
        counted = await (await client.post("/tokenize", json=off)).json()
        assert (await client.post(CHAT, json=off)).status == 200
        assert api.generator.submissions[0].prompt == counted["tokens"]

    with_client(api, body)


def test_parts_of_messages_that_would_be_lost_are_refused(api):
    async def body(client):
        for field, value in (("refusal", "No."), ("function_call", {"name": "f"}), ("audio", {"id": "x"})):
            message = {"role": "assistant", "content": "a", field: value}
            for path in (CHAT, "/tokenize"):
                error = await refused(client, path, {"messages": [*HELLO["messages"], message]})
                assert error["param"] == f"messages.[1].{field}"
            message[field] = None
            assert (await client.post(CHAT, json={"messages": [message]})).status == 200

    with_client(api, body)


@pytest.mark.parametrize(
    ("path", "request_body"),
    [
        (CHAT, HELLO | {"n": 2}),
        (CHAT, {"messages": [{"role": "assistant", "content": "Well, "}], "echo": True}),
        (TEXT, {"prompt": "say: ", "echo": True}),
    ],
)
def test_every_event_has_the_usage_so_far(api, path, request_body):
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}

    async def body(client):
        chunks = await stream(client, path, request_body | options)
        counts = [c["usage"]["completion_tokens"] for c in chunks]
        assert counts == sorted(counts) and counts[0] == 0
        output = sum(len(s._tokens) for s in api.generator.streams)
        assert counts[-1] == counts[-2] == output
        prompt = len(api.generator.submissions[0].prompt)
        assert {c["usage"]["prompt_tokens"] for c in chunks} == {prompt}
        error = await refused(
            client, path, request_body | {"stream": True} | {"stream_options": {"continuous_usage_stats": True}}
        )
        assert error["param"] == "stream_options"

    with_client(api, body)

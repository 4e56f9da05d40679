"""The limits that options set, and what a client is told at each."""

from __future__ import annotations

import pytest

from tests.api.harness import CHAT, HELLO, TEXT, make_api, with_client

TOOL = {"type": "function", "function": {"name": "f"}}
SAID = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("options", "path", "request_body", "param", "message"),
    [
        ({"max_messages": 2}, CHAT, {"messages": [SAID] * 3}, "messages", "`messages` must have at most 2 items."),
        ({"max_messages": 2}, "/tokenize", {"messages": [SAID] * 3}, "messages", "at most 2 items"),
        ({"max_stops": 1}, CHAT, HELLO | {"stop": ["a", "b"]}, "stop", "`stop` must have at most 1 items."),
        ({"max_logit_bias": 1}, CHAT, HELLO | {"logit_bias": {"1": 1, "2": 1}}, "logit_bias", "at most 1 entries"),
        ({"max_logprobs": 3}, CHAT, HELLO | {"logprobs": True, "top_logprobs": 4}, "top_logprobs", "0 to 3, got 4"),
        ({"max_logprobs": 3}, TEXT, {"prompt": "x", "logprobs": 4}, "logprobs", "from 0 to 3, got 4."),
        ({"max_requested_tokens": 9}, TEXT, {"prompt": "x", "max_tokens": 10}, "max_tokens", "at most 9, got 10"),
        ({"max_requested_tokens": 9}, CHAT, HELLO | {"max_completion_tokens": 10}, "max_completion_tokens", "got 10"),
        ({"max_prompt_tokens": 3}, TEXT, {"prompt": [5] * 4}, "prompt", "accepts at most 3"),
        ({"max_tools": 1}, CHAT, HELLO | {"tools": [TOOL] * 2}, "tools", "`tools` must have at most 1 items."),
        ({"max_tools": 1}, "/tokenize", HELLO | {"tools": [TOOL] * 2}, "tools", "at most 1 items"),
        ({"max_choices": 2}, CHAT, HELLO | {"n": 3}, "n", "`n` must be from 1 to 2."),
    ],
)
def test_a_limit(model, options, path, request_body, param, message):
    async def body(client):
        response = await client.post(path, json=request_body)
        error = (await response.json())["error"]
        assert (response.status, error["param"]) == (400, param) and message in error["message"]

    api = make_api(model, **options)
    with_client(api, body)
    assert not api.generator.submissions


def test_what_is_at_the_limit_is_served(model):
    options = {"max_messages": 2, "max_stops": 2, "max_logit_bias": 1, "max_logprobs": 3, "max_requested_tokens": 9}
    fields = {"stop": ["x", "y"], "logit_bias": {"1": 1}, "logprobs": True, "top_logprobs": 3, "max_tokens": 9}

    async def body(client):
        response = await client.post(CHAT, json={"messages": [SAID] * 2} | fields)
        assert response.status == 200, await response.text()

    with_client(make_api(model, **options), body)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_waits_too_long_for_its_first_token_gets_429(model, stream):
    api = make_api(model, queue_timeout=0.2)
    api.generator.hang_after = 0

    async def body(client):
        for n in (1, 2):
            response = await client.post(TEXT, json={"prompt": "x", "stream": stream, "n": n})
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (429, "rate_limit_exceeded") and "in time" in error["message"]
            assert response.headers["Retry-After"] == "2"
        assert api.generator.running == 0 and all(s.released for s in api.generator.streams)

    with_client(api, body)


def test_the_wait_ends_with_the_first_token(model):
    api = make_api(model, queue_timeout=0.2)
    api.generator.delay, api.generator.chunk_size = 0.15, 20

    async def body(client):
        response = await client.post(TEXT, json={"prompt": "x", "max_tokens": 60})
        assert response.status == 200 and len(api.generator.streams) == 1

    with_client(api, body)

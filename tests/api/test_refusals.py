"""Refused requests: status, code and message, and API keys."""

from __future__ import annotations

import asyncio
import gzip
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.harness import CHAT, HELLO, TEXT, make_api, model_of, with_client
from tests.models.test_text_files import add_token
from tests.models.tiny_model import make_tiny_llama


async def refused(client, path: str, body: dict, status: int = 400) -> dict:
    response = await client.post(path, json=body)
    error = (await response.json())["error"]
    assert (response.status, set(error)) == (status, {"message", "type", "param", "code"}), error
    return error


BAD_CHAT = [
    ("temperature", 2.1), ("temperature", -1), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.01),
    ("min_p", -0.1), ("top_k", -2), ("presence_penalty", 2.5), ("frequency_penalty", -3),
    ("repetition_penalty", 0), ("repetition_penalty", 1e-46), ("n", 0), ("n", 9), ("n", 10**12), ("max_tokens", 0),
    ("max_tokens", 1.5), ("max_completion_tokens", -1), ("min_tokens", -1), ("seed", 2**63),
    ("seed", "x"), ("stop", ""), ("stop", ["a"] * 17), ("stop", ["a", ""]), ("stop", [1]),
    ("stop", "x" * 1025), ("stop_token_ids", [384]), ("stop_token_ids", [-1]),
    ("stop_token_ids", [1] * 65), ("logit_bias", {"384": 1}), ("logit_bias", {"-1": 1}),
    ("logit_bias", {"x": 1}), ("logit_bias", {"1": 101}), ("logit_bias", {"٣": 1}),
    ("top_logprobs", 1), ("top_logprobs", 21), ("priority", "urgent"), ("priority", 101),
    ("stream_options", {"include_usage": True}), ("cache_salt", "x" * 257), ("messages", []),
    ("messages", "hi"), ("tools", [{"type": "function"}]), ("tool_choice", "required"),
    ("functions", [{}]), ("best_of", 2), ("response_format", {"type": "xml"}),
    ("modalities", ["text", "audio"]), ("audio", {"voice": "x"}), ("guided_json", {"type": "nothing"}),
    ("structured_outputs", {"regex": "("}), ("prompt_logprobs", 0.5), ("chat_template", "{{ 1 }}"),
    ("chat_template_kwargs", {"messages": [1]}), ("web_search_options", {"a": 1}),
]  # fmt: skip


def test_refusal_of_a_bad_value_names_its_field(api):
    async def body(client):
        for field, value in BAD_CHAT:
            error = await refused(client, CHAT, HELLO | {field: value})
            assert error["param"] == field, (field, value, error)
            assert field in error["message"]
        for field, value in [
            ("suffix", "x"),
            ("logprobs", 21),
            ("logprobs", True),
            ("prompt", []),
            ("prompt", [1, "a"]),
            ("prompt", [[1], "a"]),
            ("prompt", [[]]),
            ("prompt", [400]),
            ("prompt", [-1]),
            ("prompt", [True]),
            ("prompt", ""),
            ("prompt", None),
            ("prompt", ["a"] * 600),
        ]:
            error = await refused(client, TEXT, {"prompt": "x"} | {field: value})
            assert error["param"] == field, (field, value, error)
        assert (await refused(client, TEXT, {}))["param"] == "prompt"
        assert (await refused(client, CHAT, {}))["param"] == "messages"

    with_client(api, body)
    assert api.generator.submissions == [] and api.generator.places == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", 2.5, "`temperature` must be from 0 to 2, got 2.5."),
        ("top_p", 0, "`top_p` must be above 0 and at most 1, got 0."),
        ("n", 0, "`n` must be at least 1, got 0."),
        ("n", 9, "`n` must be from 1 to 8."),
        ("max_tokens", 1.5, "`max_tokens` must be a whole number or null, got 1.5."),
        ("priority", 10**30, f"`priority` must be from -100 to 100, got {10**30}."),
        ("priority", "urgent", "`priority` must be high, normal, low or a whole number from -100 to 100."),
        ("stop", ["a", ""], "`stop[1]` must have 1 to 1024 characters."),
        ("stop", ["a"] * 17, "`stop` must have at most 16 items."),
        ("logit_bias", {"1": 101}, "A value of `logit_bias` must be from -100 to 100."),
        ("stop_token_ids", [384], "`stop_token_ids` must hold token ids from 0 to 383."),
        ("messages", None, "`messages` must be a list, got null."),
        ("messages", [{}], "`role` is required in `messages[0]`."),
    ],
)
def test_refusal_names_the_value_and_the_allowed_range(api, field, value, message):
    async def body(client):
        assert (await refused(client, CHAT, HELLO | {field: value}))["message"] == message

    with_client(api, body)


def test_neutral_values_of_refused_fields_are_accepted(api):
    neutral = {
        "tools": [], "tool_choice": "auto", "response_format": {"type": "text"},
        "modalities": ["text"], "audio": None, "best_of": 1, "functions": [], "guided_json": None,
        "use_beam_search": False, "chat_template_kwargs": {}, "user": "u", "store": True,
        "metadata": {"a": "b"}, "service_tier": "auto", "reasoning_effort": "low", "temperature": None,
        "stream": None, "stop": None, "logit_bias": None, "n": None, "seed": None,
    }  # fmt: skip

    async def body(client):
        assert (await client.post(CHAT, json=HELLO | neutral)).status == 200
        tools = {"tools": [{"type": "function"}], "tool_choice": "none"}
        assert (await client.post(CHAT, json=HELLO | tools)).status == 200
        assert (await client.post(TEXT, json={"prompt": "x", "suffix": ""})).status == 200

    with_client(api, body)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "wizard", "content": "x"}, "messages.[1].role"),
        ({"role": "user"}, "messages.[1].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.[1].content.[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.[1].content.[0]"),
    ],
)
def test_unsupported_messages_are_refused(api, message, param):
    async def body(client):
        both = {"messages": HELLO["messages"] + [message]}
        assert (await refused(client, CHAT, both))["param"] == param
        assert (await refused(client, "/tokenize", both))["param"] == param

    with_client(api, body)


def test_model_without_chat_template(api, monkeypatch):
    monkeypatch.setattr(api.model.chat, "available", False)

    async def body(client):
        assert "chat template" in (await refused(client, CHAT, HELLO))["message"]

    with_client(api, body)


def test_context_length(model):
    api = make_api(model, max_prompt_tokens=40)

    async def body(client):
        for request in ({"prompt": [5] * 20, "max_tokens": 237}, {"prompt": [5] * 256}, {"prompt": [5] * 41}):
            error = await refused(client, TEXT, request)
            assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        assert (await client.post(TEXT, json={"prompt": [5] * 20, "max_tokens": 236})).status == 200
        error = await refused(client, CHAT, HELLO | {"max_completion_tokens": 2**31 - 1})
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")

    with_client(api, body)
    assert api.counter("admission_rejections", "too_long") == 4


def test_refusal_of_a_wrong_model_names_the_served_one(api):
    async def body(client):
        for path, request in ((CHAT, HELLO), (TEXT, {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
            error = await refused(client, path, request | {"model": "gpt-x"}, 404)
            assert error["code"] == "model_not_found" and "`tiny`" in error["message"]
            assert (await client.post(path, json=request | {"model": "tiny"})).status == 200
        listed = await (await client.get("/v1/models")).json()
        assert [(m["id"], m["max_model_len"]) for m in listed["data"]] == [("tiny", 256)]
        assert (await (await client.get("/v1/models/tiny")).json())["id"] == "tiny"
        assert (await client.get("/v1/models/meta/other")).status == 404

    with_client(api, body)


def test_unknown_paths_and_methods_get_the_official_error_body(api):
    async def body(client):
        for method, path, status in (
            ("POST", "/v1/embeddings", 404), ("GET", "/", 404), ("GET", CHAT, 405), ("POST", "/v1/models", 405),
            ("DELETE", "/health", 405), ("OPTIONS", CHAT, 405),
        ):  # fmt: skip
            response = await client.request(method, path)
            assert response.status == status
            assert set((await response.json())["error"]) == {"message", "type", "param", "code"}
            assert status != 405 or response.headers["Allow"]

    with_client(api, body)


def test_health_and_readiness_differ(api):
    async def body(client):
        assert (await client.get("/health/ready")).status == 200
        api.generator.ready = False
        assert (await client.get("/health/ready")).status == 503
        assert (await client.get("/health")).status == 200

    with_client(api, body)


def test_unsupported_bodies_are_refused(model):
    api = make_api(model, max_body=2048)

    async def chunked(size):
        for _ in range(size // 1024):
            yield b" " * 1024

    async def body(client):
        json_type = {"Content-Type": "application/json"}
        big = json.dumps(HELLO).encode() + b" " * 2048
        packed = gzip.compress(json.dumps(HELLO).encode())
        for data, headers, status in (
            (big, json_type, 413),
            (chunked(4096), json_type, 413),
            (json.dumps(HELLO), {"Content-Type": "text/plain"}, 415),
            (packed, json_type | {"Content-Encoding": "gzip"}, 415),
        ):
            response = await client.post(CHAT, data=data, headers=headers)
            assert response.status == status
            assert (await response.json())["error"]["type"] == "invalid_request_error"

    with_client(api, body)


def test_large_body_is_refused_from_its_header(model):
    api = make_api(model, max_body=2048, keys=["k"])

    async def body(client):
        reader, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n".encode())
        assert b" 413 " in await reader.readline()
        assert b"connection: close" in (await reader.readuntil(b"\r\n\r\n")).lower()
        writer.close()

    with_client(api, body)


def test_valid_request_id_is_returned(api):
    async def body(client):
        for request_id, valid in (("abc-1.2:3", True), ("a b", False), ("x" * 129, False), ("", False)):
            response = await client.post(CHAT, json=HELLO | {"stream": True}, headers={"x-request-id": request_id})
            returned = response.headers["x-request-id"]
            assert (returned == request_id) is valid and returned
            await response.read()
            # Operators find the request by either id.
            submitted = api.generator.submissions[-1]
            assert submitted.x_request_id == (request_id if valid else "")
            assert submitted.label == f"{returned}-0" or valid

    with_client(api, body)


def test_without_a_request_id_the_header_has_the_id_of_the_answer(api):
    async def body(client):
        response = await client.post(CHAT, json=HELLO)
        assert response.headers["x-request-id"] == (await response.json())["id"]
        api.generator.ready = False
        response = await client.post(CHAT, json=HELLO)
        assert response.status == 503 and response.headers["x-request-id"].startswith("chatcmpl-")
        response = await client.get("/health")
        assert len(response.headers["x-request-id"]) == 32

    with_client(api, body)


def test_unexpected_failure_goes_to_the_log_only(api, caplog):
    api.generator.refusal = RuntimeError("secret address 0xdeadbeef")

    async def body(client):
        error = await refused(client, CHAT, HELLO, 500)
        assert "secret" not in json.dumps(error)

    with_client(api, body)
    assert "secret" in caplog.text


def test_tokenize_and_back(api):
    async def body(client):
        text = "naïve 🙂 <|im_end|>"
        found = await (await client.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
        assert found["tokens"] == api.model.tokenizer.encode(text, True)
        assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 256)
        assert len(found["token_strs"]) == found["count"]
        back = await (await client.post("/detokenize", json={"tokens": found["tokens"]})).json()
        assert back == {"prompt": text}
        chat = await (await client.post("/tokenize", json=HELLO)).json()
        await client.post(CHAT, json=HELLO)
        assert api.generator.submissions[0].prompt == chat["tokens"]
        assert (await refused(client, "/detokenize", {"tokens": [384]}))["param"] == "tokens"
        await refused(client, "/tokenize", {})

    with_client(api, body)


# -- keys


def test_every_route_but_health_needs_a_key(model):
    api = make_api(model, keys=["k1", "k2"])

    async def body(client):
        routes = [r for r in api.app.router.routes() if r.resource is not None]
        assert len(routes) >= 9
        for route in routes:
            path = route.resource.canonical.replace("{model}", "tiny")
            is_open = path in ("/health", "/health/ready", "/ping")
            assert ((await client.request(route.method, path)).status == 401) is not is_open, path
            assert not is_open or (await client.request(route.method, path)).status == 200
        assert (await client.get("/nowhere")).status == 401
        assert (await client.get(CHAT)).status == 401
        for header, status in (
            ("Bearer k2", 200), ("bearer k1", 200), ("Bearer  k1 ", 200), ("Bearer k3", 401), ("Bearer", 401),
            ("Basic k1", 401), ("k1", 401), ("Bearer k1 k2", 401),
        ):  # fmt: skip
            response = await client.get("/v1/models", headers={"Authorization": header})
            assert response.status == status, header
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert (await response.json())["error"]["code"] == "invalid_api_key"

    with_client(api, body)


def test_every_key_is_accepted_without_a_key_file(api):
    async def body(client):
        assert (await client.get("/v1/models", headers={"Authorization": "Bearer whatever"})).status == 200

    with_client(api, body)


def test_header_of_raw_bytes_is_a_wrong_key(model):
    api = make_api(model, keys=["k"])

    async def body(client):
        reader, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n\r\n")
        assert b" 401 " in await reader.readline()
        writer.close()

    with_client(api, body)


# -- malformed bodies


class Served:
    """An application and its client on their own event loop, for tests that are not coroutines."""

    def __init__(self, api) -> None:
        from aiohttp.test_utils import TestClient, TestServer

        self.api = api
        self.loop = asyncio.new_event_loop()
        self.client = self.loop.run_until_complete(self._start(TestClient, TestServer))

    async def _start(self, client, server):
        client = client(server(self.api.app))
        await client.start_server()
        return client

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        async def send():
            headers = {"Content-Type": "application/json"}
            async with self.client.post(path, data=body, headers=headers) as response:
                return response.status, await response.read()

        return self.loop.run_until_complete(send())

    def close(self) -> None:
        self.loop.run_until_complete(self.client.close())
        self.loop.close()


@pytest.fixture(scope="module")
def served(model):
    served = Served(make_api(model, max_body=200_000))
    yield served
    served.close()


FULL = HELLO | {
    "model": "tiny", "temperature": 1, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 1,
    "stop": ["a"], "n": 2, "user": "u", "logit_bias": {"1": 2}, "max_tokens": 3, "stream": False,
    "stream_options": None, "logprobs": True, "top_logprobs": 1, "stop_token_ids": [4], "priority": 1,
    "tools": [], "response_format": {"type": "text"}, "cache_salt": "s", "best_of": 2,
}  # fmt: skip
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -(2**63), 1e308, "tiny"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
RAW = st.sampled_from([
    b"", b"null", b"[]", b"{", b'"\\ud800"', b'{"prompt":"\\ud800 "}', b'{"prompt":"\xff"}',
    b'{"messages":NaN}', b'{"prompt":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    b'{"tools":' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"}",
    b'{"prompt":"a","temperature":1e999}', b'{"prompt":"a","temperature":-Infinity}',
    b"\xef\xbb\xbf{}", b'{"prompt":"a"} x', b'{"prompt":"a","seed":' + b"9" * 5000 + b"}",
    b"\x00" * 100, b'{"messages":[{"role":"user","content":"\\udc00\\ud800"}]}',
])  # fmt: skip


@st.composite
def bodies(draw) -> bytes:
    """A valid body with wrong values, or truncated, or with changed bytes; or a body that is not a request."""
    if draw(st.integers(0, 9)) == 0:
        return draw(RAW)
    base = dict(FULL) | draw(
        st.sampled_from([{}, {"prompt": "a"}, {"prompt": [1, 2], "logprobs": 1}, {"tokens": [1]}])
    )
    for _ in range(draw(st.integers(0, 3))):
        base[draw(st.sampled_from(sorted(base)))] = draw(JUNK)
    if draw(st.booleans()):
        base["messages"] = [
            {"role": draw(st.sampled_from(["user", "tool", "x"])), "content": draw(JUNK), "tool_calls": draw(JUNK)}
        ]
    raw = bytearray(json.dumps(base).encode())
    noise = random.Random(draw(st.integers()))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        raw[noise.randrange(len(raw))] = noise.randrange(256)
    return bytes(raw[: noise.randrange(len(raw))] if draw(st.integers(0, 9)) == 0 else raw)


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=bodies(), path=st.sampled_from([CHAT, TEXT, "/tokenize", "/detokenize"]))
def test_no_body_causes_a_server_error(served, body, path):
    status, answer = served.post(path, body)
    assert status == 200 or 400 <= status < 500, (body, status, answer)
    if status != 200:
        error = json.loads(answer)["error"]
        assert isinstance(error["message"], str) and error["type"]
    assert served.api.generator.places == served.api.generator.running == 0


def test_streaming_response_is_not_buffered_by_proxies(api):
    async def body(client):
        response = await client.post(CHAT, json=HELLO | {"stream": True})
        assert response.headers["X-Accel-Buffering"] == "no" and response.headers["Cache-Control"] == "no-cache"
        await response.read()

    with_client(api, body)


def test_a_token_without_an_embedding_is_refused_alone(tmp_path):
    """An added token may have an id of `vocab_size` or above. Text can contain it; the model cannot compute it."""
    add_token(make_tiny_llama(tmp_path, weights=False), "[PAD]", 384)
    api = make_api(model_of(tmp_path), sanitize_control_tokens=False)

    async def check(client):
        for path, body in (
            (TEXT, {"prompt": "a[PAD]"}),
            (CHAT, {"messages": [{"role": "user", "content": "[PAD]"}]}),
        ):
            error = await refused(client, path, body)
            assert "'[PAD]' (id 384)" in error["message"]
            assert error["param"] == next(iter(body))
        await refused(client, TEXT, {"prompt": [384]})
        tokens = (await (await client.post("/tokenize", json={"prompt": "[PAD]"})).json())["tokens"]
        assert tokens == [384]
        assert (await (await client.post("/detokenize", json={"tokens": tokens})).json())["prompt"] == "[PAD]"

    with_client(api, check)
    assert api.generator.submissions == []

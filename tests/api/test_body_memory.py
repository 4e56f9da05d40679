"""Request bodies: the bound on their sum, the lowest rate, their structure, and texts that are too long."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.api import body_memory, request_body
from daemon.api.errors import ApiError
from daemon.api.prompt_length import check_text_length
from daemon.api.request_body import check_structure
from daemon.models import encoding
from tests.api.harness import CHAT, HELLO, TEXT, make_api, until, with_client

LONG = {"prompt": "the quick brown fox " * 20_000}


async def begin(client, size: int, sent: int):
    """Begin to send a body of `size` bytes, and stop after `sent` bytes."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {size}\r\n\r\n".encode() + b"x" * sent)
    return reader, writer


def test_large_bodies_have_a_common_limit_and_small_ones_pass_it(model):
    api = make_api(model, max_body=1 << 20, body_memory=2 << 20)

    async def body(client):
        started = [await begin(client, 1 << 20, (1 << 20) - 10) for _ in range(2)]
        await until(lambda: api.gauge("request_body_bytes") > 1.8 * (1 << 20))
        response = await client.post(TEXT, json=LONG)
        assert (response.status, response.headers["Retry-After"]) == (503, "2")
        assert (await response.json())["error"]["code"] == "bodies_full"
        assert (await client.post(CHAT, json=HELLO)).status == 200
        for _, writer in started:
            writer.close()
        await until(lambda: api.gauge("request_body_bytes") == 0)
        assert (await client.post(TEXT, json=LONG)).status == 400  # too many tokens

    with_client(api, body)
    assert api.gauge("request_body_bytes") == 0


def test_memory_of_a_body_is_free_while_its_answer_runs(model):
    api = make_api(model)
    api.generator.hang_after = 3
    api.generator.max_model_len = 1_000_000

    async def body(client):
        async with client.post(TEXT, json=LONG | {"stream": True}) as response:
            await response.content.readline()
            assert api.gauge("request_body_bytes") == 0

    with_client(api, body)


@pytest.mark.parametrize(("limit", "message"), [("WINDOW", "too slowly"), ("BODY_TIMEOUT", "did not arrive within")])
def test_slow_upload_is_ended(model, monkeypatch, limit, message):
    monkeypatch.setattr(body_memory, limit, 0.3)

    async def body(client):
        reader, writer = await begin(client, 500_000, 70_000)

        async def trickle():
            while True:
                writer.write(b"x")
                await asyncio.sleep(0.02)

        trickling = asyncio.create_task(trickle())
        head = (await asyncio.wait_for(reader.readuntil(b"}}"), 5)).decode()
        assert head.startswith("HTTP/1.1 408") and message in head
        trickling.cancel()
        writer.close()

    with_client(make_api(model), body)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=30,
)


def sizes(value) -> tuple[int, int, int]:
    """Return the containers, strings and commas of a value."""
    if isinstance(value, str):
        return 0, 1, 0
    if not isinstance(value, list | dict):
        return 0, 0, 0
    inner = list(value) + list(value.values()) if isinstance(value, dict) else value
    found = [sum(column) for column in zip(*map(sizes, inner), strict=True)] or [0, 0, 0]
    return found[0] + 1, found[1], found[2] + max(0, len(value) - 1)


@given(VALUES, st.booleans())
def test_structure_is_counted_outside_of_strings(value, ascii_only):
    body = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    names = ("MAX_CONTAINERS", "MAX_STRINGS", "MAX_COMMAS")
    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(names, sizes(value), strict=True):
            patch.setattr(request_body, name, size)
        check_structure(body)
        for name, size in zip(names, sizes(value), strict=True):
            if size:
                patch.setattr(request_body, name, size - 1)
                with pytest.raises(ApiError, match="too many values"):
                    check_structure(body)
                patch.setattr(request_body, name, size)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x", "response_format": [{"a": [1]}] * 40_000},
        {"prompt": "x", "unknown": [[]] * 70_000},
        {"prompt": ["a"] * 300_000},
        {"prompt": [5] * 600_000},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 70_000}]},
    ],
)
def test_body_with_too_many_values_is_refused_before_it_is_decoded(model, body):
    async def send(client):
        response = await client.post(CHAT if "messages" in body else TEXT, json=body)
        assert response.status == 400
        assert "too many values" in (await response.json())["error"]["message"]

    with_client(make_api(model), send)


def test_text_too_long_for_the_context_is_refused_before_it_is_tokenised(model, monkeypatch):
    tokenizer, api = model.tokenizer, make_api(model)
    encoded: list[int] = []
    encode = encoding.encode_text
    for module in ("encoding", "tokenizer"):
        monkeypatch.setattr(
            f"daemon.models.{module}.encode_text",
            lambda t, text, *a: encoded.append(len(text)) or encode(t, text, *a),
        )
    too_long = "a" * (tokenizer.max_token_chars * 256 + 1)

    async def body(client):
        for path, request in (
            (TEXT, {"prompt": too_long}),
            (CHAT, {"messages": [{"role": "user", "content": too_long}]}),
        ):
            response = await client.post(path, json=request)
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (400, "context_length_exceeded")
            assert error["param"] in request
        assert encoded == []
        # Here characters alone do not decide: pieces of the text do.
        response = await client.post("/tokenize", json={"prompt": "the quick " * 80_000})
        assert (response.status, (await response.json())["error"]["code"]) == (400, "context_length_exceeded")
        assert 0 < sum(encoded) < 800_000

    with_client(api, body)


@given(st.text(alphabet="ab \n🙂é", max_size=60), st.integers(1, 40))
def test_no_text_that_fits_is_refused(model, text, limit):
    """The pieces are tiny here, so that there are many cuts; the margin of a cut is the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("daemon.api.prompt_length._PIECE", 7)
        patch.setattr("daemon.api.prompt_length._USUAL", 0)
        if model.tokenizer.count(text) <= limit:
            check_text_length(text, model.tokenizer, limit, "prompt")

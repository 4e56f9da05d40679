"""Requests that end early: refusals, lost engines, cancellations, deadlines and clients that hang up."""

from __future__ import annotations

import asyncio
import json

import pytest

from daemon.api.generator import NoEngine, Overloaded, ShuttingDown, TooLong, TooMany
from daemon.enums import EarlyEnd
from daemon.ipc.messages import Finish
from tests.api.harness import CHAT, HELLO, TEXT, events, make_api, until, with_client


@pytest.mark.parametrize("request_body", [HELLO, HELLO | {"stream": True}])
@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (Overloaded("full", 7), 429, "rate_limit_exceeded"),
        (TooMany("send several requests"), 400, None),
        (NoEngine("none"), 503, "no_engine"),
        (ShuttingDown("bye"), 503, "shutting_down"),
        (TooLong("no"), 400, "context_length_exceeded"),
    ],
)
def test_refused_submission_has_its_own_status_even_for_a_stream(api, request_body, refusal, status, code):
    api.generator.refusal = refusal

    async def body(client):
        response = await client.post(CHAT, json=request_body)
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (status, code)
        assert set(error) == {"message", "type", "param", "code"}
        if status != 400:
            assert response.headers["Retry-After"] == ("7" if status == 429 else "2")

    with_client(api, body)
    assert api.generator.places == 0


def test_admission_comes_before_tokenising(api, monkeypatch):
    api.generator.limit = 3
    monkeypatch.setattr(api.model.tokenizer, "encode", lambda *a: pytest.fail("tokenised before admission"))

    async def body(client):
        response = await client.post(TEXT, json={"prompt": ["a", "b"], "n": 2})
        assert (response.status, response.headers["Retry-After"]) == (429, "3")
        api.generator.ready = False
        assert (await client.post(CHAT, json=HELLO)).status == 503

    with_client(api, body)
    assert api.counter("admission_rejections", "overloaded") == 1
    assert api.counter("admission_rejections", "no_engine") == 1


def test_failed_submission_cancels_the_choices_before_it(api):
    submit = api.generator.submit

    def only_two(*args, **kwargs):
        if len(api.generator.streams) == 2:
            raise Overloaded("full")
        return submit(*args, **kwargs)

    api.generator.submit = only_two

    async def body(client):
        assert (await client.post(CHAT, json=HELLO | {"n": 3})).status == 429

    with_client(api, body)
    assert [s.cancelled for s in api.generator.streams] == [True, True]


@pytest.mark.parametrize("n", [1, 2])
def test_engine_lost_before_the_first_token_is_an_error_response(api, n):
    api.generator.lose_after = 0

    async def body(client):
        for request in (HELLO, HELLO | {"stream": True}):
            response = await client.post(CHAT, json=request | {"n": n})
            assert response.status == 500
            assert (await response.json())["error"]["code"] == "engine_error"

    with_client(api, body)
    assert api.generator.running == 0
    assert api.counter("request_success", "error") == 2 * n


@pytest.mark.parametrize("n", [1, 2])
def test_engine_lost_in_mid_stream_is_an_error_event_without_done(api, n):
    api.generator.lose_after = 6

    async def body(client):
        response = await client.post(CHAT, json=HELLO | {"stream": True, "n": n})
        assert response.status == 200
        *_, last, nothing = (await response.text()).split("\n\n")
        assert nothing == ""
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_error"

    with_client(api, body)
    assert api.generator.running == 0


@pytest.mark.parametrize(("finish", "status"), [(Finish.CANCELLED, 503), (Finish.ERROR, 500)])
def test_choice_that_its_engine_cancels_or_fails(api, finish, status):
    api.generator.finish = finish

    async def body(client):
        response = await client.post(CHAT, json=HELLO)
        assert (response.status, response.headers["x-should-retry"]) == (status, "false")
        streamed = await (await client.post(CHAT, json=HELLO | {"stream": True})).text()
        assert '{"error":' in streamed and "[DONE]" not in streamed

    with_client(api, body)


def test_deadline_ends_the_request(model):
    api = make_api(model, request_deadline=1.0)
    api.generator.hang_after = 6

    async def body(client):
        response = await client.post(CHAT, json=HELLO)
        assert (response.status, response.headers["x-should-retry"]) == (504, "false")
        streamed = await (await client.post(CHAT, json=HELLO | {"stream": True})).text()
        last = json.loads(streamed.split("\n\n")[-2].removeprefix("data: "))
        assert last["error"]["code"] == "deadline_exceeded" and "[DONE]" not in streamed

    with_client(api, body)
    assert api.generator.running == 0 and all(s.cancelled for s in api.generator.streams)
    assert (api.counter("request_success", "deadline"), api.counter("request_success", "abort")) == (2, 0)
    assert {s.why for s in api.generator.streams} == {EarlyEnd.DEADLINE}


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("hang_after", [0, 6])
def test_disconnect_cancels_the_request(api, streaming, n, hang_after):
    api.generator.hang_after = hang_after

    async def body(client):
        task = asyncio.create_task(client.post(CHAT, json=HELLO | {"stream": streaming, "n": n}))
        await until(lambda: api.generator.running == n)
        if streaming and hang_after:
            response = await task
            await response.content.readany()
            response.close()
        else:
            task.cancel()
        await until(lambda: api.generator.running == 0)
        await until(lambda: api.counter("http_requests", "chat", "disconnect") == 1)
        assert all(s.cancelled for s in api.generator.streams)
        assert api.counter("request_success", "abort") == n
        assert {s.why for s in api.generator.streams} == {EarlyEnd.CLIENT}

    with_client(api, body)
    assert api.generator.places == 0


def test_silent_stream_sends_heartbeats(model):
    api = make_api(model, heartbeat=0.05)
    api.generator.delay = 0.2
    api.generator.chunk_size = 20

    async def body(client):
        text = await (await client.post(CHAT, json=HELLO | {"stream": True})).text()
        beats = text.count(": heartbeat\n\n")
        assert beats >= 2 and text.startswith(": heartbeat")
        assert events(text.replace(": heartbeat\n\n", ""))[-1]["choices"][0]["finish_reason"] == "stop"

    with_client(api, body)


def test_connection_of_a_client_that_does_not_read_is_aborted(model):
    api = make_api(model, request_deadline=1.0)
    api.generator.max_model_len = 10_000_000
    api.generator.chunk_size = 4000
    longest = max(range(3, 384), key=lambda token: len(api.model.tokenizer.token_bytes(token)))
    api.generator.reply = lambda prompt, params: [longest] * 4_000_000

    async def body(client):
        reader, writer = await asyncio.open_connection(client.host, client.port, limit=1024)
        request = json.dumps(HELLO | {"stream": True, "max_tokens": 4_000_000}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(request)}\r\n\r\n".encode() + request)
        await until(lambda: api.generator.running == 1)
        await until(lambda: api.generator.running == 0)
        sent = api.generator.streams[0]._at
        assert 0 < sent < 4_000_000
        await until(lambda: api.counter("http_requests", "chat", "2xx") == 1)
        received = await reader.read()
        assert received.startswith(b"HTTP/1.1 200 ") and not received.endswith(b"0\r\n\r\n")
        writer.close()

    with_client(api, body)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("streaming", [False, True])
def test_choices_that_never_fit_the_journal_are_refused_before_the_first_is_started(api, path, streaming):
    api.generator.no_room = TooMany("send several requests")

    async def body(client):
        request = (HELLO if path == CHAT else {"prompt": "x"}) | {"stream": streaming, "max_tokens": 9}
        assert (await client.post(path, json=request | {"n": 3})).status == 400
        assert api.generator.submissions == []
        ((lengths, logprobs),) = api.generator.checked
        assert [most for _, most in lengths] == [9] * 3 and len(set(lengths)) == 1 and logprobs == -1
        assert (await client.post(path, json=request)).status == 200  # one choice needs no such check

    with_client(api, body)
    assert api.generator.places == api.generator.running == 0

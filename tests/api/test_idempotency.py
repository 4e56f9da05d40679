"""Requests with an `Idempotency-Key`: sent again, they get the answer of the first one."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.api.harness import ANSWER, CHAT, HELLO, TEXT, make_api, until, with_client

KEY = {"Idempotency-Key": "order-1"}
PROMPT = {"prompt": "x", "max_tokens": 60}


async def text_of(response):
    """Return the text of an answer, and its id."""
    raw = await response.text()
    assert response.status == 200, raw
    if not response.headers["Content-Type"].startswith("text/event-stream"):
        body = json.loads(raw)
        return body["choices"][0]["text"], body["id"]
    found = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["text"] for event in found), found[0]["id"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_second_gets_the_answer_of_the_first(api, stream):
    async def body(client):
        found = []
        for _ in range(3):
            response = await client.post(TEXT, json=PROMPT | {"stream": stream}, headers=KEY)
            found.append((*await text_of(response), response.headers.get("Idempotent-Replayed")))
        assert [row[2] for row in found] == [None, "true", "true"]
        assert len({row[:2] for row in found}) == 1 and found[0][0] == ANSWER
        await text_of(await client.post(TEXT, json=PROMPT, headers={"Idempotency-Key": "order-2"}))

    with_client(api, body)
    assert len(api.generator.submissions) == 2


def test_a_chat_is_repeated_to_the_byte(api):
    async def body(client):
        texts = {await (await client.post(CHAT, json=HELLO, headers=KEY)).text() for _ in range(2)}
        assert len(texts) == 1

    with_client(api, body)
    assert len(api.generator.submissions) == 1


def test_requests_at_the_same_time_run_once(api):
    api.generator.delay = 0.01

    async def body(client):
        sent = [client.post(TEXT, json=PROMPT, headers=KEY) for _ in range(5)]
        answers = [await text_of(response) for response in await asyncio.gather(*sent)]
        assert len(set(answers)) == 1 and answers[0][0] == ANSWER

    with_client(api, body)
    assert len(api.generator.submissions) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_goes_on_after_a_hang_up(api, stream):
    api.generator.delay = 0.02

    async def body(client):
        request = PROMPT | {"stream": stream}
        first = asyncio.create_task(client.post(TEXT, json=request, headers=KEY))
        await until(lambda: any(s.accepted for s in api.generator.streams))
        if first.done():
            (await first).close()
        first.cancel()
        text, _ = await text_of(await client.post(TEXT, json=request, headers=KEY))
        assert text == ANSWER

    with_client(api, body)
    assert len(api.generator.submissions) == 1


def test_another_body_or_path_is_refused(api):
    async def body(client):
        await text_of(await client.post(TEXT, json=PROMPT, headers=KEY))
        for path, request in ((TEXT, PROMPT | {"max_tokens": 3}), (CHAT, HELLO), (TEXT, PROMPT | {"stream": True})):
            response = await client.post(path, json=request, headers=KEY)
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (422, "idempotency_key_reused")
        await text_of(await client.post("/completions/", json=PROMPT, headers=KEY))  # the same path

    with_client(api, body)
    assert len(api.generator.submissions) == 1


def test_each_client_has_its_own_keys(model):
    api = make_api(model, keys=["one", "two tenant=t", "three tenant=t"])

    async def body(client):
        ids = [
            (await text_of(await client.post(TEXT, json=PROMPT, headers=KEY | {"api-key": key})))[1]
            for key in ("one", "two", "three", "one")
        ]
        assert ids[0] == ids[3] and ids[1] == ids[2] and ids[0] != ids[1]

    with_client(api, body)


def test_a_request_that_failed_runs_again(api):
    async def body(client):
        api.generator.limit = 0
        assert (await client.post(TEXT, json=PROMPT, headers=KEY)).status == 429
        api.generator.limit, api.generator.lose_after = 64, 6
        assert (await client.post(TEXT, json=PROMPT, headers=KEY)).status == 500
        api.generator.lose_after = None
        assert (await text_of(await client.post(TEXT, json=PROMPT, headers=KEY)))[0] == ANSWER

    with_client(api, body)
    assert len(api.generator.submissions) == 2


def test_it_is_forgotten_in_time_and_when_the_client_cancels_it(model):
    api = make_api(model, keep_streams=1.0)

    async def body(client):
        _, first = await text_of(await client.post(TEXT, json=PROMPT, headers=KEY))
        assert (await client.delete(f"/v1/streams/{first}")).status == 200
        _, second = await text_of(await client.post(TEXT, json=PROMPT, headers=KEY))
        assert first != second
        await until(lambda: api.generator.streams[1].released)
        assert (await text_of(await client.post(TEXT, json=PROMPT, headers=KEY)))[1] != second

    with_client(api, body)


def test_without_memory_the_header_has_no_effect(model):
    api = make_api(model, keep_streams=0.0)

    async def body(client):
        for _ in range(2):
            await text_of(await client.post(TEXT, json=PROMPT, headers=KEY))

    with_client(api, body)
    assert len(api.generator.submissions) == 2


def test_a_key_has_a_form(api):
    async def body(client):
        for key in ("x" * 256, "a\tb", "é"):
            response = await client.post(TEXT, json=PROMPT, headers={"Idempotency-Key": key})
            error = (await response.json())["error"]
            assert (response.status, error["param"]) == (400, "Idempotency-Key")

    with_client(api, body)

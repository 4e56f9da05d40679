"""Kept streams: what each reader of one gets, wherever it goes on, and when a stream is freed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.api.admission import Holder
from tests.api.harness import ANSWER, CHAT, HELLO, TEXT, ApiUnderTest, Model, make_api, until, with_client

KEEP = {"X-Llumd-Keep": "1"}
STREAM = HELLO | {"stream": True}


def parse(body: str) -> list[tuple[str, Any]]:
    """Return (id, data) of each event; data None: [DONE]."""
    found = []
    for event in body.removesuffix("\n\n").split("\n\n"):
        if event.startswith(":"):
            continue
        fields = dict(line.split(": ", 1) for line in event.split("\n"))
        assert set(fields) <= {"id", "data"}
        found.append((fields.get("id", ""), None if fields["data"] == "[DONE]" else json.loads(fields["data"])))
    return found


async def keep(client: Any, path: str, body: dict[str, Any]) -> list[tuple[str, Any]]:
    response = await client.post(path, json=body, headers=KEEP)
    assert response.status == 200, await response.text()
    return parse(await response.text())


async def resume(client: Any, id: str, after: str = "") -> list[tuple[str, Any]]:
    response = await client.get(f"/v1/streams/{id}", headers={"Last-Event-ID": after})
    assert response.status == 200, await response.text()
    return parse(await response.text())


def joined(events: list[tuple[str, Any]]) -> list[Any]:
    """Return what the events say together, however the text is cut into events."""
    assert events[-1] == ("", None)
    texts: dict[int, str] = {}
    rest: list[Any] = []
    for _, data in events[:-1]:
        for choice in data["choices"]:
            delta, index = choice.get("delta", {}), choice["index"]
            texts[index] = texts.get(index, "") + choice.get("text", delta.get("content", ""))
            entries = choice["logprobs"] or {}
            names = [name for name, values in entries.items() if values]
            for values in zip(*(entries[name] for name in names), strict=True):
                rest.append([index, *(json.dumps(value) for value in values)])
            if "role" in delta or choice["finish_reason"]:
                rest.append([index, delta.get("role"), choice["finish_reason"]])
        if not data["choices"]:
            rest.append([data["usage"]])
    by_choice = sorted(rest, key=lambda entry: entry[0] if len(entry) > 1 else 99)
    return [texts, by_choice]


bodies = st.one_of(
    st.fixed_dictionaries({"messages": st.just(HELLO["messages"]), "echo": st.booleans()}),
    st.fixed_dictionaries(
        {"messages": st.just(HELLO["messages"]), "logprobs": st.just(True), "top_logprobs": st.integers(0, 2)}
    ),
    st.fixed_dictionaries({"prompt": st.sampled_from(["say ", ["a", "b"]]), "echo": st.booleans()}),
    st.fixed_dictionaries({"prompt": st.just("x"), "logprobs": st.integers(0, 2)}),
)


@settings(max_examples=25, deadline=None)
@given(
    bodies,
    st.integers(1, 3),
    st.sampled_from([None, ["fox"], ["jumps over", "naïve"], ["🙂"], ["zzz"]]),
    st.sampled_from([None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]),
    st.sampled_from([3, 20, 80]),
    st.sampled_from([1, 2, 7, 100]),
)
def test_the_rest_after_each_event(model: Model, body, n, stop, usage, max_tokens, chunk_size):
    fields = body | {"n": n, "stop": stop, "stream_options": usage, "stream": True, "max_tokens": max_tokens}
    path = CHAT if "messages" in body else TEXT
    api = make_api(model)
    api.generator.chunk_size = chunk_size

    async def run(client):
        plain = await client.post(path, json=fields)
        expected = joined(parse(await plain.text()))
        events = await keep(client, path, fields)
        assert joined(events) == expected
        ids = [id for id, _ in events]
        assert all(ids[:-1]) and len(set(ids)) == len(ids)
        id = events[0][1]["id"]
        for i in range(len(events)):
            rest = await resume(client, id, ids[i - 1] if i else "")
            assert joined(events[:i] + rest) == expected, (i, ids[i - 1])

    with_client(api, run)


def test_without_the_header_nothing_changes(api: ApiUnderTest):
    async def run(client):
        for headers in ({}, {"X-Llumd-Keep": "0"}):
            response = await client.post(CHAT, json=STREAM, headers=headers)
            text = await response.text()
            assert "id: " not in text and "X-Llumd-Stream" not in response.headers and not text.startswith(":")
            id = json.loads(text.split("\n")[0].removeprefix("data: "))["id"]
            found = await client.get(f"/v1/streams/{id}")
            assert (found.status, (await found.json())["error"]["code"]) == (404, "stream_not_found")

    with_client(api, run)
    assert all(stream.released for stream in api.generator.streams)


@pytest.mark.parametrize(
    ("value", "fields", "word"),
    [("1", {"stream": False}, "`stream`"), ("yes", {}, "must be 1 or 0"), ("1", {"n": 65}, "at most 64 choices")],
)
def test_requests_that_cannot_be_kept(model: Model, value: str, fields: dict[str, Any], word: str):
    api = make_api(model, max_choices=100)

    async def run(client):
        response = await client.post(CHAT, json=STREAM | fields, headers={"X-Llumd-Keep": value})
        error = (await response.json())["error"]
        assert (response.status, error["param"]) == (400, "X-Llumd-Keep")
        assert word in error["message"]

    with_client(api, run)
    assert not api.generator.submissions


def test_the_option_switches_it_off(model: Model):
    async def run(client):
        response = await client.post(CHAT, json=STREAM, headers=KEEP)
        assert response.status == 400 and "keep_streams" in (await response.json())["error"]["message"]

    with_client(make_api(model, keep_streams=0.0), run)


def test_ids_that_the_stream_has_not_are_refused(api: ApiUnderTest):
    async def run(client):
        id = (await keep(client, CHAT, STREAM))[0][1]["id"]
        for after in ("u", "x", "1.2", "100000"):
            for query, headers in ({"from": after}, {}), ({}, {"Last-Event-ID": after}):
                response = await client.get(f"/v1/streams/{id}", params=query, headers=headers)
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (400, "invalid_event_id")
                assert error["param"] in (*query, *headers) and after in error["message"]
        # A browser repeats the URL that it began with, so the header counts.
        response = await client.get(f"/v1/streams/{id}?from=x", headers={"Last-Event-ID": "e"})
        assert parse(await response.text()) == [("", None)]

    with_client(api, run)


async def hang_up_after_the_head(client: Any, body: dict[str, Any]) -> str:
    """Send a request to keep, and hang up. Return the id of the stream."""
    response = await client.post(CHAT, json=body, headers=KEEP)
    id = response.headers["X-Llumd-Stream"]
    response.close()
    return id


def test_a_hang_up_neither_cancels_nor_frees(api: ApiUnderTest):
    api.generator.chunk_size, api.generator.delay = 1, 0.01

    async def run(client):
        id = await hang_up_after_the_head(client, STREAM)
        [stream] = api.generator.streams
        await until(lambda: stream.done)
        await asyncio.sleep(0.05)
        assert not stream.cancelled and not stream.released
        assert joined(await resume(client, id))[0] == {0: ANSWER}
        assert api.gauge("streams_kept") == 1

    with_client(api, run)
    assert api.counter("request_success", "stop") == 1
    assert api.counter("generation_tokens") == len(api.generator.streams[0]._tokens)
    assert api.counter("stream_reconnects") == 1


def test_a_stop_string_ends_a_stream_without_a_reader(api: ApiUnderTest):
    api.generator.chunk_size, api.generator.delay = 1, 0.01

    async def run(client):
        id = await hang_up_after_the_head(client, STREAM | {"stop": ["brown"]})
        [stream] = api.generator.streams
        await until(lambda: stream.cancelled)
        assert stream.why is None and stream.accepted < len(stream._tokens)
        texts, rest = joined(await resume(client, id))
        assert texts == {0: "the quick "} and rest[-1] == [0, None, "stop"]

    with_client(api, run)


def test_the_deadline_ends_a_stream_without_a_reader(model: Model):
    api = make_api(model, request_deadline=0.4)
    api.generator.hang_after = 6

    async def run(client):
        id = await hang_up_after_the_head(client, STREAM | {"n": 2})
        await until(lambda: all(stream.cancelled for stream in api.generator.streams))
        for _ in range(2):
            *events, (no_id, error) = await resume(client, id)
            assert error["error"]["code"] == "deadline_exceeded" and not no_id
            assert sum(len(data["choices"][0]["delta"]["content"]) for _, data in events) > 0

    with_client(api, run)
    assert api.counter("request_success", "deadline") == 2


def test_each_reader_gets_the_error_that_has_ended_the_stream(api: ApiUnderTest):
    api.generator.lose_after = 6

    async def run(client):
        events = await keep(client, CHAT, STREAM | {"n": 2})
        errors = [events[-1][1]]
        for after in ("", events[1][0], events[-2][0]):
            errors.append((await resume(client, events[0][1]["id"], after))[-1][1])
        assert [error["error"]["code"] for error in errors] == ["engine_error"] * 4
        assert all(error == errors[0] for error in errors)

    with_client(api, run)


def test_a_new_reader_ends_the_one_before(api: ApiUnderTest):
    api.generator.hang_after = 6

    async def run(client):
        first = await client.post(CHAT, json=STREAM, headers=KEEP)
        id = first.headers["X-Llumd-Stream"]
        await first.content.readuntil(b"\n\n")
        second = await client.get(f"/v1/streams/{id}")
        third = await client.get(f"/v1/streams/{id}")
        for response in (first, second):
            with pytest.raises(Exception, match=r"payload|reset"):
                await response.read()
        api.generator.hang_after = None
        [stream] = api.generator.streams
        assert not stream.cancelled
        assert (await client.delete(f"/v1/streams/{id}")).status == 200
        assert '"code":"cancelled"' in await third.text()
        await until(lambda: stream.released)

    with_client(api, run)
    assert api.gauge("streams_kept") == 0


def test_a_stream_is_freed_a_while_after_its_end(model: Model):
    api = make_api(model, keep_streams=1.0)

    async def run(client):
        id = (await keep(client, CHAT, STREAM))[0][1]["id"]
        await until(lambda: api.generator.streams[0].released)
        assert (await client.get(f"/v1/streams/{id}")).status == 404

    with_client(api, run)


def test_an_ended_stream_makes_room_and_one_that_runs_or_is_read_does_not(model: Model):
    api = make_api(model, keys=["sk-a", "sk-b"])

    async def run(client):
        ids = []
        for key in ("a", "b", "b"):
            response = await client.post(CHAT, json=STREAM, headers=KEEP | {"Authorization": f"Bearer sk-{key}"})
            ids.append(parse(await response.text())[0][1]["id"])
        api.generator.hang_after = 3
        await client.post(CHAT, json=STREAM, headers=KEEP | {"Authorization": "Bearer sk-a"})
        owner = api.kept.get(ids[1]).facts.owner
        freed = []
        for _ in range(3):  # first the client's own, then the oldest
            assert api.kept.make_room(Holder(owner, False))
            freed += [id for id in ids if api.kept.get(id) is None and id not in freed]
        assert freed == [ids[1], ids[2], ids[0]]
        assert not api.kept.make_room(Holder(owner, False))
        assert api.gauge("streams_kept") == 1

    with_client(api, run)


def test_routes_and_preflight(api: ApiUnderTest):
    async def run(client):
        id = (await keep(client, CHAT, STREAM))[0][1]["id"]
        head = await client.head(f"/v1/streams/{id}")
        assert (head.status, head.headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
        assert (await client.post(f"/v1/streams/{id}")).status == 405
        preflight = await client.options(
            f"/v1/streams/{id}",
            headers={"Origin": "http://localhost:3000", "Access-Control-Request-Method": "DELETE"},
        )
        assert "DELETE" in preflight.headers["Access-Control-Allow-Methods"]
        assert preflight.headers["Access-Control-Allow-Headers"].startswith("*")  # X-Llumd-Keep, Last-Event-ID
        deleted = await client.delete(f"/v1/streams/{id}")
        assert await deleted.json() == {"id": id, "object": "stream", "deleted": True}
        assert (await client.delete(f"/v1/streams/{id}")).status == 404

    with_client(api, run)

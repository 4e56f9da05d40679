"""Answers as clients see them: bodies, events, and what is submitted for them."""

from __future__ import annotations

import asyncio
import json

import pytest

from daemon.api.generator import NoEngine, Overloaded, TooLong
from daemon.api.seeds import choice_seed
from daemon.ipc.messages import Finish
from tests.api.harness import ANSWER, make_world, with_client

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def events(body: str) -> list[dict]:
    """The JSON events before [DONE]; every event must be framed as one data line."""
    parts = body.split("\n\n")
    assert parts[-1] == "" and parts[-2] == "data: [DONE]"
    assert all(p.startswith("data: ") and "\n" not in p for p in parts[:-1])
    return [json.loads(p[6:]) for p in parts[:-2]]


async def stream(client, path, body) -> list[dict]:
    response = await client.post(path, json=body | {"stream": True})
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    return events(await response.text())


async def until(condition):
    """Wait, for seconds at most, until something has happened."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("did not happen")


@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_chat_stream_and_whole_agree(world, piece):
    world.generator.piece = piece

    async def body(client):
        whole = await (await client.post(CHAT, json=HELLO)).json()
        chunks = await stream(client, CHAT, HELLO)
        assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
        assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1
        choices = [c["choices"][0] for c in chunks]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in c["delta"] for c in choices[1:])
        assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["stop"]
        assert not any("usage" in c for c in chunks)
        text = "".join(c["delta"].get("content", "") for c in choices)
        message = whole["choices"][0]
        assert text == message["message"]["content"] == ANSWER
        assert (message["finish_reason"], whole["object"]) == ("stop", "chat.completion")

    with_client(world, body)


def test_usage_comes_last_and_is_null_before(world):
    world.generator.cached = 4

    async def body(client):
        chunks = await stream(client, CHAT, HELLO | {"stream_options": {"include_usage": True}})
        assert all(c["usage"] is None for c in chunks[:-1])
        assert chunks[-1]["choices"] == []
        usage = chunks[-1]["usage"]
        prompt, output = len(world.generator.submissions[0].prompt), len(world.generator.streams[0]._tokens)
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, output)
        assert usage["total_tokens"] == prompt + output
        assert usage["prompt_tokens_details"] == {"cached_tokens": 4}
        many = await (await client.post(TEXT, json={"prompt": ["a", "bc"], "n": 3})).json()
        assert many["usage"]["prompt_tokens_details"] == {"cached_tokens": 8}
        both = {"include_usage": True, "continuous_usage_stats": True}
        running = [
            c["usage"]["completion_tokens"]
            for c in (await stream(client, CHAT, HELLO | {"stream_options": both}))[1:]
        ]
        assert running == sorted(running) and running[-1] == output

    with_client(world, body)


def test_choices_interleave_and_end_each(world):
    world.generator.reply = lambda prompt, params: [40 + params.seed % 7] * (3 + params.seed % 5) + [2]

    async def body(client):
        chunks = await stream(client, CHAT, HELLO | {"n": 4, "seed": 9})
        params = [s.params for s in world.generator.submissions]
        assert [p.seed for p in params] == [choice_seed(9, i) for i in range(4)]
        labels = [s.label for s in world.generator.submissions]
        assert labels == [f"{chunks[0]['id']}-{i}" for i in range(4)]
        decode = world.model.tokenizer.decode
        for i in range(4):
            mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
            assert mine[0]["delta"]["role"] == "assistant"
            assert [c["finish_reason"] for c in mine].count("stop") == 1 and mine[-1]["finish_reason"] == "stop"
            tokens = world.generator.reply([], params[i])[:-1]
            assert "".join(c["delta"].get("content", "") for c in mine) == decode(tokens)
        order = [c["choices"][0]["index"] for c in chunks]
        assert order != sorted(order)

    with_client(world, body)


def test_one_choice_is_the_first_of_many(world):
    async def body(client):
        for n in (1, 3):
            await client.post(CHAT, json=HELLO | {"n": n, "seed": -5})
        first, *rest = (s.params.seed for s in world.generator.submissions)
        assert rest[0] == first and len(set(rest)) == 3

    with_client(world, body)


def test_all_forms_of_prompts(world):
    encode = world.model.tokenizer.encode

    async def body(client):
        for prompt, expected in (
            ("ab", [encode("ab", True)]),
            (["ab", "cd"], [encode("ab", True), encode("cd", True)]),
            ([5, 6, 7], [[5, 6, 7]]),
            ([[5, 6], [7]], [[5, 6], [7]]),
        ):
            world.generator.submissions.clear()
            answer = await (await client.post(TEXT, json={"prompt": prompt, "n": 2})).json()
            assert [s.prompt for s in world.generator.submissions] == [p for p in expected for _ in range(2)]
            assert [c["index"] for c in answer["choices"]] == list(range(2 * len(expected)))
            assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
            assert answer["object"] == "text_completion"
        assert all(s.params.max_tokens == 16 for s in world.generator.submissions)
        assert len({s.params.seed for s in world.generator.submissions}) == 4

    with_client(world, body)


def test_echo_begins_with_the_prompt(world):
    async def body(client):
        ids = world.model.tokenizer.encode("some tokens", False)
        whole = await (await client.post(TEXT, json={"prompt": ["say: ", "x"], "echo": True, "max_tokens": 4})).json()
        assert [c["text"] for c in whole["choices"]] == [p + "the quick bro" for p in ("say: ", "x")]
        chunks = await stream(client, TEXT, {"prompt": ids, "echo": True, "max_tokens": 4})
        assert "".join(c["choices"][0]["text"] for c in chunks) == "some tokens" + "the quick bro"

    with_client(world, body)


def test_stop_string_ends_the_stream_and_frees_it(world):
    async def body(client):
        world.generator.hang_after = 15  # the answer must not need what comes after the stop string
        request = HELLO | {"stop": ["fox j", "zzz"]}
        whole = await (await client.post(CHAT, json=request)).json()
        chunks = await stream(client, CHAT, request)
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        assert text == whole["choices"][0]["message"]["content"] == "the quick brown "
        assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "stop"
        assert all(s.cancelled for s in world.generator.streams) and world.generator.running == 0

    with_client(world, body)


def test_chat_logprobs(world):
    async def body(client):
        request = HELLO | {"logprobs": True, "top_logprobs": 2, "max_tokens": 30}
        whole = await (await client.post(CHAT, json=request)).json()
        entries = whole["choices"][0]["logprobs"]["content"]
        assert len(entries) == whole["usage"]["completion_tokens"]
        shown = b"".join(bytes(e["bytes"]) for e in entries[:-1])
        assert shown.decode() == ANSWER
        assert all(len(e["top_logprobs"]) == 2 for e in entries)
        chunks = await stream(client, CHAT, request)
        streamed = [e for c in chunks for e in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
        assert streamed == entries

    with_client(world, body)


def test_text_logprobs(world):
    async def body(client):
        request = {"prompt": "x", "logprobs": 1, "max_tokens": 7}
        found = (await (await client.post(TEXT, json=request)).json())["choices"][0]
        logprobs = found["logprobs"]
        assert "".join(logprobs["tokens"]) == found["text"]
        assert [
            found["text"][o:][: len(t)] for o, t in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
        ] == logprobs["tokens"]
        assert logprobs["token_logprobs"] == [-0.5] * 7
        assert all(t in tops for t, tops in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))
        chunks = await stream(client, TEXT, request)
        parts = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
        assert {k: [x for p in parts for x in p[k]] for k in logprobs} == logprobs

    with_client(world, body)


def test_special_tokens_are_shown_on_request(world):
    world.generator.reply = lambda prompt, params: [1, 70, 71, 0, 72, 2]

    async def body(client):
        hidden = await (await client.post(TEXT, json={"prompt": "x"})).json()
        shown = await (await client.post(TEXT, json={"prompt": "x", "skip_special_tokens": False})).json()
        plain = world.model.tokenizer.decode([70, 71, 72])
        assert hidden["choices"][0]["text"] == plain
        assert shown["choices"][0]["text"] == f"<|im_start|>{plain[:2]}<|endoftext|>{plain[2:]}"

    with_client(world, body)


def test_parameters_reach_the_engine(world):
    asked = {
        "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.2, "logit_bias": {"7": 5, "8": -100}, "max_tokens": 3, "max_completion_tokens": 9,
        "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [5], "priority": "high", "cache_salt": "me",
    }  # fmt: skip

    async def body(client):
        assert (await client.post(CHAT, json=HELLO | asked)).status == 200
        sent = world.generator.submissions[0]
        p = sent.params
        assert (p.temperature, p.top_p, p.top_k, p.min_p) == (0.5, 0.9, 0, 0.1)
        assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (1, -1, 1.2)
        assert (dict(p.logit_bias), p.stop_token_ids) == ({7: 5, 8: -100}, (5,))
        assert (p.max_tokens, p.min_tokens, p.ignore_eos, p.logprobs) == (9, 2, True, -1)
        assert (sent.priority, sent.cache_salt) == (-1, b"me")

    with_client(world, body)


@pytest.mark.parametrize(
    ("line", "asked", "priority"),
    [
        ("k", {}, 0),
        ("k priority=high", {}, -1),
        ("k priority=low", {"priority": None}, 1),
        ("k\tpriority=-7", {}, -7),
        ("k priority=low", {"priority": "high"}, -1),
        ("k priority=high", {"priority": 0}, 0),
    ],
)
def test_a_key_gives_a_priority_to_requests_that_name_none(model, line, asked, priority):
    world = make_world(model, keys=["other priority=100", line])

    async def body(client):
        headers = {"Authorization": "Bearer k"}
        assert (await client.post(CHAT, json=HELLO | asked, headers=headers)).status == 200
        assert (await client.post(TEXT, json={"prompt": ["a", "b"]} | asked, headers=headers)).status == 200
        assert [sent.priority for sent in world.generator.submissions] == [priority] * 3

    with_client(world, body)


def test_output_fills_the_context_by_default(world):
    async def body(client):
        await client.post(CHAT, json=HELLO)
        sent = world.generator.submissions[0]
        assert sent.params.max_tokens == world.generator.max_model_len - len(sent.prompt)

    with_client(world, body)


def test_messages_become_the_template_s(world):
    async def body(client):
        messages = [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "tool", "content": "42", "tool_call_id": "c"},
        ]
        assert (await client.post(CHAT, json={"messages": messages, "unknown": {"deep": []}})).status == 200
        prompt = world.generator.submissions[0].prompt
        turns = [("system", "be brief"), ("user", "ab"), ("assistant", ""), ("tool", "42")]
        expected = "".join(f"<|im_start|>{r}\n{t}<|im_end|>\n" for r, t in turns) + "<|im_start|>assistant\n"
        assert prompt == world.model.tokenizer.encode(expected, False)

    with_client(world, body)


def test_special_tokens_are_added_to_text_but_not_to_templates(world, monkeypatch):
    encode, added = world.model.tokenizer.encode, []
    monkeypatch.setattr(world.model.tokenizer, "encode", lambda text, add: added.append(add) or encode(text, add))

    async def body(client):
        for path, request in (
            (CHAT, HELLO),
            (TEXT, {"prompt": "a"}),
            ("/tokenize", HELLO),
            ("/tokenize", {"prompt": "a"}),
        ):
            for override in ({}, {"add_special_tokens": False}, {"add_special_tokens": True}):
                assert (await client.post(path, json=request | override)).status == 200

    with_client(world, body)
    assert added == [False, False, True, True, False, True] * 2


def test_long_prompts_are_tokenised_elsewhere(world):
    world.generator.max_model_len = 100_000

    async def body(client):
        text = "the quick brown fox " * 1000
        await client.post(TEXT, json={"prompt": text})
        assert world.generator.submissions[0].prompt == world.model.tokenizer.encode(text, True)

    with_client(world, body)


@pytest.mark.parametrize("request_body", [HELLO, HELLO | {"stream": True}])
@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (Overloaded("full", 7), 429, "rate_limit_exceeded"),
        (NoEngine("none"), 503, "no_engine"),
        (TooLong("no"), 400, "context_length_exceeded"),
    ],
)
def test_refusal_has_its_own_status_even_for_a_stream(world, request_body, refusal, status, code):
    world.generator.refusal = refusal

    async def body(client):
        response = await client.post(CHAT, json=request_body)
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (status, code)
        assert set(error) == {"message", "type", "param", "code"}
        if status == 429:
            assert response.headers["Retry-After"] == "7"

    with_client(world, body)
    assert world.generator.places == 0


def test_places_are_counted_before_tokenising(world, monkeypatch):
    world.generator.limit = 3
    monkeypatch.setattr(world.model.tokenizer, "encode", lambda *a: pytest.fail("tokenised to be turned away"))

    async def body(client):
        response = await client.post(TEXT, json={"prompt": ["a", "b"], "n": 2})
        assert (response.status, response.headers["Retry-After"]) == (429, "3")
        world.generator.ready = False
        assert (await client.post(CHAT, json=HELLO)).status == 503

    with_client(world, body)
    assert world.counter("admission_rejections", "overloaded") == 1
    assert world.counter("admission_rejections", "no_engine") == 1


def test_partly_submitted_choices_are_freed(world):
    submit = world.generator.submit

    def only_two(*args, **kwargs):
        if len(world.generator.streams) == 2:
            raise Overloaded("full")
        return submit(*args, **kwargs)

    world.generator.submit = only_two

    async def body(client):
        assert (await client.post(CHAT, json=HELLO | {"n": 3})).status == 429

    with_client(world, body)
    assert [s.cancelled for s in world.generator.streams] == [True, True]


@pytest.mark.parametrize("n", [1, 2])
def test_loss_before_the_first_token_is_an_error_response(world, n):
    world.generator.lose_after = 0

    async def body(client):
        for request in (HELLO, HELLO | {"stream": True}):
            response = await client.post(CHAT, json=request | {"n": n})
            assert response.status == 500
            assert (await response.json())["error"]["code"] == "engine_error"

    with_client(world, body)
    assert world.generator.running == 0
    assert world.counter("request_success", "error") == 2 * n


@pytest.mark.parametrize("n", [1, 2])
def test_loss_in_mid_stream_is_an_error_event_and_no_done(world, n):
    world.generator.lose_after = 6

    async def body(client):
        response = await client.post(CHAT, json=HELLO | {"stream": True, "n": n})
        assert response.status == 200
        *_, last, nothing = (await response.text()).split("\n\n")
        assert nothing == ""
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_error"

    with_client(world, body)
    assert world.generator.running == 0


@pytest.mark.parametrize(("finish", "status"), [(Finish.CANCELLED, 503), (Finish.ERROR, 500)])
def test_engine_gives_up(world, finish, status):
    world.generator.finish = finish

    async def body(client):
        response = await client.post(CHAT, json=HELLO)
        assert response.status == status
        streamed = await (await client.post(CHAT, json=HELLO | {"stream": True})).text()
        assert '{"error":' in streamed and "[DONE]" not in streamed

    with_client(world, body)


def test_deadline(model):
    world = make_world(model, request_deadline=1.0)
    world.generator.hang_after = 6

    async def body(client):
        response = await client.post(CHAT, json=HELLO)
        assert (response.status, response.headers["x-should-retry"]) == (504, "false")
        streamed = await (await client.post(CHAT, json=HELLO | {"stream": True})).text()
        last = json.loads(streamed.split("\n\n")[-2].removeprefix("data: "))
        assert last["error"]["code"] == "deadline_exceeded" and "[DONE]" not in streamed

    with_client(world, body)
    assert world.generator.running == 0 and all(s.cancelled for s in world.generator.streams)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("hang_after", [0, 6])
def test_disconnect_frees_the_request(world, streaming, n, hang_after):
    world.generator.hang_after = hang_after

    async def body(client):
        task = asyncio.create_task(client.post(CHAT, json=HELLO | {"stream": streaming, "n": n}))
        await until(lambda: world.generator.running == n)
        if streaming and hang_after:
            response = await task
            await response.content.readany()
            response.close()
        else:
            task.cancel()
        await until(lambda: world.generator.running == 0)
        await until(lambda: world.counter("http_requests", "chat", "disconnect") == 1)
        assert all(s.cancelled for s in world.generator.streams)
        assert world.counter("request_success", "abort") == n

    with_client(world, body)
    assert world.generator.places == 0


def test_heartbeat_keeps_a_silent_stream_alive(model):
    world = make_world(model, heartbeat=0.05)
    world.generator.delay = 0.2
    world.generator.piece = 20

    async def body(client):
        text = await (await client.post(CHAT, json=HELLO | {"stream": True})).text()
        beats = text.count(": heartbeat\n\n")
        assert beats >= 2 and text.startswith(": heartbeat")
        assert events(text.replace(": heartbeat\n\n", ""))[-1]["choices"][0]["finish_reason"] == "stop"

    with_client(world, body)


def test_client_that_does_not_read_is_cut_off(model):
    world = make_world(model, request_deadline=1.0)
    world.generator.max_model_len = 10_000_000
    world.generator.piece = 4000
    longest = max(range(3, 384), key=lambda token: len(world.model.tokenizer.token_bytes(token)))
    world.generator.reply = lambda prompt, params: [longest] * 4_000_000

    async def body(client):
        reader, writer = await asyncio.open_connection(client.host, client.port, limit=1024)
        request = json.dumps(HELLO | {"stream": True, "max_tokens": 4_000_000}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(request)}\r\n\r\n".encode() + request)
        await until(lambda: world.generator.running == 1)
        await until(lambda: world.generator.running == 0)
        sent = world.generator.streams[0]._at
        assert 0 < sent < 4_000_000
        await until(lambda: world.counter("http_requests", "chat", "2xx") == 1)
        received = await reader.read()
        assert received.startswith(b"HTTP/1.1 200 ") and not received.endswith(b"0\r\n\r\n")
        writer.close()

    with_client(world, body)


def test_statistics_add_up(world):
    async def body(client):
        await client.post(CHAT, json=HELLO | {"n": 2})
        await stream(client, TEXT, {"prompt": [[5], [6] * 30], "max_tokens": 4})
        await client.post(CHAT, json=HELLO | {"n": 99})
        text = await (await client.get("/metrics")).text()
        assert 'vllm:request_success_total{finished_reason="stop",model_name="tiny"} 2.0' in text

    with_client(world, body)
    tokens = 2 * len(world.generator.streams[0]._tokens) + 2 * 4
    assert world.counter("generation_tokens") == tokens
    assert world.counter("prompt_tokens") == sum(len(s.prompt) for s in world.generator.submissions)
    ends = [world.counter("request_success", reason) for reason in ("stop", "length", "abort", "error")]
    assert ends == [2, 2, 0, 0]
    assert world.counter("admission_rejections", "invalid") == 1
    assert world.counter("http_requests", "chat", "2xx") == 1

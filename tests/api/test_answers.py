"""Answers to clients: bodies, events, and the submissions to the generator."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.api.auth import client_name
from daemon.api.key_file import digest, parse_key
from daemon.api.params import choice_seed, prefix_salt
from daemon.api.render.answer import Answer
from tests.api.harness import ANSWER, CHAT, HELLO, TEXT, make_api, stream, with_client


@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
def test_streamed_and_whole_chat_answers_are_equal(api, chunk_size):
    api.generator.chunk_size = chunk_size

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

    with_client(api, body)


def test_usage_is_in_the_last_event_and_null_before_it(api):
    api.generator.num_cached_tokens = 4

    async def body(client):
        chunks = await stream(client, CHAT, HELLO | {"stream_options": {"include_usage": True}})
        assert all(c["usage"] is None for c in chunks[:-1])
        assert chunks[-1]["choices"] == []
        usage = chunks[-1]["usage"]
        prompt, output = len(api.generator.submissions[0].prompt), len(api.generator.streams[0]._tokens)
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

    with_client(api, body)


def test_choices_interleave_and_each_ends_once(api):
    api.generator.reply = lambda prompt, params: [40 + params.seed % 7] * (3 + params.seed % 5) + [2]

    async def body(client):
        chunks = await stream(client, CHAT, HELLO | {"n": 4, "seed": 9})
        params = [s.params for s in api.generator.submissions]
        assert [p.seed for p in params] == [choice_seed(9, i) for i in range(4)]
        labels = [s.label for s in api.generator.submissions]
        assert labels == [f"{chunks[0]['id']}-{i}" for i in range(4)]
        decode = api.model.tokenizer.decode
        for i in range(4):
            mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
            assert mine[0]["delta"]["role"] == "assistant"
            assert [c["finish_reason"] for c in mine].count("stop") == 1 and mine[-1]["finish_reason"] == "stop"
            tokens = api.generator.reply([], params[i])[:-1]
            assert "".join(c["delta"].get("content", "") for c in mine) == decode(tokens)
        order = [c["choices"][0]["index"] for c in chunks]
        assert order != sorted(order)

    with_client(api, body)


def test_seed_of_the_first_choice_does_not_depend_on_n(api):
    async def body(client):
        for n in (1, 3):
            await client.post(CHAT, json=HELLO | {"n": n, "seed": -5})
        first, *rest = (s.params.seed for s in api.generator.submissions)
        assert rest[0] == first and len(set(rest)) == 3

    with_client(api, body)


def test_all_prompt_forms(api):
    encode = api.model.tokenizer.encode

    async def body(client):
        for prompt, expected in (
            ("ab", [encode("ab", True)]),
            (["ab", "cd"], [encode("ab", True), encode("cd", True)]),
            ([5, 6, 7], [[5, 6, 7]]),
            ([[5, 6], [7]], [[5, 6], [7]]),
        ):
            api.generator.submissions.clear()
            answer = await (await client.post(TEXT, json={"prompt": prompt, "n": 2})).json()
            assert [s.prompt for s in api.generator.submissions] == [p for p in expected for _ in range(2)]
            assert [c["index"] for c in answer["choices"]] == list(range(2 * len(expected)))
            assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
            assert answer["object"] == "text_completion"
        assert all(s.params.max_tokens == 16 for s in api.generator.submissions)
        assert len({s.params.seed for s in api.generator.submissions}) == 4

    with_client(api, body)


def test_echo_puts_the_prompt_before_the_output(api):
    async def body(client):
        ids = api.model.tokenizer.encode("some tokens", False)
        whole = await (await client.post(TEXT, json={"prompt": ["say: ", "x"], "echo": True, "max_tokens": 4})).json()
        assert [c["text"] for c in whole["choices"]] == [p + "the quick bro" for p in ("say: ", "x")]
        chunks = await stream(client, TEXT, {"prompt": ids, "echo": True, "max_tokens": 4})
        assert "".join(c["choices"][0]["text"] for c in chunks) == "some tokens" + "the quick bro"

    with_client(api, body)


def test_stop_string_ends_the_answer_and_cancels_its_stream(api):
    async def body(client):
        api.generator.hang_after = 15  # the answer must not need any token after the stop string
        request = HELLO | {"stop": ["fox j", "zzz"]}
        whole = await (await client.post(CHAT, json=request)).json()
        chunks = await stream(client, CHAT, request)
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        assert text == whole["choices"][0]["message"]["content"] == "the quick brown "
        assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "stop"
        assert all(s.cancelled for s in api.generator.streams) and api.generator.running == 0

    with_client(api, body)


def test_chat_logprobs(api):
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

    with_client(api, body)


def test_text_logprobs(api):
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

    with_client(api, body)


def test_special_tokens_are_shown_on_request(api):
    api.generator.reply = lambda prompt, params: [1, 70, 71, 0, 72, 2]

    async def body(client):
        hidden = await (await client.post(TEXT, json={"prompt": "x"})).json()
        shown = await (await client.post(TEXT, json={"prompt": "x", "skip_special_tokens": False})).json()
        plain = api.model.tokenizer.decode([70, 71, 72])
        assert hidden["choices"][0]["text"] == plain
        assert shown["choices"][0]["text"] == f"<|im_start|>{plain[:2]}<|endoftext|>{plain[2:]}"

    with_client(api, body)


def test_parameters_reach_the_engine(api):
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.2, "logit_bias": {"7": 5, "8": -100}, "max_tokens": 3, "max_completion_tokens": 9,
        "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [5], "priority": "high", "cache_salt": "me",
    }  # fmt: skip

    async def body(client):
        assert (await client.post(CHAT, json=HELLO | fields)).status == 200
        sent = api.generator.submissions[0]
        p = sent.params
        assert (p.temperature, p.top_p, p.top_k, p.min_p) == (0.5, 0.9, 0, 0.1)
        assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (1, -1, 1.2)
        assert (dict(p.logit_bias), p.stop_token_ids) == ({7: 5, 8: -100}, (5,))
        assert (p.max_tokens, p.min_tokens, p.ignore_eos, p.logprobs) == (9, 2, True, -1)
        assert (sent.priority, sent.cache_salt) == (-1, b"me")

    with_client(api, body)


@pytest.mark.parametrize(
    ("line", "fields", "salt"),
    [
        ("k", {}, b""),
        ("k", {"cache_salt": "mine"}, b"mine"),
        ("k tenant=a", {}, b"\xffa\xff"),
        ("k tenant=a", {"cache_salt": "mine"}, b"\xffa\xffmine"),
        ("k tenant=a priority=low", {"cache_salt": None}, b"\xffa\xff"),
    ],
)
def test_tenant_and_cache_salt_together_salt_the_prefix(model, line, fields, salt):
    api = make_api(model, keys=["other tenant=b", line])

    async def body(client):
        for path, prompt in ((CHAT, HELLO), (TEXT, {"prompt": "x"})):
            headers = {"Authorization": "Bearer k"}
            assert (await client.post(path, json=prompt | fields, headers=headers)).status == 200
        assert [s.cache_salt for s in api.generator.submissions] == [salt, salt]

    with_client(api, body)


@pytest.mark.parametrize(
    ("line", "address", "client"),
    [
        ("k tenant=a", "10.0.0.1", "tenant a"), ("k", "10.0.0.1", f"key {digest('k').hex()}"),
        ("", "10.0.0.1", "address 10.0.0.1"), ("", "fe80::1", "address fe80::1"),
        ("", "127.0.0.1", ""), ("", "127.1.2.3", ""), ("", "::1", ""), ("", None, ""),
    ],
)  # fmt: skip
def test_admission_tells_tenants_keys_and_addresses_apart(line, address, client):
    assert client_name(parse_key(line), address) == client


def test_the_client_reaches_admission(model):
    api = make_api(model, keys=["k tenant=a"])

    async def body(client):
        assert (await client.post(CHAT, json=HELLO, headers={"Authorization": "Bearer k"})).status == 200
        assert api.generator.submissions[0].client == "tenant a"
        assert api.generator.admitted == [(1, "tenant a", 0)]

    with_client(api, body)


SALTS = st.tuples(st.sampled_from(["", "a", "b", "aa"]), st.none() | st.text("ab\xff\x00\u00ff", max_size=3))


@given(SALTS, SALTS)
def test_only_one_tenant_and_one_cache_salt_give_a_salt(one, other):
    same = (one[0], one[1] or "") == (other[0], other[1] or "")
    assert (prefix_salt(*one) == prefix_salt(*other)) == same


@pytest.mark.parametrize(
    ("line", "fields", "priority"),
    [
        ("k", {}, 0),
        ("k priority=high", {}, -1),
        ("k priority=low", {"priority": None}, 1),
        ("k\tpriority=-7", {}, -7),
        ("k priority=low", {"priority": "high"}, 1),
        ("k priority=low", {"priority": -100}, 1),
        ("k priority=low", {"priority": 100}, 100),
        ("k", {"priority": "high"}, 0),
        ("k max-priority=high", {}, 0),
        ("k max-priority=high", {"priority": -100}, -1),
        ("k priority=low max-priority=-5", {"priority": -4}, -4),
        ("k priority=high", {"priority": 0}, 0),
    ],
)
def test_the_key_sets_the_priority_and_its_maximum(model, line, fields, priority):
    api = make_api(model, keys=["other priority=100", line])

    async def body(client):
        headers = {"Authorization": "Bearer k"}
        assert (await client.post(CHAT, json=HELLO | fields, headers=headers)).status == 200
        assert (await client.post(TEXT, json={"prompt": ["a", "b"]} | fields, headers=headers)).status == 200
        assert [sent.priority for sent in api.generator.submissions] == [priority] * 3

    with_client(api, body)


def test_output_fills_the_context_by_default(api):
    async def body(client):
        await client.post(CHAT, json=HELLO)
        sent = api.generator.submissions[0]
        assert sent.params.max_tokens == api.generator.max_model_len - len(sent.prompt)

    with_client(api, body)


def test_chat_template_renders_the_messages(api):
    async def body(client):
        messages = [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "tool", "content": "42", "tool_call_id": "c"},
        ]
        assert (await client.post(CHAT, json={"messages": messages, "unknown": {"deep": []}})).status == 200
        prompt = api.generator.submissions[0].prompt
        turns = [("system", "be brief"), ("user", "a\nb"), ("assistant", ""), ("tool", "42")]
        expected = "".join(f"<|im_start|>{r}\n{t}<|im_end|>\n" for r, t in turns) + "<|im_start|>assistant\n"
        assert prompt == api.model.tokenizer.encode(expected, False)

    with_client(api, body)


def test_special_tokens_are_added_to_text_but_not_to_templates(api, monkeypatch):
    encode, added = api.model.tokenizer.encode, []
    monkeypatch.setattr(api.model.tokenizer, "encode", lambda text, add: added.append(add) or encode(text, add))

    async def body(client):
        for path, request in (
            (CHAT, HELLO),
            (TEXT, {"prompt": "a"}),
            ("/tokenize", HELLO),
            ("/tokenize", {"prompt": "a"}),
        ):
            for override in ({}, {"add_special_tokens": False}, {"add_special_tokens": True}):
                assert (await client.post(path, json=request | override)).status == 200

    with_client(api, body)
    assert added == [False, False, True, True, False, True] * 2


def test_long_prompts_are_tokenised_in_a_thread(api):
    api.generator.max_model_len = 100_000

    async def body(client):
        text = "the quick brown fox " * 1000
        await client.post(TEXT, json={"prompt": text})
        assert api.generator.submissions[0].prompt == api.model.tokenizer.encode(text, True)

    with_client(api, body)


def test_metrics_add_up(api):
    async def body(client):
        await client.post(CHAT, json=HELLO | {"n": 2})
        await stream(client, TEXT, {"prompt": [[5], [6] * 30], "max_tokens": 4})
        await client.post(CHAT, json=HELLO | {"n": 99})
        text = await (await client.get("/metrics")).text()
        assert 'vllm:request_success_total{finished_reason="stop",model_name="tiny"} 2.0' in text

    with_client(api, body)
    tokens = 2 * len(api.generator.streams[0]._tokens) + 2 * 4
    assert api.counter("generation_tokens") == tokens
    assert api.counter("prompt_tokens") == sum(len(s.prompt) for s in api.generator.submissions)
    ends = [api.counter("request_success", reason) for reason in ("stop", "length", "abort", "error")]
    assert ends == [2, 2, 0, 0]
    assert api.counter("admission_rejections", "invalid") == 1
    assert api.counter("http_requests", "chat", "2xx") == 1


@pytest.mark.parametrize("n", [1, 3])
def test_the_usage_of_every_event_counts_the_output_up_to_it(api, monkeypatch, n):
    api.generator.num_cached_tokens = 2
    usage, seen = Answer.usage, []

    def checked(answer: Answer) -> dict:
        found = usage(answer)
        cached = sum(choice.num_cached_tokens for choice in answer.choices[::n])
        output = sum(choice.num_tokens for choice in answer.choices)
        prompt = sum(prompt.num_tokens for prompt in answer.prompts)
        assert answer.num_tokens() == (prompt, output)
        seen.append((prompt, output, cached))
        assert found == {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        return found

    monkeypatch.setattr(Answer, "usage", checked)

    async def body(client):
        request = {"prompt": ["one", "three", "x"], "n": n, "max_tokens": 8, "stop": "quick"}
        options = {"continuous_usage_stats": True, "include_usage": True}
        chunks = await stream(client, TEXT, request | {"stream_options": options})
        assert all("usage" in chunk for chunk in chunks)
        whole = await (await client.post(TEXT, json=request)).json()
        assert whole["usage"] == chunks[-1]["usage"]

    with_client(api, body)
    assert len(set(seen)) > 3 and seen[-1][2] == 6

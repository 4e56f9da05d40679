"""What an answer says of its prompt: echo with logprobs, scoring without output, prompt_logprobs and token ids; and
the fields that choose what may be sampled and what is shown of it."""

from __future__ import annotations

import json

import pytest

from tests.api.harness import ANSWER, CHAT, HELLO, TEXT, stream, with_client
from tests.api.test_refusals import refused


def joined(chunks, index=0):
    """Return the text and the logprobs of a streamed completion's choice."""
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    parts = [c["logprobs"] for c in choices if c["logprobs"]]
    names = parts[0] if parts else ()
    return "".join(c["text"] for c in choices), {k: [x for part in parts for x in part[k]] for k in names}


def check_offsets(text, logprobs):
    """Each token is in the text where its offset says, and all tokens together are the text."""
    ends = [*logprobs["text_offset"][1:], len(text)]
    shown = [text[start:end] for start, end in zip(logprobs["text_offset"], ends, strict=True)]
    assert "".join(shown) == text
    whole = [(a, b) for a, b in zip(shown, logprobs["tokens"], strict=True) if "\ufffd" not in b]
    assert len(whole) >= len(shown) - 2 and all(a == b for a, b in whole), whole


@pytest.mark.parametrize("max_tokens", [0, 5])
@pytest.mark.parametrize("form", ["text", "texts", "ids", "lists of ids"])
def test_echo_with_logprobs_scores_the_prompt(api, form, max_tokens):
    async def body(client):
        ids = api.model.tokenizer.encode("say: naïve", True)
        prompt = {"text": "say: naïve", "texts": ["say: naïve", "x"], "ids": ids, "lists of ids": [ids, [7]]}[form]
        request = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": max_tokens, "n": 2}
        whole = await (await client.post(TEXT, json=request)).json()
        chunks = await stream(client, TEXT, request)
        numbered = len(whole["choices"])
        assert numbered == (4 if form in ("texts", "lists of ids") else 2)
        output = "the quick brown"[: 0 if not max_tokens else None]
        for i, choice in enumerate(whole["choices"]):
            logprobs = choice["logprobs"]
            assert joined(chunks, i) == (choice["text"], logprobs)
            assert choice["finish_reason"] == "length"
            if i < 2:
                assert choice["text"].startswith("say: naïve")
                assert output.startswith(choice["text"].removeprefix("say: naïve")) or max_tokens
                assert logprobs["tokens"][: len(ids)] == [api.model.tokenizer.token_text(t) for t in ids]
                assert logprobs["token_logprobs"] == [
                    None,
                    *(-float(i) for i in range(1, len(ids))),
                    *[-0.5] * max_tokens,
                ]
                assert logprobs["top_logprobs"][0] is None
                assert all(len(tops) in (2, 3) for tops in logprobs["top_logprobs"][1:])
                check_offsets(choice["text"], logprobs)
        assert whole["usage"]["completion_tokens"] == max_tokens * numbered
        params = api.generator.submissions[0].params
        assert (params.max_tokens, params.logprobs, params.prompt_logprobs) == (max_tokens, 2, 2)
        assert "prompt_logprobs" not in whole["choices"][0]

    with_client(api, body)


def test_logprobs_without_echo_and_echo_without_logprobs_score_nothing(api):
    async def body(client):
        for fields in ({"logprobs": 1}, {"echo": True}):
            await client.post(TEXT, json={"prompt": "some words", "max_tokens": 2} | fields)
        assert [s.params.prompt_logprobs for s in api.generator.submissions] == [-1, -1]

    with_client(api, body)


def test_scoring_fills_the_whole_context(api):
    async def body(client):
        request = {"prompt": [5] * 256, "echo": True, "logprobs": 0}
        answer = await client.post(TEXT, json=request | {"max_tokens": 0})
        assert answer.status == 200
        found = (await answer.json())["choices"][0]["logprobs"]
        assert len(found["tokens"]) == 256 and found["top_logprobs"] is None
        assert (await refused(client, TEXT, request | {"max_tokens": 1}))["code"] == "context_length_exceeded"
        assert (await refused(client, TEXT, request | {"prompt": [5] * 257, "max_tokens": 0}))["param"] == "prompt"

    with_client(api, body)


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_prompt_logprobs_have_the_form_of_vllm(api, path):
    async def body(client):
        request = (HELLO if path == CHAT else {"prompt": "some words"}) | {"prompt_logprobs": 1, "max_tokens": 0}
        answer = await (await client.post(path, json=request)).json()
        prompt = api.generator.submissions[0].prompt
        found = (answer if path == CHAT else answer["choices"][0])["prompt_logprobs"]
        assert found[0] is None and len(found) == len(prompt)
        text = api.model.tokenizer.token_text
        for i, entries in enumerate(found[1:], 1):
            own = {"logprob": -float(i), "rank": i + 1, "decoded_token": text(prompt[i])}
            top = {"logprob": -0.25, "rank": 1, "decoded_token": text(10)}
            assert entries == {"10": top} | {str(prompt[i]): own}
        assert next(iter(found[1])) == str(prompt[1])
        assert answer["usage"]["completion_tokens"] == 0
        assert (await refused(client, path, request | {"stream": True}))["param"] == "prompt_logprobs"
        assert (await refused(client, path, request | {"prompt_logprobs": 21}))["param"] == "prompt_logprobs"

    with_client(api, body)


def test_a_chat_has_output_unless_it_asks_for_its_prompts_logprobs(api):
    async def body(client):
        for field in ("max_tokens", "max_completion_tokens"):
            assert (await refused(client, CHAT, HELLO | {field: 0}))["param"] == field
        whole = await (await client.post(TEXT, json={"prompt": "x", "max_tokens": 0})).json()
        assert (whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]) == ("", "length")

    with_client(api, body)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_token_ids_of_prompt_and_output(api, path, keep):
    async def body(client):
        request = (HELLO if path == CHAT else {"prompt": "some words"}) | {"return_token_ids": True, "n": 2}
        request |= {"max_tokens": 7, "stop": "brown"}
        whole = await (await client.post(path, json=request)).json()
        sent = api.generator.submissions[0]
        tokens = api.generator.streams[0]._tokens
        for choice in whole["choices"]:
            assert (whole if path == CHAT else choice)["prompt_token_ids"] == sent.prompt
            assert choice["token_ids"] == tokens[: len(choice["token_ids"])] and choice["token_ids"]
        headers = {"X-Llumd-Keep": "1"} if keep else {}
        answer = await client.post(path, json=request | {"stream": True}, headers=headers)
        lines = (await answer.text()).splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        for i, choice in enumerate(whole["choices"]):
            of_choice = [(chunk, c) for chunk in chunks for c in chunk["choices"] if c["index"] == i]
            prompts = [(chunk if path == CHAT else c).get("prompt_token_ids") for chunk, c in of_choice]
            assert prompts == [sent.prompt] + [None] * (len(prompts) - 1)
            assert [t for _, c in of_choice for t in c.get("token_ids", ())] == choice["token_ids"]

    with_client(api, body)


def test_the_stop_string_is_shown_on_request(api):
    async def body(client):
        for fields, shown in (({}, "the quick "), ({"include_stop_str_in_output": True}, "the quick brown")):
            request = HELLO | {"stop": ["brown", "zzz"]} | fields
            whole = await (await client.post(CHAT, json=request)).json()
            chunks = await stream(client, CHAT, request)
            assert whole["choices"][0]["message"]["content"] == shown
            assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == shown
        request = HELLO | {"include_stop_str_in_output": True, "skip_special_tokens": False}
        whole = await (await client.post(CHAT, json=request)).json()
        end = api.model.tokenizer.token_text(api.model.model_config.eos_token_ids[0])
        assert whole["choices"][0]["message"]["content"] == ANSWER + end

    with_client(api, body)


def test_allowed_tokens_and_bad_words_reach_the_engine(api):
    async def body(client):
        encode = api.model.tokenizer.encode
        request = HELLO | {"allowed_token_ids": [5, 9], "bad_words": ["fox", " lazy dog"]}
        assert (await client.post(CHAT, json=request)).status == 200
        params = api.generator.submissions[0].params
        assert params.allowed_token_ids == (5, 9)
        spelled = [tuple(encode(text, False)) for text in ("fox", " fox", "lazy dog", " lazy dog")]
        assert params.bad_words == tuple(dict.fromkeys(spelled))
        assert (await refused(client, CHAT, HELLO | {"allowed_token_ids": []}))["param"] == "allowed_token_ids"
        assert (await refused(client, CHAT, HELLO | {"allowed_token_ids": [384]}))["param"] == "allowed_token_ids"
        error = await refused(client, CHAT, HELLO | {"bad_words": ["a", ""]})
        assert error["message"] == "`bad_words[1]` must have 1 to 1024 characters."

    with_client(api, body)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, slice(7, 10)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, slice(0, 3)),
        ({"truncate_prompt_tokens": 99}, slice(0, 10)),
        ({"truncate_prompt_tokens": -1}, slice(0, 10)),
    ],
)
def test_a_prompt_is_truncated_on_request(api, fields, kept):
    async def body(client):
        ids = [65 + i for i in range(10)]
        request = {"prompt": ids, "echo": True, "max_tokens": 0} | fields
        answer = await (await client.post(TEXT, json=request)).json()
        assert api.generator.submissions[0].prompt == ids[kept]
        assert answer["choices"][0]["text"] == api.model.tokenizer.decode(ids[kept])

    with_client(api, body)


def test_a_prompt_of_any_length_is_truncated_to_what_fits(api):
    async def body(client):
        text = "word " * 200
        tokens = api.model.tokenizer.encode(text, True)
        request = {"prompt": text, "truncate_prompt_tokens": -1}
        assert len(tokens) > 256
        assert (await client.post(TEXT, json=request | {"max_tokens": 6})).status == 200
        assert (await client.post(TEXT, json=request | {"max_tokens": 0})).status == 200
        assert [s.prompt for s in api.generator.submissions] == [tokens[-250:], tokens[-256:]]
        assert (await refused(client, TEXT, {"prompt": text, "truncation_side": "left"}))[
            "param"
        ] == "truncation_side"
        assert (await refused(client, TEXT, {"prompt": text, "truncate_prompt_tokens": 0}))["param"] == "prompt"

    with_client(api, body)

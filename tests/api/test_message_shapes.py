"""The shapes of messages that clients send, down to the prompt of the engine."""

from __future__ import annotations

import pytest

from tests.api.harness import CHAT, HELLO, make_api, with_client
from tests.api.test_chat_messages import with_template
from tests.models.test_conversation import NO_SYSTEM

SAID = {"role": "user", "content": "hi"}


async def text_of(api, client, messages, **fields):
    body = {"messages": messages, **fields}
    response = await client.post(CHAT, json=body)
    assert response.status == 200, await response.text()
    shown = await (await client.post("/tokenize", json=body)).json()
    assert shown["tokens"] == api.generator.submissions[-1].prompt
    return b"".join(map(api.model.tokenizer.token_bytes, shown["tokens"])).decode()


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user", "content": None}, "<user></>"),
        ({"role": "system", "content": None}, "<system></>"),
        ({"role": "system", "content": ""}, "<system></>"),
        ({"role": "tool", "content": None, "tool_call_id": "c"}, "<tool></>"),
        ({"role": "assistant"}, "<assistant></>"),
        ({"role": "developer", "content": "be brief"}, "<system>be brief</>"),
        ({"role": "user", "content": []}, "<user></>"),
        ({"role": "user", "content": ["a", {"text": "b"}]}, "<user>a\nb</>"),
        ({"role": "user", "content": [{"type": "input_text", "text": "a"}]}, "<user>a</>"),
        ({"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}, "<assistant>a</>"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "<assistant>no</>"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "x"}}]}, "<user>a</>"),
        ({"role": "user", "content": "a", "name": "ann"}, "<user ann>a</>"),
    ],
)
def test_a_message(model, tmp_path, message, text):
    source = "{% for m in messages %}<{{ m.role }}{{ ' ' + m.name if m.name }}>{{ m.content }}</>{% endfor %}"
    api = make_api(with_template(model, tmp_path, source))

    async def body(client):
        assert await text_of(api, client, [message, SAID]) == text + "<user>hi</>"

    with_client(api, body)


@pytest.mark.parametrize(
    ("message", "param", "said"),
    [
        ({"role": "user"}, "messages.[0].content", "needs `content`"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
         "messages.[0].content.[0]", "`image_url`"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}]},
         "messages.[0].content.[1]", "`input_audio`"),
        ({"role": "user", "content": [{"type": "file", "file": {}}]}, "messages.[0].content.[0]", "`file`"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.[0].content.[0]", "needs a `text`"),
        ({"role": "narrator", "content": "a"}, "messages.[0].role", "must be one of"),
    ],
)  # fmt: skip
def test_a_message_that_is_refused(api, message, param, said):
    async def body(client):
        for path in (CHAT, "/tokenize"):
            response = await client.post(path, json={"messages": [message]})
            error = (await response.json())["error"]
            assert (response.status, error["param"]) == (400, param) and said in error["message"]

    with_client(api, body)


def test_a_template_that_wants_turns_gets_them(model, tmp_path):
    api = make_api(with_template(model, tmp_path, NO_SYSTEM))
    messages = [{"role": "developer", "content": "be brief"}, SAID, {"role": "user", "content": "there"}]

    async def body(client):
        assert await text_of(api, client, messages) == "<user>be brief\n\nhi\n\nthere</><model>"
        response = await client.post(CHAT, json={"messages": [{"role": "assistant", "content": "a"}, SAID]})
        assert response.status == 400 and "alternate" in await response.text()

    with_client(api, body)


def test_the_final_message_is_continued(model, tmp_path):
    api = make_api(with_template(model, tmp_path, NO_SYSTEM))
    messages = [SAID, {"role": "assistant", "content": "Once upon"}]

    async def body(client):
        for more in ({}, {"add_generation_prompt": False}):
            text = await text_of(api, client, messages, continue_final_message=True, **more)
            assert text == "<user>hi</><assistant>Once upon"
        assert (await text_of(api, client, messages, add_generation_prompt=False)).endswith("Once upon</>")
        answer = await client.post(
            CHAT, json={"messages": messages, "continue_final_message": True, "echo": True, "max_tokens": 3}
        )
        assert (await answer.json())["choices"][0]["message"]["content"].startswith("Once upon")

    with_client(api, body)


def test_what_cannot_be_continued_is_refused(api):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}

    async def body(client):
        for fields in (
            HELLO | {"add_generation_prompt": True},
            {"messages": [SAID, {"role": "assistant", "content": "x", "tool_calls": [call]}]},
        ):
            for path in (CHAT, "/tokenize"):
                response = await client.post(path, json=fields | {"continue_final_message": True})
                error = (await response.json())["error"]
                assert (response.status, error["param"]) == (400, "continue_final_message"), error

    with_client(api, body)

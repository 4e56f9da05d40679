"""The official Python client with the application on a loopback port."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.api.harness import ANSWER, make_api, with_client

MESSAGES = [{"role": "user", "content": "hello"}]


def with_sdk(api, body, **options) -> None:
    async def run(client):
        url = str(client.make_url("/v1"))
        options.setdefault("api_key", "any")
        async with openai.AsyncOpenAI(base_url=url, max_retries=0, **options) as sdk:
            await body(sdk)

    with_client(api, run)


def test_chat(api):
    async def body(sdk):
        answer = await sdk.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2)
        assert answer.choices[0].message.content == ANSWER
        assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens > 0
        assert answer._request_id
        assert answer.choices[0].logprobs.content[0].top_logprobs[1].logprob == -2.0
        text, last = "", None
        options = {"include_usage": True}
        async for chunk in await sdk.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options=options, extra_body={"top_k": 3}
        ):
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
            last = chunk
        assert text == ANSWER and last.usage == answer.usage

    with_sdk(api, body)


def test_chat_with_the_stream_accumulator(api):
    async def body(sdk):
        async with sdk.chat.completions.stream(model="tiny", messages=MESSAGES, n=2) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
        assert [c.message.content for c in final.choices] == [ANSWER] * 2
        assert [c.finish_reason for c in final.choices] == ["stop"] * 2

    with_sdk(api, body)


def test_completions(api):
    async def body(sdk):
        answer = await sdk.completions.create(model="tiny", prompt=["a", "b"], max_tokens=4, logprobs=1)
        assert [c.text for c in answer.choices] == ["the quick bro"] * 2
        assert answer.choices[0].finish_reason == "length"
        assert len(answer.choices[0].logprobs.tokens) == 4
        text = ""
        async for chunk in await sdk.completions.create(model="tiny", prompt=[5, 6], max_tokens=4, stream=True):
            text += chunk.choices[0].text
        assert text == "the quick bro"

    with_sdk(api, body)


def test_models(api):
    async def body(sdk):
        listed = [m async for m in sdk.models.list()]
        assert [m.id for m in listed] == ["tiny"] and listed[0].max_model_len == 256
        assert (await sdk.models.retrieve("tiny")).id == "tiny"

    with_sdk(api, body)


def test_errors_raise_the_exceptions_of_the_client(api):
    async def body(sdk):
        async def chat(**changes):
            return await sdk.chat.completions.create(**({"model": "tiny", "messages": MESSAGES} | changes))

        with pytest.raises(openai.BadRequestError) as bad:
            await chat(temperature=3)
        assert bad.value.param == "temperature" and "temperature" in bad.value.message
        with pytest.raises(openai.BadRequestError) as long:
            await chat(max_tokens=10_000)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError) as unknown:
            await chat(model="other")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            await sdk.embeddings.create(model="tiny", input="x")
        api.generator.limit = 0
        with pytest.raises(openai.RateLimitError) as busy:
            await chat(stream=True)
        assert busy.value.response.headers["retry-after"] == "3"
        api.generator.ready = False
        with pytest.raises(openai.InternalServerError) as down:
            await chat()
        assert down.value.status_code == 503

    with_sdk(api, body)


def test_engine_lost_in_mid_stream_is_raised(api):
    api.generator.lose_after = 6

    async def body(sdk):
        with pytest.raises(openai.APIError, match="could not finish"):
            async for _ in await sdk.chat.completions.create(model="tiny", messages=MESSAGES, stream=True):
                pass

    with_sdk(api, body)


def test_keys(model):
    api = make_api(model, keys=["secret"])

    async def right(sdk):
        assert (await sdk.completions.create(model="tiny", prompt="a")).choices

    async def wrong(sdk):
        with pytest.raises(openai.AuthenticationError):
            await sdk.completions.create(model="tiny", prompt="a")

    with_sdk(api, right, api_key="secret")
    with_sdk(make_api(model, keys=["secret"]), wrong, api_key="guess")


def test_client_retries_a_temporary_refusal(api):
    api.generator.limit = 0

    async def body(sdk):
        async def recover():
            await asyncio.sleep(0.1)
            api.generator.limit = 64

        api.generator.retry_after = 1
        recovery = asyncio.create_task(recover())
        answer = await sdk.with_options(max_retries=2).completions.create(model="tiny", prompt="a")
        assert answer.choices
        await recovery

    with_sdk(api, body)


def test_a_kept_stream(api):
    async def body(sdk):
        stream = await sdk.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, extra_headers={"X-Llumd-Keep": "1"}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
        assert stream.response.headers["X-Llumd-Stream"] == chunks[0].id
        again = await sdk.get(
            f"/streams/{chunks[0].id}?from=3",
            cast_to=openai.types.chat.ChatCompletionChunk,
            stream=True,
            stream_cls=openai.AsyncStream[openai.types.chat.ChatCompletionChunk],
        )
        rest = [chunk async for chunk in again]
        assert ANSWER.endswith("".join(chunk.choices[0].delta.content or "" for chunk in rest))
        assert rest[-1].choices[0].finish_reason == "stop"

    with_sdk(api, body)

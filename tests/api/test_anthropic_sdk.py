"""Anthropic's Python client with the application on a loopback port."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import pytest

from tests.api.harness import ANSWER, ApiUnderTest, Model, make_api, with_client
from tests.api.test_anthropic_messages import CALL, INPUT, WEATHER, says

USER: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture
def api(model: Model) -> ApiUnderTest:
    found = make_api(model)
    found.generator.max_model_len = 2048
    return found


def with_sdk(
    api: ApiUnderTest, body: Callable[[anthropic.AsyncAnthropic], Awaitable[None]], key: str = "any"
) -> None:
    async def run(client: Any) -> None:
        url = str(client.make_url("/"))
        async with anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0) as sdk:
            await body(sdk)

    with_client(api, run)


def test_a_message(api: ApiUnderTest):
    async def body(sdk: anthropic.AsyncAnthropic) -> None:
        message = await sdk.messages.create(
            model="tiny", max_tokens=100, messages=USER, system="Be brief.", extra_body={"top_k": 5}
        )
        assert message.content[0].type == "text" and message.content[0].text == ANSWER
        assert message.stop_reason == "end_turn" and message.usage.output_tokens > 5
        assert message._request_id == message.id
        count = await sdk.messages.count_tokens(model="tiny", messages=USER, system="Be brief.")
        assert count.input_tokens == message.usage.input_tokens

    with_sdk(api, body)


def test_a_stream(api: ApiUnderTest):
    async def body(sdk: anthropic.AsyncAnthropic) -> None:
        async with sdk.messages.stream(
            model="tiny", max_tokens=100, messages=USER, stop_sequences=[" fox"]
        ) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            message = await stream.get_final_message()
        assert text == "the quick brown"
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " fox")
        assert message.usage.output_tokens > 1

    with_sdk(api, body)


def test_thinking(model: Model):
    api = make_api(model, reasoning_format="think")
    says(api, "<think>Let me see.</think>It is.")

    async def body(sdk: anthropic.AsyncAnthropic) -> None:
        async with sdk.messages.stream(
            model="tiny", max_tokens=100, messages=USER, thinking={"type": "adaptive"}
        ) as stream:
            message = await stream.get_final_message()
        thought, text = message.content
        assert thought.type == "thinking" and thought.thinking == "Let me see." and thought.signature
        assert text.type == "text" and text.text == "It is."
        again: Any = [*USER, {"role": "assistant", "content": message.content}, *USER]
        assert await sdk.messages.create(model="tiny", max_tokens=100, messages=again)

    with_sdk(api, body)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_tool_loop(api: ApiUnderTest, streamed: bool):
    asked: list[Any] = []

    @anthropic.beta_async_tool
    async def weather(city: str, days: int) -> str:
        """Tells the weather."""
        asked.append((city, days))
        return f"sunny in {city}"

    def reply(prompt: list[int], _: Any) -> list[int]:
        text = api.model.tokenizer.decode(prompt)
        says(api, "It is sunny." if "sunny in Rome" in text else CALL)
        tokens = api.generator.reply(prompt, _)
        api.generator.reply = reply
        return tokens

    api.generator.reply = reply

    async def body(sdk: anthropic.AsyncAnthropic) -> None:
        runner = sdk.beta.messages.tool_runner(
            model="tiny", max_tokens=200, messages=USER, tools=[weather], stream=streamed
        )
        if streamed:
            async for stream in runner:
                last = await stream.get_final_message()
        else:
            last = await runner.until_done()
        assert asked == [("Rome", INPUT["days"])]
        assert last.content[0].type == "text" and last.content[0].text == "It is sunny."

    with_sdk(api, body)


def test_calls_are_whole_in_the_accumulator(api: ApiUnderTest):
    says(api, f"[{CALL}, {CALL}]")

    async def body(sdk: anthropic.AsyncAnthropic) -> None:
        tools: Any = [WEATHER]
        async with sdk.messages.stream(model="tiny", max_tokens=200, messages=USER, tools=tools) as stream:
            message = await stream.get_final_message()
        assert [block.input for block in message.content if block.type == "tool_use"] == [INPUT, INPUT]
        assert len({block.id for block in message.content if block.type == "tool_use"}) == 2
        assert message.stop_reason == "tool_use"

    with_sdk(api, body)


def test_errors(model: Model):
    api = make_api(model, keys=["secret"])

    async def with_key(sdk: anthropic.AsyncAnthropic) -> None:
        with pytest.raises(anthropic.NotFoundError, match="claude") as missing:
            await sdk.messages.create(model="claude", max_tokens=1, messages=USER)
        assert missing.value.request_id
        image: Any = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]
        with pytest.raises(anthropic.BadRequestError, match="`image`"):
            await sdk.messages.create(model="tiny", max_tokens=1, messages=image)
        api.generator.ready = False
        with pytest.raises(anthropic.ServiceUnavailableError):
            await sdk.messages.create(model="tiny", max_tokens=1, messages=USER)

    async def without(sdk: anthropic.AsyncAnthropic) -> None:
        with pytest.raises(anthropic.AuthenticationError):
            await sdk.messages.create(model="tiny", max_tokens=1, messages=USER)

    with_sdk(api, with_key, key="secret")
    api = make_api(model, keys=["secret"])
    with_sdk(api, without, key="other")

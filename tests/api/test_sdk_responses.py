"""The Responses API through the official Python client, and a loop of tools by hand."""

from __future__ import annotations

import json

import openai
import pytest

from tests.api.harness import ANSWER
from tests.api.responses_client import TURN, WEATHER, agent_api
from tests.api.test_sdk import with_sdk


def test_create(api):
    async def body(sdk):
        answer = await sdk.responses.create(model="tiny", input="hello", instructions="Be brief.")
        assert answer.output_text == ANSWER and answer.status == "completed" and answer._request_id
        assert answer.usage.output_tokens > 0 and answer.store is False

    with_sdk(api, body)


def test_stream(api):
    async def body(sdk):
        text = ""
        async for event in await sdk.responses.create(model="tiny", input="hello", stream=True):
            text += event.delta if event.type == "response.output_text.delta" else ""
        assert text == ANSWER
        async with sdk.responses.stream(model="tiny", input="hello") as stream:
            snapshots = [event.snapshot async for event in stream if event.type == "response.output_text.delta"]
            final = await stream.get_final_response()
        assert snapshots[-1] == final.output_text == ANSWER

    with_sdk(api, body)


def test_a_loop_with_tools(model):
    api = agent_api(model, TURN)

    async def body(sdk):
        asked = [{"role": "user", "content": "How is the weather?"}]
        async with sdk.responses.stream(model="tiny", input=asked, tools=[WEATHER]) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        snapshots = [e.snapshot for e in events if e.type == "response.function_call_arguments.delta"]
        assert snapshots[-1] == '{"city": "Rom 🙂"}'
        calls = [item for item in final.output if item.type == "function_call"]
        assert [json.loads(call.arguments)["city"] for call in calls] == ["Köln", "Rom 🙂"]
        # What came back goes into the next request as it is.
        asked += final.output
        asked += [{"type": "function_call_output", "call_id": c.call_id, "output": "12 °C"} for c in calls]
        assert (await sdk.responses.create(model="tiny", input=asked, tools=[WEATHER])).status == "completed"
        prompt = model.tokenizer.decode(api.generator.submissions[-1].prompt)
        assert prompt.count("12 °C") == 2 and "Let me see." in prompt and "Rom 🙂" in prompt

    with_sdk(api, body)


def test_errors(api):
    async def body(sdk):
        with pytest.raises(openai.BadRequestError) as bad:
            await sdk.responses.create(model="tiny", input="hello", previous_response_id="resp_1")
        assert bad.value.param == "previous_response_id"
        with pytest.raises(openai.NotFoundError) as unknown:
            await sdk.responses.retrieve("resp_1")
        assert unknown.value.code == "unsupported_url"
        with pytest.raises(openai.NotFoundError):
            await sdk.responses.delete("resp_1")
        api.generator.lose_after = 6
        events = [e async for e in await sdk.responses.create(model="tiny", input="hello", stream=True)]
        assert events[-1].type == "response.failed" and "could not finish" in events[-1].response.error.message

    with_sdk(api, body)

"""Requests to /v1/responses, and the types of OpenAI's package as judges of what comes back."""

from __future__ import annotations

import json
from typing import Any

from aiohttp.test_utils import TestClient
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.api.harness import ApiUnderTest, Model, make_api
from tests.models.tiny_model import EOS_ID

PATH = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": None,
}
THOUGHT = "<think>\nWhich city? Köln.\n</think>\n\n"
CALLS = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rom 🙂"}}\n</tool_call>'
)
TURN = f"{THOUGHT}Let me see.\n{CALLS}"

_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def agent_api(model: Model, text: str, **options: Any) -> ApiUnderTest:
    """Return an application whose model thinks and calls tools. It answers with `text`."""
    api = make_api(model, **({"tool_format": "hermes", "reasoning_format": "think"} | options))
    tokens = [*model.tokenizer.encode(text, False), EOS_ID]
    api.generator.reply = lambda prompt, params: tokens
    api.generator.max_model_len = 4096
    return api


async def create(client: TestClient, body: dict[str, Any]) -> dict[str, Any]:
    """Return the response to a request that does not stream."""
    answer = await client.post(PATH, json=body)
    text = await answer.text()
    assert answer.status == 200, text
    Response.model_validate_json(text)
    return json.loads(text)


async def refusal(client: TestClient, body: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post(PATH, json=body)
    assert answer.status in (400, 404), await answer.text()
    return (await answer.json())["error"]


async def stream(client: TestClient, body: dict[str, Any], **headers: str) -> list[dict[str, Any]]:
    answer = await client.post(PATH, json=body | {"stream": True}, headers=headers)
    assert answer.status == 200, await answer.text()
    return [event for _, event in parse(await answer.text())]


def parse(body: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (id, event) of each event of a stream; each has the type that its name says, and is valid."""
    found = []
    for event in body.split("\n\n"):
        if event and not event.startswith(":"):
            fields = dict(line.split(": ", 1) for line in event.split("\n"))
            data = json.loads(fields["data"])
            assert data["type"] == fields["event"]
            _EVENT.validate_json(fields["data"])
            found.append((fields.get("id", ""), data))
    return found


def merged(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events without numbers, and adjacent pieces of one text as one."""
    found: list[dict[str, Any]] = []
    for given in events:
        event = {name: value for name, value in given.items() if name != "sequence_number"}
        last = found[-1] if found else {}
        if event["type"].endswith(".delta") and event["type"] == last.get("type"):
            last["delta"] += event["delta"]
            if "logprobs" in event:
                last["logprobs"] = last["logprobs"] + event["logprobs"]
        else:
            found.append(event)
    return found

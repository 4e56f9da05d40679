"""The description at /openapi.json: it names every route, and answers have the types that it says."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from daemon.api.routes import answers
from daemon.api.schemas import ROLES
from tests.api.harness import CHAT, HELLO, TEXT, events, make_api, with_client


def strict(kind: type[msgspec.Struct], value: Any) -> None:
    """Check that a decoded JSON value is of a type, and has no field that the type does not have."""
    back = msgspec.to_builtins(msgspec.convert(value, kind, strict=True))
    assert value == back, "the type lacks a field"


async def description(client: Any, **options: Any) -> dict[str, Any]:
    response = await client.get("/openapi.json", **options)
    assert response.status == 200
    return json.loads(await response.text())


def test_every_route_is_described(api):
    async def body(client):
        found = await description(client)
        strict(answers.Description, found)
        described = {(method.upper(), path) for path, methods in found["paths"].items() for method in methods}
        for route in api.app.router.routes():
            path = route.resource.canonical
            assert route.method == "HEAD" or (route.method, path) in described, path
        ids = [operation["operationId"] for methods in found["paths"].values() for operation in methods.values()]
        assert len(ids) == len(set(ids))

    with_client(api, body)


def refs(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [value[k] for k in value if k == "$ref"] + [ref for v in value.values() for ref in refs(v)]
    return [ref for v in value for ref in refs(v)] if isinstance(value, list) else []


def test_the_description_is_whole_and_says_which_values_are_accepted(api):
    async def body(client):
        found = await description(client)
        schemas = found["components"]["schemas"]
        assert {ref.removeprefix("#/components/schemas/") for ref in refs(found)} == set(schemas)
        chat = schemas["ChatRequest"]
        assert chat["required"] == ["messages"]
        assert chat["properties"]["temperature"]["anyOf"][0]["maximum"] == 2
        assert schemas["Message"]["properties"]["role"]["enum"] == list(ROLES)
        suffix = schemas["CompletionRequest"]["properties"]["suffix"]
        assert suffix["enum"] == [None, False, "", [], {}] and suffix["description"].startswith("Not supported. ")
        assert found["paths"]["/v1/models/{model}"]["get"]["parameters"][0]["required"] is True
        assert "security" not in found

    with_client(api, body)


def test_keys_are_described(model):
    async def body(client):
        assert (await client.get("/openapi.json")).status == 401
        found = await description(client, headers={"api-key": "secret"})
        assert found["security"] == [{"bearer": []}, {"x-api-key": []}, {"api-key": []}]
        assert found["paths"]["/health"]["get"]["security"] == []
        assert "401" in found["paths"][CHAT]["post"]["responses"]

    with_client(make_api(model, keys=["secret"]), body)


ASKED = [
    (CHAT, HELLO, answers.ChatCompletion, answers.ChatCompletionChunk),
    (
        CHAT,
        HELLO | {"logprobs": True, "top_logprobs": 2, "n": 2},
        answers.ChatCompletion,
        answers.ChatCompletionChunk,
    ),
    (TEXT, {"prompt": "x", "max_tokens": 2}, answers.Completion, answers.Completion),
    (TEXT, {"prompt": ["x", "y"], "logprobs": 2, "n": 2}, answers.Completion, answers.Completion),
    (TEXT, {"prompt": "x", "logprobs": 0}, answers.Completion, answers.Completion),
    ("/tokenize", {"prompt": "x", "return_token_strs": True}, answers.Tokens, None),
    ("/tokenize", HELLO, answers.Tokens, None),
    ("/detokenize", {"tokens": [5, 6]}, answers.Text, None),
]


@pytest.mark.parametrize(("path", "request_body", "whole", "event"), ASKED)
def test_answers_have_the_types_of_the_description(api, path, request_body, whole, event):
    async def body(client):
        response = await client.post(path, json=request_body)
        strict(whole, json.loads(await response.text()))
        for options in ({}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}):
            if event is not None:
                streamed = request_body | {"stream": True} | ({"stream_options": options} if options else {})
                for found in events(await (await client.post(path, json=streamed)).text()):
                    strict(event, found)

    with_client(api, body)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/models", answers.ModelList),
        ("/v1/models/tiny", answers.Model),
        ("/health", answers.Status),
        ("/health/ready", answers.Status),
        ("/ping", answers.Status),
        ("/version", answers.Version),
        ("/load", answers.Load),
        ("/v1/nothing", answers.ErrorAnswer),
        ("/v1/embeddings", answers.ErrorAnswer),
    ],
)
def test_other_answers_do_too(api, path, kind):
    async def body(client):
        strict(kind, json.loads(await (await client.get(path)).text()))

    with_client(api, body)

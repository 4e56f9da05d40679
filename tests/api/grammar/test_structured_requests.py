"""Requests with a form over HTTP: what reaches the engines, and what is refused before anything is queued."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.api.harness import CHAT, HELLO, TEXT, ApiUnderTest, Model, make_api, with_client
from tests.api.test_refusals import refused
from tests.models.tiny_model import EOS_ID

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "look"}}


@pytest.fixture
def api(model: Model) -> Iterator[ApiUnderTest]:
    api = make_api(model)
    api.generator.max_model_len = 8192
    yield api


def test_the_grammar_reaches_the_engine_with_its_ends(api):
    async def body(client):
        for path, fields in [
            (CHAT, HELLO | {"response_format": FORMAT, "n": 2}),
            (TEXT, {"prompt": "x", "guided_regex": "a+", "stop_token_ids": [7], "logprobs": 2, "stream": True}),
            (CHAT, HELLO | {"tools": [TOOL], "tool_choice": "required"}),
            (CHAT, HELLO | {"tools": [TOOL], "tool_choice": NAMED}),
            (CHAT, HELLO | {"tools": [TOOL], "response_format": FORMAT}),
            (CHAT, HELLO | {"tools": [TOOL]}),
        ]:
            assert (await client.post(path, json=fields)).status == 200

    with_client(api, body)
    grammars = [s.params.grammar for s in api.generator.submissions]
    assert grammars[0] == grammars[1] and json.loads(grammars[0])["grammars"][0]["json_schema"]["properties"]
    assert "a+" in grammars[2]
    assert all("look" in grammar for grammar in grammars[3:6]) and not grammars[6]
    stops = [s.params.stop_token_ids for s in api.generator.submissions]
    assert stops == [(EOS_ID,)] * 2 + [(7, EOS_ID)] + [(EOS_ID,)] * 3 + [()]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "response_format"),
        ({"guided_regex": "(?<=a)b"}, "guided_regex"),
        ({"regex": "a" * 2000}, "regex"),
        ({"guided_json": SCHEMA, "min_tokens": 2}, "min_tokens"),
        ({"tools": [TOOL], "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
def test_a_bad_form_is_refused_before_anything_is_queued(model, fields, param):
    api = make_api(model, max_grammar=1024)
    api.generator.max_model_len = 8192

    async def body(client):
        for stream in (False, True):
            assert (await refused(client, CHAT, HELLO | fields | {"stream": stream}))["param"] == param

    with_client(api, body)
    assert api.generator.submissions == [] and api.generator.places == 0

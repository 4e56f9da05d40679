"""From the fields of a request to its grammar, and what cannot be combined."""

from __future__ import annotations

import json

import msgspec
import pytest

from daemon.api.errors import ApiError
from daemon.api.grammar.requested import forget_forms, requested_grammar
from daemon.api.schemas import CompletionRequest
from daemon.models.grammar.source import GrammarKind, GrammarSource

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}
TEXT = json.dumps(SCHEMA)


def request(**fields: object) -> CompletionRequest:
    return msgspec.json.decode(json.dumps({"prompt": "x"} | fields), type=CompletionRequest)


def source(kind: GrammarKind, text: str, **options: object) -> GrammarSource:
    return GrammarSource(kind, text, **options)


FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
STRICT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
ANY_OBJECT = '{"type":"object"}'
OUTPUTS = {"json": SCHEMA, "disable_any_whitespace": True, "disable_additional_properties": True}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, source(GrammarKind.JSON_SCHEMA, ANY_OBJECT)),
        ({"response_format": FORMAT}, source(GrammarKind.JSON_SCHEMA, TEXT, lenient=True)),
        ({"response_format": STRICT}, source(GrammarKind.JSON_SCHEMA, TEXT)),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            source(GrammarKind.JSON_SCHEMA, TEXT, lenient=True),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, source(GrammarKind.JSON_SCHEMA, TEXT)),
        ({"structured_outputs": {"json": TEXT}}, source(GrammarKind.JSON_SCHEMA, TEXT)),
        ({"structured_outputs": OUTPUTS}, source(GrammarKind.JSON_SCHEMA, TEXT, compact=True, closed=True)),
        ({"structured_outputs": {"json_object": True}}, source(GrammarKind.JSON_SCHEMA, ANY_OBJECT)),
        ({"structured_outputs": {"regex": "a+"}}, source(GrammarKind.REGEX, "a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, source(GrammarKind.CHOICE, '["a","b"]')),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, source(GrammarKind.GRAMMAR, 'start: "a"')),
        ({"guided_json": SCHEMA}, source(GrammarKind.JSON_SCHEMA, TEXT)),
        ({"guided_json": TEXT}, source(GrammarKind.JSON_SCHEMA, TEXT)),
        (
            {"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"},
            source(GrammarKind.JSON_SCHEMA, TEXT, whitespace=" ?"),
        ),
        ({"guided_json_object": True}, source(GrammarKind.JSON_SCHEMA, ANY_OBJECT)),
        ({"guided_regex": "a"}, source(GrammarKind.REGEX, "a")),
        ({"guided_choice": ["a"]}, source(GrammarKind.CHOICE, '["a"]')),
        ({"guided_grammar": "g"}, source(GrammarKind.GRAMMAR, "g")),
        ({"regex": "a"}, source(GrammarKind.REGEX, "a")),
        ({"ebnf": "g"}, source(GrammarKind.GRAMMAR, "g")),
        ({"grammar": "g"}, source(GrammarKind.GRAMMAR, "g")),
        ({"json_schema": TEXT}, source(GrammarKind.JSON_SCHEMA, TEXT)),
        ({"json_schema": SCHEMA}, source(GrammarKind.JSON_SCHEMA, TEXT)),
        ({"guided_json": None, "guided_regex": "", "guided_choice": [], "json_schema": "", "regex": None}, None),
    ],
)
def test_each_field_gives_its_grammar(fields, expected):
    found = requested_grammar(request(**fields))
    if expected is None:
        assert found is None
    else:
        assert found is not None and found.source == expected
        assert found.param in fields


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex", "both constrain"),
        ({"response_format": FORMAT, "regex": "a"}, "regex", "both constrain"),
        ({"response_format": {"type": "xml"}}, "response_format", "one of text, json_object, json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "is required"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format",
            "is required",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos", "cannot be combined"),
        ({"regex": "a", "min_tokens": 3}, "min_tokens", "cannot be combined"),
        ({"regex": "a", "allowed_token_ids": [3]}, "allowed_token_ids", "cannot be combined"),
        ({"regex": "a", "bad_words": ["b"]}, "bad_words", "cannot be combined"),
    ],
)
def test_what_cannot_be_a_grammar_is_refused_by_name(fields, param, message):
    with pytest.raises(ApiError, match=message) as raised:
        requested_grammar(request(**fields))
    assert (raised.value.status, raised.value.param) == (400, param)


def test_a_request_forgets_its_forms():
    body = request(response_format=FORMAT, guided_json=SCHEMA, guided_choice=["a"], json_schema=TEXT, ebnf="g")
    forget_forms(body)
    assert requested_grammar(body) is None

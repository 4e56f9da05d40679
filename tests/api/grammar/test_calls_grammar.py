"""Grammars of tool calls: what they allow is what the parser of the same form reads, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from daemon.api.grammar.reasoning import after_reasoning
from daemon.api.grammar.tools import MAX_CALLS, calls_rules
from daemon.api.parse.formats import PARSERS, Parsing, new_parser, write_calls
from daemon.api.parse.parts import CallArguments, CallBegin, Text
from daemon.models.grammar.source import GrammarKind, GrammarSource, to_llguidance
from daemon.models.grammar.vocabulary import Vocabulary
from daemon.models.tokenizer import Tokenizer
from tests.models.grammar.walk import random_answer
from tests.models.tiny_model import EOS_ID, make_tiny_llama

VOCAB = 400
MARKERS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>")
NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": False}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
                "required": ["unit", "days"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "clock"}},
    {
        "type": "function",
        "function": {"name": "walk", "parameters": {"$ref": "#/$defs/node", "$defs": {"node": NODE}}},
    },
]
NAMES = ("get_weather", "clock", "walk")


@pytest.fixture(scope="module", params=["text", "tokens"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The markers are text in the one, and tokens in the other."""
    path: Path = make_tiny_llama(tmp_path_factory.mktemp("model"), weights=False, vocab=384)
    if request.param == "tokens":
        file = path / "tokenizer.json"
        state = json.loads(file.read_text())
        like = state["added_tokens"][0]
        state["added_tokens"] += [like | {"id": 384 + i, "content": text} for i, text in enumerate(MARKERS)]
        file.write_text(json.dumps(state))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer, VOCAB, (EOS_ID,))


def source_of(tokenizer: Tokenizer, tool_format: str, *, parallel: bool = True, names=NAMES) -> GrammarSource:
    rules = calls_rules(TOOLS, names, tool_format, parallel=parallel, token_id=tokenizer.marker_id)
    return GrammarSource(GrammarKind.NONE, calls=rules)


def accepts(vocabulary: Vocabulary, tokenizer: Tokenizer, source: GrammarSource, text: str) -> bool:
    matcher = vocabulary.compile(to_llguidance(source))
    tokens = tokenizer.encode(text, False)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def text_of(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return b"".join(tokenizer.token_bytes(token) for token in tokens if token != EOS_ID).decode()


@pytest.mark.parametrize("tool_format", PARSERS)
@pytest.mark.parametrize("seed", range(3))
def test_a_random_answer_is_calls_that_the_parser_reads(vocabulary, tokenizer, tool_format, seed):
    names = NAMES[:2]  # the arguments of the third may go on for ever
    answer = random_answer(vocabulary, source_of(tokenizer, tool_format, names=names), seed, {EOS_ID}, most=3000)
    assert answer[-1] == EOS_ID
    parser = new_parser(Parsing(tool_format, names), answer="a", choice=0, thinking=False)
    parts = parser.push(text_of(tokenizer, answer)) + parser.finish()
    assert not any(isinstance(part, Text) for part in parts)
    called = [part.name for part in parts if isinstance(part, CallBegin)]
    assert 1 <= len(called) <= MAX_CALLS
    for i, name in enumerate(called):
        arguments = json.loads("".join(p.text for p in parts if isinstance(p, CallArguments) and p.index == i))
        assert set(arguments) == ({"unit", "days"} if name == "get_weather" else set())
        assert name != "get_weather" or (arguments["unit"] in "CF" and 1 <= arguments["days"] <= 9)


@pytest.mark.parametrize("tool_format", PARSERS)
def test_one_call_is_enforced_where_only_one_is_allowed(vocabulary, tokenizer, tool_format):
    source = source_of(tokenizer, tool_format, parallel=False, names=("walk",))
    if tool_format == "mistral" and tokenizer.marker_id("[ARGS]") is not None:
        one = '[TOOL_CALLS]walk[ARGS]{"next": {"next": {}}}'
        two = one + one
    else:
        one, two = (write_calls(tool_format, [("walk", '{"next": {"next": {}}}')] * n) for n in (1, 2))
    assert accepts(vocabulary, tokenizer, source, one)
    for text in (two, one.replace("walk", "clock"), one.replace("next", "last"), "hello", ""):
        assert not accepts(vocabulary, tokenizer, source, text), text


def test_an_answer_may_be_calls_or_the_form_that_is_asked_for(vocabulary, tokenizer):
    calls = source_of(tokenizer, "json", names=("clock",))
    source = replace(calls, kind=GrammarKind.JSON_SCHEMA, text='{"type": "object", "properties": {"a": {}}}')
    for text in ('{"a": 1}', write_calls("json", [("clock", "{}")]), write_calls("json", [("clock", "{}")] * 2)):
        assert accepts(vocabulary, tokenizer, source, text), text
    assert not accepts(vocabulary, tokenizer, source, "hello")


FORMS = {
    GrammarKind.JSON_SCHEMA: ('{"type": "object"}', "{}"),
    GrammarKind.REGEX: ("[0-9]+/", "12/"),
    GrammarKind.CHOICE: ('["yes", "no"]', "no"),
    GrammarKind.GRAMMAR: ('root ::= "a" "b"', "ab"),
}


@pytest.mark.parametrize("kind", FORMS)
def test_reasoning_may_come_before_what_is_enforced(vocabulary, tokenizer, kind):
    source, answer = GrammarSource(kind, FORMS[kind][0]), FORMS[kind][1]
    may = after_reasoning(source, tokenizer.marker_id, open=False)
    begun = after_reasoning(source, tokenizer.marker_id, open=True)
    thought = 'so {"a": 1} is\nnot it</think>\n\n'
    assert accepts(vocabulary, tokenizer, may, answer)
    assert accepts(vocabulary, tokenizer, may, f"<think>{thought}{answer}")
    assert accepts(vocabulary, tokenizer, begun, f"{thought}{answer}")
    assert not accepts(vocabulary, tokenizer, begun, "still thinking")
    for text in (f"{thought}{answer}", f"<think>{thought}", f"<think>{thought}x"):
        assert not accepts(vocabulary, tokenizer, may, text), text


def test_references_name_the_parts_of_their_own_schema(vocabulary, tokenizer):
    source = source_of(tokenizer, "json", names=("walk", "get_weather"), parallel=False)
    deep = '{"name": "walk", "arguments": {"next": {"next": {"next": {}}}}}'
    assert accepts(vocabulary, tokenizer, source, deep)
    assert not accepts(vocabulary, tokenizer, source, deep.replace('{"next": {}}', '{"next": 1}'))

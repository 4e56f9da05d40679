"""Grammars compiled for a tokenizer: what the masks allow, and what they never do."""

from __future__ import annotations

import json

import numpy as np
import pytest
from msgspec.structs import replace

from daemon.models.grammar.errors import GrammarError
from daemon.models.grammar.source import GrammarKind, GrammarSource, to_llguidance
from daemon.models.grammar.vocabulary import Vocabulary
from daemon.models.tokenizer import Tokenizer
from tests.models.grammar.walk import random_answer
from tests.models.tiny_model import EOS_ID, make_tiny_llama

VOCAB = 384


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_tiny_llama(tmp_path_factory.mktemp("model"), weights=False, vocab=VOCAB))


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer, VOCAB, (EOS_ID,))


def accepts(vocabulary: Vocabulary, tokenizer: Tokenizer, source: GrammarSource, text: str) -> bool:
    """Return True if an answer may be `text`, and may end there."""
    matcher = vocabulary.compile(to_llguidance(source))
    tokens = tokenizer.encode(text, False)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]}
PLAIN = GrammarSource(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
SOURCES = {
    "schema": (PLAIN, ['{"a": 1}', '{"a":1,"b":"x"}', '{"a":1,"c":2}'], ['{"b":"x"}', "[]", "{}"]),
    "compact": (replace(PLAIN, compact=True), ['{"a":1}'], ['{"a": 1}']),
    "closed": (replace(PLAIN, closed=True), ['{"a":1}'], ['{"a":1,"c":2}']),
    "any": (GrammarSource(GrammarKind.JSON_SCHEMA, "true"), ["[1, null]", '"x"'], ["[1"]),
    "regex": (GrammarSource(GrammarKind.REGEX, r"^[a-c]{2,3}|\d+$"), ["ab", "cab", "17"], ["a", "abd", "ab7"]),
    "choice": (GrammarSource(GrammarKind.CHOICE, '["yes", "no, é \\"x\\""]'), ["yes", 'no, é "x"'], ["ye", "no"]),
    "lark": (GrammarSource(GrammarKind.GRAMMAR, 'start: "a"+ /[0-9]/'), ["aa7"], ["7", "aa"]),
    "gbnf": (GrammarSource(GrammarKind.GRAMMAR, 'root ::= "a" x*\nx ::= "," [a-z]+'), ["a,bc", "a"], ["a,", "b"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_allows_what_it_describes(vocabulary, tokenizer, name):
    source, good, bad = SOURCES[name]
    for text in good:
        assert accepts(vocabulary, tokenizer, source, text), text
    for text in bad:
        assert not accepts(vocabulary, tokenizer, source, text), text


@pytest.mark.parametrize("seed", range(8))
def test_a_random_answer_matches(vocabulary, tokenizer, seed):
    booleans = {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}
    properties = {"a": {"enum": ["x", 1.5, None]}, "b": booleans}
    schema = {"type": "object", "properties": properties, "required": ["a", "b"], "additionalProperties": False}
    answer = random_answer(vocabulary, GrammarSource(GrammarKind.JSON_SCHEMA, json.dumps(schema)), seed, {EOS_ID})
    assert answer[-1] == EOS_ID
    value = json.loads(tokenizer.decode(answer))
    assert list(value) == ["a", "b"] and all(isinstance(item, bool) for item in value["b"])


def test_whitespace_cannot_go_on_for_ever(vocabulary, tokenizer):
    source = GrammarSource(GrammarKind.JSON_SCHEMA, '{"type": "object"}')
    assert accepts(vocabulary, tokenizer, source, '{\n    "a": 1\n}')
    assert not accepts(vocabulary, tokenizer, source, "{" + " " * 40 + "}")


def test_a_schema_that_cannot_be_enforced_is_refused_unless_it_is_lenient(vocabulary):
    schema = '{"type": "array", "uniqueItems": true}'
    with pytest.raises(GrammarError, match="uniqueItems"):
        vocabulary.compile(to_llguidance(GrammarSource(GrammarKind.JSON_SCHEMA, schema)))
    vocabulary.compile(to_llguidance(GrammarSource(GrammarKind.JSON_SCHEMA, schema, lenient=True)))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (GrammarKind.JSON_SCHEMA, "{"),
        (GrammarKind.JSON_SCHEMA, "[]"),
        (GrammarKind.JSON_SCHEMA, '{"type": "nothing"}'),
        (GrammarKind.JSON_SCHEMA, '{"$ref": "http://localhost/schema"}'),
        (GrammarKind.JSON_SCHEMA, "[" * 3000),
        (GrammarKind.JSON_SCHEMA, '{"items":' * 500 + "{}" + "}" * 500),
        (GrammarKind.REGEX, "("),
        (GrammarKind.REGEX, "a(?=b)"),
        (GrammarKind.REGEX, "(" * 20000 + ")" * 20000),
        (GrammarKind.CHOICE, "[]"),
        (GrammarKind.CHOICE, '["a", ""]'),
        (GrammarKind.CHOICE, '"a"'),
        (GrammarKind.GRAMMAR, "start: unknown"),
        (GrammarKind.GRAMMAR, "start: " + "(" * 20000),
        (GrammarKind.GRAMMAR, "root ::= ("),
        (GrammarKind.GRAMMAR, "root ::= " + "(" * 3000 + '"a"' + ")" * 3000),
    ],
)
def test_what_is_no_grammar_is_refused_in_a_short_message(vocabulary, kind, text):
    with pytest.raises(GrammarError) as raised:
        vocabulary.compile(to_llguidance(GrammarSource(kind, text)))
    assert 0 < len(str(raised.value)) < 800


def test_markers_are_never_text(tmp_path):
    directory = make_tiny_llama(tmp_path, weights=False, vocab=VOCAB)
    file = directory / "tokenizer.json"
    state = json.loads(file.read_text())
    state["added_tokens"].append(state["added_tokens"][0] | {"id": VOCAB, "content": "<tool_call>", "special": False})
    file.write_text(json.dumps(state))
    tokenizer, marker = Tokenizer(directory), VOCAB
    vocabulary = Vocabulary(tokenizer, 400, (EOS_ID,))
    matcher = vocabulary.compile(to_llguidance(GrammarSource(GrammarKind.REGEX, "(?s).*")))
    mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    allowed = set(np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist())
    assert tokenizer.marker_ids & allowed == {EOS_ID} and marker in tokenizer.marker_ids
    # Its text may be written with other tokens, and a grammar may name it.
    assert accepts_characters(vocabulary, tokenizer, GrammarSource(GrammarKind.REGEX, "<tool_call>"), "<tool_call>")
    assert vocabulary.compile("start: <tool_call>").try_consume_tokens([marker]) == 1


def accepts_characters(vocabulary: Vocabulary, tokenizer: Tokenizer, source: GrammarSource, text: str) -> bool:
    """Return True if an answer may be `text` in tokens of single characters."""
    of_text = {tokenizer.token_text(token): token for token in range(VOCAB)}
    matcher = vocabulary.compile(to_llguidance(source))
    return matcher.try_consume_tokens([of_text[c] for c in text]) == len(text) and matcher.is_accepting()


def test_a_model_without_an_end_token_has_no_grammars(tokenizer):
    with pytest.raises(GrammarError, match="end-of-sequence"):
        Vocabulary(tokenizer, VOCAB, ())


def test_the_mask_covers_the_vocabulary_of_the_model(tokenizer):
    vocabulary = Vocabulary(tokenizer, VOCAB + 100, (EOS_ID, VOCAB + 200))
    matcher = vocabulary.compile(to_llguidance(GrammarSource(GrammarKind.REGEX, "(?s).*")))
    mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    assert len(mask) == 4 * vocabulary.num_words == 4 * -(-(VOCAB + 100) // 32)
    assert not np.unpackbits(mask, bitorder="little")[tokenizer.vocab_size :].any()

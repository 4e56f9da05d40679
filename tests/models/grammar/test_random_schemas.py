"""Answers to 200 random JSON schemas parse, and validate by another implementation of JSON Schema."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator

from bench.json_schemas import random_schema
from daemon.models.grammar.source import GrammarKind, GrammarSource
from daemon.models.grammar.vocabulary import Vocabulary
from daemon.models.tokenizer import Tokenizer
from tests.models.grammar.walk import random_answer
from tests.models.tiny_model import EOS_ID, make_tiny_llama

VOCAB, NUM_SCHEMAS = 384, 200


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_tiny_llama(tmp_path_factory.mktemp("model"), weights=False, vocab=VOCAB))


def test_every_whole_answer_validates(tokenizer):
    vocabulary = Vocabulary(tokenizer, VOCAB, (EOS_ID,))
    truncated = 0
    for seed in range(NUM_SCHEMAS):
        schema = random_schema(seed)
        source = GrammarSource(GrammarKind.JSON_SCHEMA, json.dumps(schema))
        answer = random_answer(vocabulary, source, seed, {EOS_ID}, most=600)
        if answer[-1] != EOS_ID:
            truncated += 1
            continue
        value = json.loads(tokenizer.decode(answer))
        validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
        assert validator.is_valid(value), (seed, schema, value)
    assert truncated <= 0.05 * NUM_SCHEMAS

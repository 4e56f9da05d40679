"""Requests with grammars at one engine: exact outputs, and what a slow or broken grammar does to the others."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from daemon.engine.grammar import grammars as grammars_module
from daemon.engine.grammar.compiler import Compiler
from daemon.engine.grammar.request_matcher import RequestMatcher
from daemon.engine.runner import NOT_YET
from daemon.ipc.messages import Finish
from daemon.models.grammar.source import GrammarKind
from daemon.models.grammar.vocabulary import Vocabulary
from daemon.models.tokenizer import Tokenizer
from tests.engine.grammar.engine import PROMPT, REGEX, VOCAB, GrammarEngine, expected_output, grammar_of, make_request
from tests.models.tiny_model import EOS_ID, make_tiny_llama

SCHEMA = grammar_of(GrammarKind.JSON_SCHEMA, '{"type": "array", "items": {"enum": [1, "a", null]}, "maxItems": 6}')


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path: Path = make_tiny_llama(tmp_path_factory.mktemp("model"), weights=False, vocab=VOCAB)
    return Vocabulary(Tokenizer(path), VOCAB, (EOS_ID,))


@pytest.fixture
def engine(vocabulary: Vocabulary) -> GrammarEngine:
    return GrammarEngine(lambda: vocabulary)


def test_outputs_are_those_that_the_grammar_and_the_seed_decide(engine, vocabulary):
    requests = [make_request(i, grammar) for i, grammar in enumerate([REGEX, SCHEMA, "", REGEX, SCHEMA])]
    engine.add(*requests)
    engine.run()
    for request in requests:
        output = request.tokens[request.prompt_len :]
        if request.sampling.grammar:
            assert output == expected_output(vocabulary, request) and output[-1] == EOS_ID
            assert engine.finished[request.rid] is Finish.STOP
        else:
            assert len(output) == 60


def test_a_text_that_no_token_can_write_ends_its_request_only(tmp_path):
    """Models may have no token for some bytes: then llguidance allowed the tokens of the bytes that follow."""
    tokenizer = Tokenizer(make_tiny_llama(tmp_path, weights=False, vocab=VOCAB))
    few = 240  # tokens
    known = {tokenizer.token_bytes(token) for token in range(few)}
    missing = next(chr(c) for c in range(0xA0, 0x800) if not {bytes([b]) for b in chr(c).encode()} <= known)
    vocabulary = Vocabulary(tokenizer, few, (EOS_ID,))
    stuck = make_request(1, grammar_of(GrammarKind.REGEX, f"ab{missing}c"))
    other = make_request(2, grammar_of(GrammarKind.REGEX, "abc"))
    engine = GrammarEngine(lambda: vocabulary)
    engine.add(stuck, other)
    engine.run()
    assert engine.finished == {1: Finish.DEAD_END, 2: Finish.STOP}
    assert tokenizer.decode(stuck.tokens[len(PROMPT) :]).rstrip("\ufffd") == "ab"


def test_a_request_goes_on_from_any_position(vocabulary):
    whole = expected_output(vocabulary, make_request(7))
    engine = GrammarEngine(lambda: vocabulary, max_num_seqs=32)
    requests = [make_request(7, output=whole[:n]) for n in range(len(whole))]
    for i, request in enumerate(requests):
        request.rid = i
    engine.add(*requests)
    engine.run()
    assert all(request.tokens[request.prompt_len :] == whole for request in requests)


def test_preempted_requests_go_on_exactly(vocabulary):
    engine = GrammarEngine(lambda: vocabulary, blocks=16)  # three of the requests fit, not to their ends
    requests = [make_request(i) for i in range(6)]
    engine.add(*requests)
    engine.run()
    assert engine.scheduler.num_preemptions > 0
    for request in requests:
        assert request.tokens[request.prompt_len :] == expected_output(vocabulary, request)


def test_a_request_is_prefilled_while_its_grammar_is_compiled(vocabulary, monkeypatch):
    gate = threading.Event()
    fill = RequestMatcher.fill

    def wait_and_fill(self: RequestMatcher) -> None:
        gate.wait(20)
        fill(self)

    monkeypatch.setattr(RequestMatcher, "fill", wait_and_fill)
    engine = GrammarEngine(lambda: vocabulary)
    constrained, other = make_request(0), make_request(1, "", max_tokens=10)
    engine.add(constrained, other)
    while engine.finished != {1: Finish.LENGTH}:
        engine.step()
    assert (constrained.num_computed, constrained.num_output) == (constrained.prompt_len - 1, 0)
    gate.set()
    engine.run()
    assert constrained.tokens[constrained.prompt_len :] == expected_output(vocabulary, constrained)


def test_a_late_mask_holds_up_only_its_own_request(vocabulary, monkeypatch):
    gate = threading.Event()
    fill = RequestMatcher.fill

    def fill_late(self: RequestMatcher) -> None:
        if self._rid == 0 and self.position == 3:  # at the fifth token
            gate.wait(20)
        fill(self)

    monkeypatch.setattr(RequestMatcher, "fill", fill_late)
    engine = GrammarEngine(lambda: vocabulary)
    late, other = make_request(0), make_request(1)
    engine.add(late)
    while late.num_output < 4:
        engine.step()
    engine.add(other)
    while 1 not in engine.finished:
        engine.step()
    assert late.num_output == 4 and late.unready
    gate.set()
    engine.run()
    for request in (late, other):
        assert request.tokens[request.prompt_len :] == expected_output(vocabulary, request)


def test_masks_that_take_long_are_computed_before_their_rows_are_planned(vocabulary, monkeypatch):
    fill = RequestMatcher.fill

    def fill_slowly(self: RequestMatcher) -> None:
        fill(self)
        if self._rid == 0:
            time.sleep(0.02)
            self.seconds = 0.02

    monkeypatch.setattr(RequestMatcher, "fill", fill_slowly)
    monkeypatch.setattr(grammars_module.StepMasks, "of", _never_late(grammars_module.StepMasks.of))
    engine = GrammarEngine(lambda: vocabulary)
    slow, other = make_request(0), make_request(1)
    engine.add(slow, other)
    engine.run()
    for request in (slow, other):
        assert request.tokens[request.prompt_len :] == expected_output(vocabulary, request)


def _never_late(of):
    def checked(self, request):
        found = of(self, request)
        assert request.rid != 0 or not (isinstance(found, int) and found == NOT_YET)
        return found

    return checked


def test_a_grammar_that_cannot_be_compiled_ends_its_own_request(engine, vocabulary):
    broken, other = make_request(0, "start: unknown"), make_request(1)
    engine.add(broken, other)
    engine.run()
    assert engine.finished == {0: Finish.ERROR, 1: Finish.STOP}
    assert other.tokens[other.prompt_len :] == expected_output(vocabulary, other)


def test_output_that_does_not_match_its_grammar_ends_the_request(engine):
    engine.add(make_request(0, output=[EOS_ID + 20, 300, 301]), make_request(1))
    engine.run()
    assert engine.finished == {0: Finish.ERROR, 1: Finish.STOP}


def test_what_others_have_used_up_does_not_end_a_request(vocabulary):
    """Matchers of one grammar share an automaton, which may be full. A request goes on with one of its own."""
    compiler = Compiler(lambda: vocabulary)
    used_up = compiler.matcher(REGEX)
    assert not used_up.consume_token(EOS_ID)
    compiler.matcher = lambda grammar: used_up
    request = make_request(0)
    matcher = RequestMatcher(request, compiler)
    matcher.fill()
    assert not matcher.failed and matcher.current and matcher.bits.any()


def test_a_grammar_is_compiled_before_its_request_arrives(engine, vocabulary, monkeypatch):
    compiled, compile_it = [], Vocabulary.compile

    def count(self: Vocabulary, grammar: str):
        compiled.append(grammar)
        return compile_it(self, grammar)

    monkeypatch.setattr(Vocabulary, "compile", count)
    engine.grammars.prepare(REGEX)
    engine.grammars._compilers.shutdown()
    assert compiled == [REGEX] and engine.grammars._compiler.matcher(REGEX) is not None
    assert compiled == [REGEX]

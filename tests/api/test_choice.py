"""Text, counts and finish of one choice."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.api.generator import TokenChunk
from daemon.api.parse.parts import Part, Text
from daemon.api.render.choice import Choice
from daemon.ipc.messages import Finish
from tests.models.tiny_model import EOS_ID

TEXT = "one two three, naïve 🙂 four five six"


def _choice(model, stops=(), min_tokens=0) -> Choice:
    return Choice(
        model.tokenizer.detokenizer(continuing=True),
        stops=list(stops),
        min_tokens=min_tokens,
        end_tokens=frozenset({EOS_ID}),
        logprobs=None,
    )


def _text(parts: list[Part]) -> str:
    assert all(isinstance(part, Text) for part in parts)
    return "".join(part.text for part in parts)


def _run(choice: Choice, tokens: list[int], cuts: list[int], finish: Finish) -> str:
    """Push chunks of `tokens`, cut at `cuts`, until the choice ends; return the text."""
    bounds = [0, *sorted(cuts), len(tokens)]
    text = ""
    for begin, end in pairwise(bounds):
        last = end == len(tokens)
        text += _text(choice.push(TokenChunk(tokens[begin:end], None, finish if last else Finish.NONE, 0)))
        if choice.finish or last:
            break
    return text


@settings(deadline=None)
@given(data=st.data())
def test_chunk_bounds_do_not_change_the_output(model, data):
    tokens = [*model.tokenizer.encode(TEXT, False), EOS_ID]
    stops = data.draw(st.lists(st.sampled_from(["three", "e f", "🙂", "x", "x s", "two th"]), max_size=3))
    cuts = data.draw(st.lists(st.integers(0, len(tokens) - 1), max_size=6))
    minimum = data.draw(st.integers(0, 12))
    whole, chunked = _choice(model, stops, minimum), _choice(model, stops, minimum)
    assert _run(whole, tokens, [], Finish.STOP) == _run(chunked, tokens, cuts, Finish.STOP)
    assert (whole.finish, whole.num_tokens) == (chunked.finish, chunked.num_tokens)


def test_stop_string_ends_the_text_and_its_last_token_counts(model):
    tokens = model.tokenizer.encode(TEXT, False)
    choice = _choice(model, ["three"])
    assert _run(choice, tokens, [], Finish.LENGTH) == "one two "
    assert choice.finish is Finish.STOP
    so_far = model.tokenizer.decode(tokens[: choice.num_tokens])
    assert "three" in so_far and "three" not in model.tokenizer.decode(tokens[: choice.num_tokens - 1])


def test_no_stop_string_before_min_tokens(model):
    tokens = model.tokenizer.encode("ab ab ab", False)
    choice = _choice(model, ["a"], min_tokens=len(tokens))
    assert _run(choice, tokens, [], Finish.LENGTH) == "ab ab ab"
    assert choice.finish is Finish.LENGTH


def test_first_stop_string_after_min_tokens_ends_the_choice(model):
    tokens = model.tokenizer.encode("xaxaxa", False)
    assert len(tokens) == 6
    choice = _choice(model, ["a"], min_tokens=2)
    assert _run(choice, tokens, [], Finish.LENGTH) == "xax"
    assert (choice.finish, choice.num_tokens) == (Finish.STOP, 4)


def test_end_token_counts_but_is_not_in_the_text(model):
    tokens = model.tokenizer.encode("hi", False)
    plain = Choice(
        model.tokenizer.detokenizer(continuing=True),
        stops=[],
        min_tokens=0,
        end_tokens=frozenset(tokens[-1:]),
        logprobs=None,
    )
    assert _run(plain, tokens, [], Finish.STOP) == model.tokenizer.decode(tokens[:-1])
    assert plain.num_tokens == len(tokens)
    cut = _choice(model)
    assert _run(cut, tokens, [], Finish.LENGTH) == "hi"


def test_half_a_character_is_held_back_until_the_end(model):
    tokens = model.tokenizer.encode("🙂", False)
    assert len(tokens) > 1
    choice = _choice(model)
    assert choice.push(TokenChunk(tokens[:1], None, Finish.NONE, 0)) == []
    assert _text(choice.push(TokenChunk([], None, Finish.LENGTH, 0))) == "\ufffd"

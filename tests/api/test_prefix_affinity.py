"""What a frontend remembers of prompts: beginnings and engines, against a memory that forgets nothing."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.api.prefix_affinity import PrefixAffinity

BLOCK = 8
LENGTHS = [4, 8, 16, 32]  # blocks


def prompt(length: int, seed: int = 0) -> array[int]:
    return array("I", [(seed << 16) + i for i in range(length)])


def forked(common: int, own: int, seed: int) -> array[int]:
    """`common` tokens that are the same for all, and `own` that are nobody else's."""
    return prompt(common) + prompt(own, seed + 1)


def matched(memory: PrefixAffinity, tokens: array[int], salt: bytes = b"") -> list[int] | None:
    return memory.matched(memory.names(tokens, salt))


def record(memory: PrefixAffinity, tokens: array[int], engine: int, salt: bytes = b"") -> None:
    memory.record(memory.names(tokens, salt), engine)


@pytest.mark.parametrize(
    ("common", "found"),
    [(0, None), (31, None), (32, 4), (33, 4), (63, 4), (64, 8), (100, 8), (128, 16), (255, 16), (256, 32), (300, 32)],
)
def test_at_least_half_of_a_common_beginning_is_found(common: int, found: int | None):
    memory = PrefixAffinity(3, BLOCK)
    record(memory, forked(common, 400 - common, 1), 2)
    assert matched(memory, forked(common, 400 - common, 2)) == (None if found is None else [0, 0, found])


def test_the_last_token_is_computed_in_any_case():
    memory = PrefixAffinity(2, BLOCK)
    record(memory, prompt(500), 1)
    assert matched(memory, prompt(4 * BLOCK)) is None
    assert matched(memory, prompt(4 * BLOCK + 1)) == [0, 4]
    assert memory.names(prompt(0)) == []


def test_prompts_of_another_salt_are_not_alike():
    memory = PrefixAffinity(2, BLOCK)
    record(memory, prompt(100), 1, b"tenant")
    assert matched(memory, prompt(100)) is None
    assert matched(memory, prompt(100), b"tenant") == [0, 8]


def test_what_all_engines_hold_favours_none():
    memory = PrefixAffinity(2, BLOCK)
    record(memory, forked(64, 300, 1), 0)
    record(memory, forked(64, 300, 2), 1)
    assert matched(memory, forked(64, 300, 3)) is None
    assert matched(memory, forked(64, 300, 1)) == [32, 8]


def test_a_replaced_engine_holds_nothing():
    memory = PrefixAffinity(3, BLOCK)
    record(memory, prompt(100), 0)
    record(memory, prompt(100), 2)
    memory.forget(2)
    assert matched(memory, prompt(100)) == [8, 0, 0]
    memory.forget(0)
    assert matched(memory, prompt(100)) is None


def test_the_longest_unused_is_forgotten():
    memory = PrefixAffinity(2, BLOCK, capacity=4)  # of beginnings: two prompts of 100 tokens
    for seed in (1, 2):
        record(memory, prompt(100, seed), 1)
    record(memory, prompt(100, 1), 1)  # used again
    record(memory, prompt(100, 3), 1)
    assert [matched(memory, prompt(100, seed)) for seed in (1, 2, 3)] == [[0, 8], None, [0, 8]]


given_to = st.tuples(st.integers(0, 400), st.integers(0, 400), st.integers(0, 3), st.integers(0, 3))
scripts = st.lists(given_to | st.integers(0, 3), max_size=30)


@given(scripts, st.integers(0, 400), st.integers(0, 400), st.integers(0, 3))
def test_agrees_with_all_prompts_compared(
    script: list[tuple[int, int, int, int] | int], common: int, own: int, seed: int
):
    """An integer: that engine is replaced."""
    memory = PrefixAffinity(4, BLOCK)
    given: list[tuple[int, array[int]]] = []
    for event in script:
        if isinstance(event, int):
            memory.forget(event)
            given = [(engine, tokens) for engine, tokens in given if engine != event]
        else:
            *shape, engine = event
            given.append((engine, forked(*shape)))
            record(memory, given[-1][1], engine)
    asked = forked(common, own, seed)
    expected = [0] * 4
    for engine, tokens in given:
        usable = min(len(asked), len(tokens)) - 1
        for blocks in LENGTHS:
            if usable >= blocks * BLOCK and asked[: blocks * BLOCK] == tokens[: blocks * BLOCK]:
                expected[engine] = max(expected[engine], blocks)
    found = matched(memory, asked) or [0] * 4
    if min(expected) < max(expected):
        assert found == expected
    else:
        assert len(set(found)) == 1

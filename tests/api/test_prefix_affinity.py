"""PrefixAffinity, compared with a model that stores every prompt."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.api.prefix_affinity import PrefixAffinity

BLOCK = 8
LENGTHS = [4, 8, 16, 32, 64]  # blocks; a prompt of these tests has at most 800 tokens, 100 blocks


def prompt(length: int, seed: int = 0) -> array[int]:
    return array("I", [(seed << 16) + i for i in range(length)])


def forked(common: int, own: int, seed: int) -> array[int]:
    """Return `common` tokens that all prompts share, then `own` tokens that only this seed has."""
    return prompt(common) + prompt(own, seed + 1)


def match(affinity: PrefixAffinity, tokens: array[int], salt: bytes = b"") -> list[int] | None:
    return affinity.matched(affinity.keys(tokens, salt))


def record(affinity: PrefixAffinity, tokens: array[int], engine: int, salt: bytes = b"") -> None:
    affinity.record(affinity.keys(tokens, salt), engine)


@pytest.mark.parametrize(
    ("common", "found"),
    [(0, None), (31, None), (32, 4), (33, 4), (63, 4), (64, 8), (100, 8), (128, 16), (255, 16), (256, 32), (300, 32)],
)
def test_at_least_half_of_a_common_prefix_is_found(common: int, found: int | None):
    affinity = PrefixAffinity(3, BLOCK)
    record(affinity, forked(common, 400 - common, 1), 2)
    assert match(affinity, forked(common, 400 - common, 2)) == (None if found is None else [0, 0, found])


def test_last_token_never_counts_as_cached():
    affinity = PrefixAffinity(2, BLOCK)
    record(affinity, prompt(500), 1)
    assert match(affinity, prompt(4 * BLOCK)) is None
    assert match(affinity, prompt(4 * BLOCK + 1)) == [0, 4]
    assert affinity.keys(prompt(0)) == []


def test_prompts_with_different_salt_do_not_match():
    affinity = PrefixAffinity(2, BLOCK)
    record(affinity, prompt(100), 1, b"tenant")
    assert match(affinity, prompt(100)) is None
    assert match(affinity, prompt(100), b"tenant") == [0, 8]


def test_prefix_that_all_engines_hold_favours_none():
    affinity = PrefixAffinity(2, BLOCK)
    record(affinity, forked(64, 300, 1), 0)
    record(affinity, forked(64, 300, 2), 1)
    assert match(affinity, forked(64, 300, 3)) is None
    assert match(affinity, forked(64, 300, 1)) == [32, 8]


def test_replaced_engine_holds_nothing():
    affinity = PrefixAffinity(3, BLOCK)
    record(affinity, prompt(100), 0)
    record(affinity, prompt(100), 2)
    affinity.forget(2)
    assert match(affinity, prompt(100)) == [8, 0, 0]
    affinity.forget(0)
    assert match(affinity, prompt(100)) is None


def test_least_recently_used_prefix_is_dropped():
    affinity = PrefixAffinity(2, BLOCK, capacity=4)  # prefixes: two prompts of 100 tokens
    for seed in (1, 2):
        record(affinity, prompt(100, seed), 1)
    record(affinity, prompt(100, 1), 1)  # used again
    record(affinity, prompt(100, 3), 1)
    assert [match(affinity, prompt(100, seed)) for seed in (1, 2, 3)] == [[0, 8], None, [0, 8]]


dispatches = st.tuples(st.integers(0, 400), st.integers(0, 400), st.integers(0, 3), st.integers(0, 3))
scripts = st.lists(dispatches | st.integers(0, 3), max_size=30)


@given(scripts, st.integers(0, 400), st.integers(0, 400), st.integers(0, 3))
def test_agrees_with_a_comparison_of_all_prompts(
    script: list[tuple[int, int, int, int] | int], common: int, own: int, seed: int
):
    """`script`: a tuple (common, own, seed, engine) dispatches a prompt; an integer replaces that engine."""
    affinity = PrefixAffinity(4, BLOCK)
    dispatched: list[tuple[int, array[int]]] = []
    for event in script:
        if isinstance(event, int):
            affinity.forget(event)
            dispatched = [(engine, tokens) for engine, tokens in dispatched if engine != event]
        else:
            *shape, engine = event
            dispatched.append((engine, forked(*shape)))
            record(affinity, dispatched[-1][1], engine)
    new = forked(common, own, seed)
    expected = [0] * 4
    for engine, tokens in dispatched:
        usable = min(len(new), len(tokens)) - 1
        for blocks in LENGTHS:
            if usable >= blocks * BLOCK and new[: blocks * BLOCK] == tokens[: blocks * BLOCK]:
                expected[engine] = max(expected[engine], blocks)
    found = match(affinity, new) or [0] * 4
    if min(expected) < max(expected):
        assert found == expected
    else:
        assert len(set(found)) == 1

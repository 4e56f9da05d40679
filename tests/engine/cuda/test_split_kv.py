"""Parts of long sequences: they fit, no part is larger than necessary, and usual batches are left alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from daemon.engine.cuda.split_kv import WORTH_SPLITTING, part_pages

LEAST = 8


def parts_of(pages, size):
    return sum(-(-n // size) for n in pages)


def choose(pages, parts):
    return part_pages(np.array(pages, np.int32), parts, least=LEAST)


def test_one_long_sequence_gets_all_the_spare_parts():
    assert choose([64] * 63 + [4096], 79) == 256  # 63 parts for the others, 16 for the long one


def test_equal_sequences_are_not_split():
    assert choose([64] * 64, 79) is None
    assert choose([1] * 64, 79) is None
    assert choose([4096] * 64, 79) is None


def test_sequences_that_differ_a_little_are_not_split():
    assert choose([60 + i % 10 for i in range(64)], 79) is None


def test_without_a_spare_part_nothing_is_split():
    assert choose([1, 1, 1000], 3) is None


@given(
    pages=st.lists(st.integers(1, 5000), min_size=1, max_size=80).map(sorted),
    spare=st.integers(0, 40),
)
def test_parts_fit_and_are_as_small_as_possible(pages, spare):
    parts = len(pages) + spare
    size = choose(pages, parts)
    if size is None:
        smallest = next((n for n in range(LEAST, max(pages)) if parts_of(pages, n) <= parts), max(pages))
        assert max(pages) <= WORTH_SPLITTING * smallest
    else:
        assert parts_of(pages, size) <= parts
        assert size == LEAST or parts_of(pages, size - 1) > parts
        assert max(pages) > WORTH_SPLITTING * size

"""Batch sizes of graphs, and the size of the KV pool."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.engine.cuda.buckets import choose_bucket, graph_buckets, widest_gap
from daemon.engine.cuda.memory import pool_blocks
from daemon.models.model_config import ModelError


@given(st.integers(1, 1500))
def test_every_batch_gets_the_smallest_bucket_that_holds_it(largest):
    buckets = graph_buckets(largest)
    assert list(buckets) == sorted(set(buckets)) and buckets[-1] == largest
    for rows in range(1, largest + 1):
        assert choose_bucket(buckets, rows) == min(b for b in buckets if b >= rows)
    assert widest_gap(buckets) == max(choose_bucket(buckets, rows) - rows for rows in range(1, largest + 1))


def test_256_rows_need_few_graphs_and_little_padding():
    assert len(graph_buckets(256)) <= 40
    assert widest_gap(graph_buckets(256)) == 15


@pytest.mark.parametrize("rows", [0, 9])
def test_a_batch_without_a_bucket_is_rejected(rows):
    with pytest.raises(ValueError, match="bucket"):
        choose_bucket(graph_buckets(8), rows)


def test_a_batch_of_no_rows_has_no_graphs():
    with pytest.raises(ValueError):
        graph_buckets(0)


BYTES = st.integers(0, 10**5)


@given(st.integers(0, 10**6), BYTES, BYTES, BYTES, st.integers(1, 5000))
def test_the_pool_takes_exactly_the_memory_that_is_left(free, weights, peak, reserve, block):
    try:
        blocks = pool_blocks(free, weights=weights, activation_peak=peak, reserve=reserve, block_bytes=block)
    except ModelError:
        assert free - weights - peak - reserve < 2 * block
    else:
        assert blocks >= 2
        assert 0 <= free - weights - peak - reserve - blocks * block < block


def test_an_h200_holds_820000_tokens_of_an_8b_model():
    gb = 10**9
    blocks = pool_blocks(127 * gb, weights=16 * gb, activation_peak=1 * gb, reserve=2 * gb, block_bytes=2 << 20)
    assert blocks * 16 == pytest.approx(820_000, rel=0.01)

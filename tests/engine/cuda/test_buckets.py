"""Batch sizes of graphs, and the size of the KV pool."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.engine.cuda.buckets import choose_bucket, graph_buckets, widest_gap
from daemon.engine.cuda.memory import DeviceMemory, out_of_memory, pool_blocks
from daemon.engine.runner import Unavailable
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


@given(st.integers(0, 10**6), st.integers(0, 10**6), BYTES, BYTES, BYTES, st.integers(1, 5000))
def test_the_pool_takes_exactly_the_memory_that_is_left(free, share, weights, peak, reserve, block):
    memory, beside = DeviceMemory(free, share), weights + peak + reserve
    try:
        blocks = pool_blocks(memory, weights=weights, activation_peak=peak, reserve=reserve, block_bytes=block)
    except ModelError:
        assert share - beside < 2 * block
    except Unavailable:
        assert free - beside < 2 * block <= share - beside
    else:
        assert blocks >= 2
        assert 0 <= min(free, share) - beside - blocks * block < block


GIB = 1 << 30
NEEDS = {"weights": 16 * GIB, "activation_peak": 2 * GIB, "reserve": GIB, "block_bytes": 2 << 20}


@pytest.mark.parametrize("wanted", [0, 10 * GIB])
def test_too_little_memory_for_a_moment_is_no_error_of_the_configuration(wanted):
    """The message says which case it is and how much is missing."""
    missing = f"{wanted // GIB:d}.00 GiB too little" if wanted else "0.00 GiB too little"
    with pytest.raises(Unavailable, match="at this time: other processes hold memory") as raised:
        pool_blocks(DeviceMemory(free=19 * GIB, share=72 * GIB), wanted=wanted, **NEEDS)
    assert missing in str(raised.value) and "19.00 GiB are left" in str(raised.value)
    with pytest.raises(ModelError, match=r"memory_share leaves 19\.00 GiB") as raised:
        pool_blocks(DeviceMemory(free=79 * GIB, share=19 * GIB), wanted=wanted, **NEEDS)
    assert missing in str(raised.value) and "raise memory_share" in str(raised.value)


def test_the_pool_has_the_wanted_size_whatever_else_is_free():
    assert pool_blocks(DeviceMemory(79 * GIB, 72 * GIB), wanted=10 * GIB, **NEEDS) == 5 * 1024


@pytest.mark.parametrize(
    ("free", "weights", "kind"),
    [(20, 16, Unavailable), (72, 16, ModelError), (20, 140, ModelError)],
    ids=["others hold memory", "all is free", "the weights alone are too large"],
)
def test_a_load_that_runs_out_of_memory_says_whether_another_try_can_help(free, weights, kind):
    error = out_of_memory(DeviceMemory(free * GIB, 72 * GIB), weights * GIB)
    assert type(error) is kind


def test_an_h200_holds_820000_tokens_of_an_8b_model():
    gb = 10**9
    memory = DeviceMemory(130 * gb, 127 * gb)
    blocks = pool_blocks(memory, weights=16 * gb, activation_peak=1 * gb, reserve=2 * gb, block_bytes=2 << 20)
    assert blocks * 16 == pytest.approx(820_000, rel=0.01)

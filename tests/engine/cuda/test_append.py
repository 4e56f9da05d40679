"""Rotary embedding and append by the kernel's own source on the CPU: equal to torch to the last bit.

Norms of heads add up their squares in another order than torch.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.engine.cuda.ops import TorchOps
from daemon.engine.cuda.workspace import HeadShape
from tests.engine.cuda.host_kernels import HostAppend
from tests.engine.cuda.paging import Paged

pytestmark = pytest.mark.integration

shapes = st.builds(
    lambda group, *rest: HeadShape(group * rest[0], *rest),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([16, 64, 128]),
    st.sampled_from([1, 8, 16, 32]),
)


@pytest.fixture(scope="session")
def host(host_library):
    return HostAppend(host_library("append"))


@settings(deadline=None, max_examples=100)
@given(
    shape=shapes,
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.bfloat16, torch.float8_e4m3fn]),
    unrotated=st.sampled_from([0, 16, 32]),
    seed=st.integers(0, 2**31),
)
def test_rotation_and_append_equal_torch(host, shape, counts, dtype, unrotated, seed):
    paged = Paged(shape, counts, np.random.default_rng(seed), rotated=max(16, shape.head_dim - unrotated))
    ours, theirs = (paged.pages(dtype) for _ in range(2))
    (q, k, v), expected = paged.qkv(), paged.qkv()
    inputs = paged.inputs
    host.append(q, k, v, *ours, inputs.kv_indices, inputs.kv_indptr, inputs.rows, inputs.positions, paged.angles)
    TorchOps().append(*expected, *theirs, inputs, paged.angles)
    assert torch.equal(q, expected[0])
    for mine, expected_pages in zip(ours, theirs, strict=True):
        assert torch.equal(mine.view(torch.uint8), expected_pages.view(torch.uint8))
    stored = sum(counts) * shape.kv_heads * shape.head_dim
    assert int((ours[0].float() != 0).sum()) > 0.9 * stored  # small values round to zero in e4m3
    assert torch.equal(paged.fused.unflatten(1, (-1, shape.head_dim))[:, -shape.kv_heads :], v)  # unchanged


@settings(deadline=None, max_examples=40)
@given(
    shape=shapes,
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    unrotated=st.sampled_from([0, 32]),
    offset=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_norms_of_heads_before_the_rotation(host, shape, counts, unrotated, offset, seed):
    paged = Paged(shape, counts, np.random.default_rng(seed), rotated=max(16, shape.head_dim - unrotated))
    norms = paged.norms(offset)
    ours, theirs = (paged.pages(torch.bfloat16) for _ in range(2))
    (q, k, v), expected = paged.qkv(), paged.qkv()
    inputs = paged.inputs
    places = inputs.kv_indices, inputs.kv_indptr, inputs.rows, inputs.positions
    host.append(q, k, v, *ours, *places, paged.angles, norms.q, norms.k, offset, norms.eps)
    TorchOps(offset).append(*expected, *theirs, inputs, paged.angles, norms)
    # The sum of squares is added up in another order, and each number is rounded twice.
    for mine, reference in ((q, expected[0]), (ours[0], theirs[0])):
        torch.testing.assert_close(mine.float(), reference.float(), rtol=2**-7, atol=2**-7)
    assert torch.equal(ours[1], theirs[1])

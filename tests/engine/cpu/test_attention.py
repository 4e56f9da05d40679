"""The paged attention kernels compared with a softmax in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.engine.cpu.attention import LOG2E, TILE_QUERIES, AttentionShape, compile_attention

SHAPES = [AttentionShape(6, 2, 64, 16, 3), AttentionShape(4, 1, 24, 8, 2), AttentionShape(2, 2, 80, 128, 1)]
_compiled = {}


def kernels(shape, windowed=False, softcap=0.0):
    key = shape, windowed, softcap
    if key not in _compiled:
        _compiled[key] = compile_attention(shape, parallel=False, windowed=windowed, softcap=softcap)
    return _compiled[key]


class Case:
    """Sequences in one pool, with shuffled blocks. Elements of no sequence are NaN. `window` 0: full attention."""

    def __init__(self, shape, lengths, seed, half=False, layer=None, window=0, softcap=0.0):
        self.window, self.softcap = window, softcap
        self.kernels = kernels(shape, window > 0, softcap)
        rng = np.random.default_rng(seed)
        self.shape, self.lengths, self.half = shape, lengths, half
        self.layer = shape.layers - 1 if layer is None else layer
        sizes = [-(-n // shape.block_size) for n in lengths]
        ids = rng.permutation(np.arange(1, sum(sizes) + 1))
        self.blocks = ids.astype(np.int32)
        self.starts = np.cumsum([0, *sizes[:-1]]).astype(np.int32)
        pool = np.full(
            (sum(sizes) + 1, shape.layers, 2, shape.block_size, shape.kv_heads, shape.head_dim), np.nan, np.float32
        )
        self.kv = []
        for n, start, size in zip(lengths, self.starts, sizes, strict=True):
            kv = torch.from_numpy(rng.standard_normal((2, n, shape.kv_heads, shape.head_dim)).astype(np.float32))
            kv = (kv.bfloat16().float() if half else kv).numpy()
            for i, block in enumerate(ids[start : start + size]):
                part = kv[:, i * shape.block_size : (i + 1) * shape.block_size]
                pool[block, self.layer, :, : part.shape[1]] = part
            self.kv.append(kv)
        flat = pool.reshape(-1)
        self.pool = torch.from_numpy(flat).bfloat16().view(torch.uint16).numpy() if half else flat
        self.layer_offset = self.layer * shape.layer_width
        self.width = shape.heads * shape.head_dim
        self.rng = rng

    def queries(self, count):
        return self.rng.standard_normal((count, self.width)).astype(np.float32) * (LOG2E / self.shape.head_dim**0.5)

    def expected(self, query, sequence, position):
        """Return the attention of one scaled query at `position`, [heads * head_dim]."""
        heads, kv_heads, dim = self.shape[:3]
        first = max(0, position + 1 - self.window) if self.window else 0
        k, v = np.repeat(self.kv[sequence][:, first : position + 1].astype(np.float64), heads // kv_heads, axis=2)
        scores = np.einsum("hd,thd->ht", query.astype(np.float64).reshape(heads, dim), k) * np.log(2)
        if self.softcap:
            scores = self.softcap * np.tanh(scores / self.softcap)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        return np.einsum("ht,thd->hd", weights / weights.sum(1, keepdims=True), v).reshape(-1)

    def tokens(self, q, sequences, positions):
        out = np.full((len(q), self.width), np.nan, np.float32)
        self.kernels.attend_tokens(
            q,
            self.pool,
            self.layer_offset,
            self.window,
            np.asarray(positions, np.int32),
            self.starts[list(sequences)],
            self.blocks,
            out,
        )
        return out

    def tiles(self, q, sequence, first):
        """Compute queries at positions first..first + len(q) - 1 of one sequence by `attend_tiles`."""
        out = np.full((len(q), self.width), np.nan, np.float32)
        tiles = [(i, min(TILE_QUERIES, len(q) - i)) for i in range(0, len(q), TILE_QUERIES)]
        self.kernels.attend_tiles(
            q,
            self.pool,
            self.layer_offset,
            self.window,
            np.arange(first, first + len(q), dtype=np.int32),
            np.full(len(q), self.starts[sequence], np.int32),
            self.blocks,
            np.array(tiles, np.int32),
            out,
        )
        return out


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SHAPES), st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(0, 99), st.booleans()
)
def test_single_tokens_attend_to_their_sequences(shape, lengths, seed, half):
    case = Case(shape, lengths, seed, half)
    q = case.queries(len(lengths))
    out = case.tokens(q, range(len(lengths)), [n - 1 for n in lengths])
    expected = [case.expected(q[i], i, n - 1) for i, n in enumerate(lengths)]
    np.testing.assert_allclose(out, expected, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(1, 150), st.integers(0, 200), st.integers(0, 99), st.booleans())
def test_chunks_attend_to_earlier_and_not_to_later_tokens(shape, chunk, before, seed, half):
    case = Case(shape, [before + chunk, 20], seed, half)
    q = case.queries(chunk)
    out = case.tiles(q, 0, before)
    for i in {0, chunk // 2, chunk - 1}:
        np.testing.assert_allclose(out[i], case.expected(q[i], 0, before + i), atol=2e-5)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SHAPES), st.lists(st.integers(1, 200), min_size=2, max_size=5), st.integers(0, 99))
def test_a_tokens_bits_do_not_depend_on_its_batch(shape, lengths, seed):
    case = Case(shape, lengths, seed)
    q = case.queries(len(lengths))
    together = case.tokens(q, range(len(lengths)), [n - 1 for n in lengths])
    for i, n in enumerate(lengths):
        alone = case.tokens(q[i : i + 1], [i], [n - 1])
        assert alone.tobytes() == together[i].tobytes()


VARIANTS = [
    (SHAPES[1], 0, 0.8),
    (SHAPES[1], 1, 0.0),
    (SHAPES[1], 40, 0.0),
    (SHAPES[1], 70, 0.8),
    (SHAPES[2], 90, 0.0),
]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(VARIANTS), st.integers(1, 150), st.integers(0, 200), st.integers(0, 99))
def test_windows_and_soft_caps(variant, chunk, before, seed):
    shape, window, softcap = variant
    case = Case(shape, [before + chunk, 20], seed, window=window, softcap=softcap)
    q = case.queries(chunk)
    tiles = case.tiles(q, 0, before)
    tokens = case.tokens(q, [0] * chunk, range(before, before + chunk))
    for i in {0, chunk // 2, chunk - 1}:
        expected = case.expected(q[i], 0, before + i)
        np.testing.assert_allclose(tiles[i], expected, atol=2e-5)
        np.testing.assert_allclose(tokens[i], expected, atol=2e-5)


@pytest.mark.parametrize(("shape", "softcap"), [(SHAPES[0], 0.0), (SHAPES[1], 0.8)])
def test_large_scores_do_not_overflow(shape, softcap):
    case = Case(shape, [150], 1, softcap=softcap)
    q = case.queries(1) * 1e4
    for out in (case.tokens(q, [0], [149]), case.tiles(q, 0, 149)):
        np.testing.assert_allclose(out[0], case.expected(q[0], 0, 149), atol=1e-3)


@pytest.mark.parametrize("layer", [0, 1])
def test_each_layer_reads_its_part_of_a_block(layer):
    case = Case(SHAPES[0], [40], 2, layer=layer)
    q = case.queries(1)
    np.testing.assert_allclose(case.tokens(q, [0], [39])[0], case.expected(q[0], 0, 39), atol=2e-5)
    case.layer_offset = (1 - layer) * case.shape.layer_width  # the layer without KV
    case.pool[np.isnan(case.pool)] = 1.0
    assert not np.allclose(case.tokens(q, [0], [39])[0], case.expected(q[0], 0, 39), atol=0.1)

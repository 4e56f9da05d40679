"""Small-batch products: the kernels' own source on the CPU, against torch.

Each product is tested with its fused operations and with teams of any size, and whole decodes are tested too.
"""

import ctypes
import random
from itertools import count

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.engine.cuda.buckets import graph_buckets
from daemon.engine.cuda.graphs import agrees
from daemon.engine.cuda.ops import TorchOps
from daemon.engine.cuda.small_batch import MAX_ROWS, small_batch_buckets
from daemon.engine.rope import rope_tables
from daemon.models.loader import open_model
from tests.engine.cpu.harness import generate, request
from tests.engine.cuda.harness import make_cuda_runner
from tests.engine.cuda.host_kernels import HostGemv, Team
from tests.gpu.parts import judge_greedy, model_config_of, transformers_bf16
from tests.models.tiny_model import make_tiny_llama

pytestmark = pytest.mark.integration

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
EPS = 1e-5
HALF_STEP = 2.0**-8  # relative error of one rounding to bf16

teams = st.builds(Team, st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 4]))
rows = st.integers(1, MAX_ROWS)
seeds = st.integers(0, 2**31)
widths = st.integers(1, 70).map(lambda groups: 8 * groups)


@pytest.fixture(scope="session")
def library(host_library):
    return host_library("gemv")


class Noise:
    """bf16 tensors from a seed."""

    def __init__(self, seed):
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, scale=1.0):
        return (torch.randn(shape, generator=self._generator) * scale).to(BF16)


def close(got, expected, magnitude):
    """Assert that they differ only by one rounding of the result and by the rounding of sums.

    `magnitude`: the sum of the absolute values of the terms.
    """
    error = (got.double() - expected).abs()
    assert (error <= 1.01 * HALF_STEP * expected.abs() + 1e-5 * magnitude + 1e-30).all(), error.max()


def product(x, weight, bias):
    """Return the product in float64, and the magnitude of its terms."""
    exact = x.double() @ weight.double().T
    return exact + (0.0 if bias is None else bias.double()), x.double().abs() @ weight.double().abs().T + 1.0


def normed(gemv, x, norm):
    """Return the normalised rows, computed as their product with the identity.

    They equal torch's, except that a value between two bf16 numbers may be rounded to either.
    """
    out = torch.empty(x.shape)
    gemv.logits(x, norm, EPS, torch.eye(x.shape[1], dtype=BF16), out)
    expected = TorchOps().rms_norm(x, norm, EPS).float()
    assert ((out - expected).abs() <= 2 * HALF_STEP * expected.abs()).all()
    assert (out != expected).float().mean() < 0.02 or out.numel() < 300
    assert torch.equal(out, out.to(BF16).float())
    return out.to(BF16)


def bias_of(noise, biased, size):
    return noise(size) if biased else None


def padded(x):
    """Return a copy of x with gaps between its rows."""
    wide = torch.full((len(x), x.shape[1] + 24), torch.nan, dtype=x.dtype)
    wide[:, 8 : 8 + x.shape[1]] = x
    return wide[:, 8 : 8 + x.shape[1]]


@settings(deadline=None, max_examples=60)
@given(team=teams, rows=rows, width=widths, columns=st.integers(1, 40), biased=st.booleans(), seed=seeds)
def test_a_product_is_added(library, team, rows, width, columns, biased, seed):
    noise = Noise(seed)
    x, weight, residual = padded(noise(rows, width)), noise(columns, width), padded(noise(rows, columns))
    bias, before = bias_of(noise, biased, columns), residual.clone()
    HostGemv(library, team).add(x, weight, bias, residual)
    exact, magnitude = product(x, weight, bias)
    close(residual, before.double() + exact, magnitude)


@settings(deadline=None, max_examples=60)
@given(team=teams, rows=rows, width=widths, columns=st.integers(1, 40), seed=seeds)
def test_logits_are_not_rounded(library, team, rows, width, columns, seed):
    noise = Noise(seed)
    x, norm, weight = padded(noise(rows, width, scale=3)), noise(width), noise(columns, width)
    out = torch.full((rows, columns + 3), torch.nan)[:, :columns]
    HostGemv(library, team).logits(x, norm, EPS, weight, out)
    exact, magnitude = product(normed(HostGemv(library, team), x, norm), weight, None)
    assert ((out.double() - exact).abs() <= 1e-5 * magnitude).all()
    assert not torch.equal(out, out.to(BF16).float()) or rows * columns < 5


@settings(deadline=None, max_examples=60)
@given(team=teams, rows=rows, width=widths, columns=st.integers(1, 40), biased=st.booleans(), seed=seeds)
def test_gate_and_up_with_silu(library, team, rows, width, columns, biased, seed):
    noise = Noise(seed)
    x, norm, weight = noise(rows, width), noise(width), noise(2 * columns, width, scale=width**-0.5)
    bias, out = bias_of(noise, biased, 2 * columns), padded(noise(rows, columns))
    HostGemv(library, team).gate(x, norm, EPS, weight, bias, out)
    exact, magnitude = product(normed(HostGemv(library, team), x, norm), weight, bias)
    gate, up = exact.chunk(2, -1)
    close(out, F.silu(gate) * up, magnitude.amax(1, keepdim=True) * (1 + up.abs() + gate.abs()))


@settings(deadline=None, max_examples=60)
@given(
    team=teams,
    rows=rows,
    width=widths,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([8, 64]),
    block_size=st.sampled_from([1, 8, 16]),
    kv_dtype=st.sampled_from([BF16, E4M3]),
    biased=st.booleans(),
    seed=seeds,
)
def test_query_key_and_value(
    library, team, rows, width, kv_heads, group, head_dim, block_size, kv_dtype, biased, seed
):
    noise, rng = Noise(seed), np.random.default_rng(seed)
    heads = kv_heads * group
    total = (heads + 2 * kv_heads) * head_dim
    x, norm, weight = padded(noise(rows, width)), noise(width), noise(total, width, scale=3 * width**-0.5)
    bias = bias_of(noise, biased, total)
    positions = rng.integers(0, 100, rows)
    indptr = np.concatenate([[0], np.cumsum(positions // block_size + 1)])
    blocks = rng.permutation(indptr[-1])
    pool = torch.zeros(len(blocks), 2, 2, block_size, kv_heads, head_dim, dtype=BF16).to(kv_dtype)
    angles = torch.from_numpy(np.concatenate(rope_tables(model_config_of(head_dim).ropes[0], 100), 1))
    q = torch.empty(rows, heads, head_dim, dtype=BF16)
    indices, starts, token_positions = (torch.from_numpy(a.astype(np.int32)) for a in (blocks, indptr, positions))
    keys, values, prefetch = pool[:, 1, 0], pool[:, 1, 1], noise(3, 8)
    HostGemv(library, team).heads(
        x, norm, EPS, weight, bias, q, keys, values, indices, starts, token_positions, angles, prefetch
    )

    exact, magnitude = product(normed(HostGemv(library, team), x, norm), weight, bias)
    most = magnitude.amax()
    parts = exact.unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], 1)
    for part in parts[:2]:
        TorchOps().rotate(token_positions, part, part[:, :0], angles.double())
    close(q, parts[0], most)
    places = [(blocks[indptr[m] + p // block_size], p % block_size) for m, p in enumerate(positions)]
    for which, part in enumerate(parts[1:]):
        stored = torch.stack([pool[block, 1, which, slot] for block, slot in places])
        if kv_dtype == BF16:
            close(stored, part, most)
        else:  # e4m3: three bits of mantissa, smallest step 2^-9
            assert ((stored.double() - part).abs() <= part.abs() / 15 + 2**-9).all()
            stored.zero_()
        for block, slot in places:
            pool[block, 1, which, slot] = 0
    assert not pool.float().any()  # the kernel wrote nothing else


@given(team=teams, groups=st.integers(1, 500))
def test_next_weights_are_prefetched_exactly_once(library, team, groups):
    assert HostGemv(library, team).count_prefetches(torch.zeros(8 * groups, dtype=BF16)) == [1] * groups


def test_numbers_are_rounded_as_torch_rounds_them(library):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16).float()
    near = torch.cat(
        [
            every,
            every * (1 + 2**-9),
            every * (1 + 2**-8),
            every * (1 - 2**-9),
            torch.tensor([447.9, 448.0, 464.0, 1e9, 2**-6, 2**-9, 2**-10, 1.5 * 2**-9, 2.5 * 2**-9, 0.0]),
        ]
    )
    near = near[near.isfinite()]
    functions = ctypes.CDLL(str(library))

    def rounded(name, values, item):
        out = torch.zeros(len(values), dtype=item)
        getattr(functions, name)(
            ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(len(values))
        )
        return out

    assert torch.equal(rounded("to_bf16", near, torch.int16), near.to(BF16).view(torch.int16))
    assert torch.equal(rounded("to_e4m3", near, torch.uint8), near.clamp(-448, 448).to(E4M3).view(torch.uint8))
    nan = torch.tensor([torch.nan, -torch.nan])
    assert rounded("to_bf16", nan, torch.int16).view(BF16).isnan().all()
    assert rounded("to_e4m3", nan, torch.uint8).view(E4M3).float().isnan().all()


# -- whole decodes


SHAPES = {"plain": {}, "biased": {"attention_bias": True, "mlp_bias": True}, "narrow": {"head_dim": 16, "hidden": 40}}


@pytest.fixture(scope="module", params=SHAPES)
def model_dir(request, tmp_path_factory):
    shape = {"hidden": 64, "heads": 4, "kv_heads": 2, "layers": 3, "dtype": "bfloat16"} | SHAPES[request.param]
    return make_tiny_llama(tmp_path_factory.mktemp("model"), **shape)


@pytest.mark.parametrize(("kv_dtype", "decode_path"), [("auto", "gemv"), ("auto", "gemv, prefetch"), ("fp8", "gemv")])
def test_decodes_agree_with_transformers(library, model_dir, kv_dtype, decode_path):
    """One to four requests at a time. Their KV is written by chunks and extended by small-batch decodes."""
    rows_used, prefetched = [], set()

    class Counting(HostGemv):
        def logits(self, x, *more):
            rows_used.append(len(x))
            super().logits(x, *more)

        def heads(self, *given):
            prefetched.add(None if given[-1] is None else tuple(given[-1].shape))
            super().heads(*given)

    runner = make_cuda_runner(
        model_dir, dtype="bf16", kv_dtype=kv_dtype, decode_path=decode_path, gemv=Counting(library, Team(2, 1, 1))
    )
    rng, blocks = random.Random(0), count(1)
    answers = []
    for at_once in (1, 2, 3, 4, 6):
        requests = [
            request([rng.randrange(3, 380) for _ in range(rng.randint(1, 90))], blocks, 128) for _ in range(at_once)
        ]
        lengths = [len(r.tokens) for r in requests]
        generate(runner, requests, output=16, chunk=50)
        answers += [(r.tokens, n) for r, n in zip(requests, lengths, strict=True)]
    assert set(rows_used) == {1, 2, 4}  # three rows are padded to four; six rows use the path "gemm"
    config = open_model(model_dir)
    assert prefetched == {
        (config.hidden_size, config.num_heads * config.head_dim) if decode_path == "gemv, prefetch" else None
    }
    judgement = judge_greedy(transformers_bf16(model_dir, "cpu"), answers)
    assert judgement.worst <= (3e-2 if kv_dtype == "auto" else 0.25), judgement


def test_small_batch_buckets_must_fit_in_shared_memory(model_dir, tmp_path):
    config = open_model(make_tiny_llama(tmp_path, hidden=64, intermediate=14336))
    room = 14336 * 2 + 1024
    assert small_batch_buckets(graph_buckets(64), config, 227 << 10) == (1, 2, 4)
    assert small_batch_buckets((1, 2, 3), config, 227 << 10) == (1, 2, 3)
    assert small_batch_buckets(graph_buckets(64), config, 2 * room) == (1, 2)
    assert small_batch_buckets(graph_buckets(64), config, room - 1) == ()
    uneven = open_model(make_tiny_llama(tmp_path / "uneven", hidden=64, intermediate=100))
    assert small_batch_buckets(graph_buckets(64), uneven, 227 << 10) == ()


def test_outputs_agree_only_within_rounding():
    output = torch.tensor([3.0, -20.0, 0.1])
    assert agrees(output + 4.9, output)
    assert not agrees(output + 5.1, output)
    assert not agrees(torch.tensor([3.0, torch.nan, 0.1]), output)
    assert not agrees(output, torch.full((3,), torch.nan))

"""Matrix products in bf16, also in CUDA graphs: the output projection into float32, and our own small-batch products
with
their fused operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from daemon.engine.cuda import kernels
from daemon.engine.cuda.ops import FlashInferOps, TorchOps
from daemon.engine.cuda.small_batch import MAX_ROWS
from daemon.engine.rope import rope_tables
from tests.gpu.parts import BF16, DEVICE, SIMULATED, model_config_of

EPS = 1e-5
LLAMA_8B = {"hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 14336, "vocab": 128256}
SMALL = {"hidden": 576, "heads": 9, "kv_heads": 3, "head_dim": 64, "intermediate": 1536, "vocab": 49153}
ONE_LAYER = {"small": SMALL} if SIMULATED else {"small": SMALL, "8B": LLAMA_8B}


@pytest.fixture(scope="module")
def ops():
    return FlashInferOps()


@pytest.fixture(scope="module")
def gemv(ops):
    return kernels.load_gemv()


def noise(*shape, scale=1.0):
    return (torch.randn(shape, device=DEVICE) * scale).to(BF16)


def replayed(work, refill, check, times=3):
    """Capture `work` in a graph. Then call `refill`, replay the graph and call `check`, `times` times."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        work()
    for _ in range(times):
        refill()
        graph.replay()
        check()


@pytest.mark.parametrize("vocab", [384, 32003, 49152, 128256])
@pytest.mark.parametrize("rows", [1, 8, 24, 256])
def test_projection_is_correct_in_a_replayed_graph(ops, rows, vocab):
    weight, x, out = noise(vocab, 512), noise(rows, 512), torch.zeros(rows, vocab, device=DEVICE)

    def check():
        torch.testing.assert_close(out, x.float() @ weight.float().t(), rtol=1e-3, atol=5e-3)
        assert not torch.equal(out, out.to(BF16).float())  # the results were not rounded to bf16

    replayed(lambda: ops.project(x, weight, out), lambda: x.copy_(torch.randn(rows, 512, device=DEVICE)), check)


def near(got, expected):
    """Assert that they differ by no more than roundings to bf16: a normalised value may be rounded up or down."""
    torch.testing.assert_close(got.float(), expected, rtol=2**-7, atol=float(expected.abs().max()) * 2**-8)


@pytest.mark.parametrize("shape", ONE_LAYER)
@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
def test_small_batch_add_gate_and_logits(gemv, rows, shape):
    hidden, width, vocab = (ONE_LAYER[shape][name] for name in ("hidden", "intermediate", "vocab"))
    residual, norm, wide = noise(rows, hidden), noise(hidden), noise(rows, width)
    down, gate_up = noise(hidden, width, scale=width**-0.5), noise(2 * width, hidden, scale=hidden**-0.5)
    head = noise(vocab, hidden, scale=hidden**-0.5)
    bias = noise(hidden)
    gated, logits, added = torch.zeros_like(wide), torch.zeros(rows, vocab, device=DEVICE), residual.clone()

    def work():
        """Run the products one after another, as in a layer: each one reads the previous result."""
        added.copy_(residual)
        gemv.gate(added, norm, EPS, gate_up, None, gated)
        gemv.add(gated, down, bias, added)
        gemv.logits(added, norm, EPS, head, logits)

    def check():
        gate, up = (TorchOps().rms_norm(residual, norm, EPS).float() @ gate_up.float().t()).chunk(2, -1)
        near(gated, F.silu(gate) * up)
        near(added, residual.float() + gated.float() @ down.float().t() + bias.float())
        near(logits, TorchOps().rms_norm(added, norm, EPS).float() @ head.float().t())

    replayed(work, lambda: residual.copy_(noise(rows, hidden)), check)


@pytest.mark.parametrize("kv_dtype", [BF16, torch.float8_e4m3fn], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("shape", ONE_LAYER)
@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
def test_small_batch_heads(gemv, rows, shape, kv_dtype):
    names = ("hidden", "heads", "kv_heads", "head_dim")
    hidden, heads, kv_heads, head_dim = (ONE_LAYER[shape][name] for name in names)
    x, norm = noise(rows, hidden), noise(hidden)
    weight = noise((heads + 2 * kv_heads) * head_dim, hidden, scale=hidden**-0.5)
    pool = torch.zeros(40, 3, 2, 16, kv_heads, head_dim, dtype=BF16, device=DEVICE).to(kv_dtype)
    angles = torch.cat([torch.from_numpy(t) for t in rope_tables(model_config_of(head_dim), 128)], 1).to(DEVICE)
    positions = torch.randint(0, 128, (rows,), dtype=torch.int32, device=DEVICE)
    indptr = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE) * 8
    indices = torch.randperm(39, device=DEVICE)[: 8 * rows].int() + 1
    q = torch.zeros(rows, heads, head_dim, dtype=BF16, device=DEVICE)
    prefetch = noise(hidden, heads * head_dim) if rows % 2 else None
    gemv.heads(
        x, norm, EPS, weight, None, q, pool[:, 1, 0], pool[:, 1, 1], indices, indptr, positions, angles, prefetch
    )

    exact = (TorchOps().rms_norm(x, norm, EPS).float() @ weight.float().t()).unflatten(-1, (-1, head_dim))
    parts = exact.split([heads, kv_heads, kv_heads], 1)
    TorchOps().rotate(positions, parts[0], parts[1], angles)
    near(q, parts[0])
    blocks, slots = indices[indptr[:-1].long() + positions.long() // 16].long(), positions.long() % 16
    for which, part in enumerate(parts[1:]):
        stored = pool[blocks, 1, which, slots].float()
        if kv_dtype == BF16:
            near(stored, part)
        else:
            torch.testing.assert_close(stored, part, rtol=1 / 15, atol=2**-8)
    pool[blocks, 1, :, slots] = 0
    assert not pool.float().any()  # the kernel wrote nothing else

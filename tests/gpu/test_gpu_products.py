"""Matrix products in bf16, also in CUDA graphs: the output projection into float32, those by the algorithms of
cuBLASLt, and our own small-batch products with their fused operations."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from daemon.engine.cuda import kernels, product_choice
from daemon.engine.cuda.cublaslt import CublasError, CublasLt, Product, Shape
from daemon.engine.cuda.graphs import agrees
from daemon.engine.cuda.ops import FlashInferOps, TorchOps
from daemon.engine.cuda.product_choice import LIMITS, WORKSPACE_BYTES
from daemon.engine.cuda.products import ChosenProduct, ChosenProducts
from daemon.engine.cuda.small_batch import MAX_ROWS
from daemon.engine.rope import rope_tables
from daemon.engine.runner import Row, StepPlan
from tests.engine.cpu.harness import generate, request
from tests.gpu.parts import BF16, DEVICE, SIMULATED, make_gpu_runner, model_config_of, small_llama, tokens

EPS = 1e-5
LLAMA_8B = {"hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 14336, "vocab": 128256}
SMALL = {"hidden": 576, "heads": 9, "kv_heads": 3, "head_dim": 64, "intermediate": 1536, "vocab": 49153}
ONE_LAYER = {"small": SMALL} if SIMULATED else {"small": SMALL, "8B": LLAMA_8B}


@pytest.fixture(scope="module")
def ops():
    return FlashInferOps(torch.device(DEVICE))


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


@pytest.fixture(scope="module")
def cublaslt():
    return CublasLt(WORKSPACE_BYTES)


@pytest.mark.parametrize("wide", [False, True], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("columns", "width"), [(384, 512)] if SIMULATED else [(384, 512), (4096, 14336), (6144, 4096)]
)
@pytest.mark.parametrize("rows", [1, 7, 33, 131, 256])
def test_every_algorithm_gives_the_product_in_a_replayed_graph(cublaslt, rows, columns, width, wide):
    x, weight = noise(rows, width), noise(columns, width, scale=width**-0.5)
    out = torch.zeros(rows, columns, dtype=torch.float32 if wide else BF16, device=DEVICE)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=DEVICE)
    product = Product(cublaslt, Shape(rows, columns, width, wide))

    def refill():
        x.copy_(torch.randn(rows, width, device=DEVICE))
        out.fill_(torch.nan)

    def check():
        near(out, x.float() @ weight.float().t())
        if not wide:
            near(out, F.linear(x, weight).float())

    computed = 0
    for algorithm in product.algorithms(LIMITS.algorithms):
        chosen = ChosenProduct(product, algorithm, workspace)
        try:
            chosen.compute(x, weight, out)
        except CublasError:
            continue
        replayed(lambda chosen=chosen: chosen.compute(x, weight, out), refill, check, times=2)
        computed += 1
    assert computed >= 1


def test_a_runner_computes_its_decodes_by_the_chosen_algorithms(tmp_path, monkeypatch):
    """Each bucket's graph, with the last valid algorithm for every product, gives the logits of torch's products."""
    monkeypatch.setattr(product_choice, "fastest", max)
    monkeypatch.delenv("LLUMD_PRODUCTS", raising=False)
    path, buckets = small_llama(tmp_path / "model", head_dim=64), (1, 2, 4, 8, 11)
    limits = LIMITS._replace(min_bytes=0, read_bytes=0)
    runner = make_gpu_runner(path, max_num_seqs=buckets[-1], decode_path="gemm", product_limits=limits)
    found = runner.products.chosen
    assert {choice.rows for choice in found.choices} == {shape.rows for shape in found.by_shape} == set(buckets)
    assert len(found.by_shape) == len(found.choices)
    assert {name for choice in found.choices for name in choice.names} == {"qkv", "out", "gate_up", "down", "head"}

    rng, blocks = random.Random(0), itertools.count(1)
    requests = [request(tokens(rng, rng.randint(1, 40)), blocks, 64) for _ in range(buckets[-1])]
    generate(runner, requests[:8], 1, budget=128)
    generate(runner, requests[8:], 1, budget=128)

    def logits(rows):
        plan = [Row(r, len(r.tokens) - 1, 1, True) for r in requests[:rows]]
        runner.execute(StepPlan(plan, rows))
        return runner._forward.logits[:rows].cpu()

    by_graph = {rows: logits(rows) for rows in (1, 2, 3, 7, 8, 9, 11)}
    monkeypatch.setattr(runner, "_compute_decodes", runner._decode_paths.run)
    for rows, got in by_graph.items():
        torch.testing.assert_close(got, logits(rows), rtol=1e-2, atol=1e-2)
    runner.products.chosen = ChosenProducts({})
    for rows, got in by_graph.items():
        # Sums in another order are rounded to other bf16 numbers, which the following layers see.
        assert agrees(got, logits(rows), 2**-4)


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
    angles = torch.cat([torch.from_numpy(t) for t in rope_tables(model_config_of(head_dim).ropes[0], 128)], 1).to(
        DEVICE
    )
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

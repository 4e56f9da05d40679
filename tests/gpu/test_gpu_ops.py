"""Element-wise kernels against torch in bf16: FlashInfer's differ by one rounding at most, ours not at all."""

import numpy as np
import pytest
import torch

from daemon.engine.cuda.experts import Mixture
from daemon.engine.cuda.ops import FlashInferOps, TorchOps
from daemon.engine.cuda.weights import Experts
from daemon.engine.cuda.workspace import HeadShape
from daemon.models.architecture import ExpertsConfig
from tests.engine.cuda.paging import Paged
from tests.gpu.parts import BF16, DEVICE

ROWS = [1, 7, 256, 2048]
STEP = 2.0**-7  # relative distance of two bf16 numbers


@pytest.fixture(scope="module")
def ops():
    return FlashInferOps(torch.device(DEVICE))


def noise(*shape, seed=0, scale=1.0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(BF16)


def same(got, expected, steps=1.0):
    torch.testing.assert_close(got.float(), expected.float(), rtol=steps * STEP, atol=steps * STEP / 16)


@pytest.mark.parametrize("hidden", [256, 576, 4096])
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm(ops, rows, hidden):
    x, weight = noise(rows, hidden), noise(hidden, seed=1)
    before = x.clone()
    same(ops.rms_norm(x, weight, 1e-5), TorchOps().rms_norm(x, weight, 1e-5))
    assert torch.equal(x, before)


@pytest.mark.parametrize("hidden", [256, 576, 4096])
@pytest.mark.parametrize("rows", ROWS)
def test_add_rms_norm(ops, rows, hidden):
    weight = noise(hidden, seed=1)
    mine, theirs = ((noise(rows, hidden), noise(rows, hidden, seed=2)) for _ in range(2))
    ops.add_rms_norm(*mine, weight, 1e-5)
    TorchOps().add_rms_norm(*theirs, weight, 1e-5)
    same(mine[1], theirs[1])
    same(mine[0], theirs[0], steps=2)  # the kernel may skip the rounding of the sum


@pytest.mark.parametrize("dtype", [BF16, torch.float8_e4m3fn], ids=["bf16", "e4m3"])
@pytest.mark.parametrize(
    "shape", [HeadShape(4, 2, 64, 16), HeadShape(9, 3, 64, 16), HeadShape(32, 8, 128, 32)], ids=str
)
@pytest.mark.parametrize("counts", [[1], [1] * 7, [1] * 256, [300, 1, 17, 1024]], ids=lambda c: f"{len(c)}-{sum(c)}")
def test_rotation_and_append_of_slices_of_a_fused_product(ops, counts, shape, dtype):
    paged = Paged(shape, counts, np.random.default_rng(len(counts)), DEVICE)
    results = []
    for each in (ops, TorchOps()):
        (q, k, v), pages = paged.qkv(), paged.pages(dtype)
        each.append(q, k, v, *pages, paged.inputs, paged.angles)
        results.append((q, *(x.view(torch.uint8) for x in pages)))
    for mine, expected in zip(*results, strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("dtype", [BF16, torch.float8_e4m3fn], ids=["bf16", "e4m3"])
@pytest.mark.parametrize(
    ("shape", "rotated"), [(HeadShape(4, 2, 64, 16), 64), (HeadShape(6, 2, 128, 32), 96)], ids=str
)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("counts", [[1] * 7, [300, 1, 17]], ids=lambda c: f"{len(c)}-{sum(c)}")
def test_norms_of_heads_before_a_rotation_of_a_part_of_them(counts, offset, shape, rotated, dtype):
    paged = Paged(shape, counts, np.random.default_rng(len(counts)), DEVICE, rotated=rotated)
    results = []
    for each in (FlashInferOps(torch.device(DEVICE), offset), TorchOps(offset)):
        (q, k, v), pages = paged.qkv(), paged.pages(dtype)
        each.append(q, k, v, *pages, paged.inputs, paged.angles, paged.norms(offset))
        results.append((q, *pages))
    for mine, expected in zip(*results, strict=True):
        steps = 2 if mine.dtype == BF16 else 16
        same(mine, expected, steps)


@pytest.mark.parametrize("rows", [1, 256])
def test_norms_with_an_offset(rows):
    ops, weight = FlashInferOps(torch.device(DEVICE), 1.0), noise(576, seed=1, scale=0.1)
    x = noise(rows, 576)
    same(ops.rms_norm(x, weight, 1e-6), TorchOps(1.0).rms_norm(x, weight, 1e-6))
    mine, theirs = ((noise(rows, 576), noise(rows, 576, seed=2)) for _ in range(2))
    ops.add_rms_norm(*mine, weight, 1e-6)
    TorchOps(1.0).add_rms_norm(*theirs, weight, 1e-6)
    same(mine[1], theirs[1])
    same(mine[0], theirs[0], steps=2)


def test_norms_of_slices_in_place(ops):
    fused, weight = noise(37, 768), noise(512, seed=1)
    expected = fused.clone()
    TorchOps().rms_norm(expected[:, :512], weight, 1e-5, out=expected[:, :512])
    ops.rms_norm(fused[:, :512], weight, 1e-5, out=fused[:, :512])
    same(fused, expected)


@pytest.mark.parametrize("width", [512, 14336])
@pytest.mark.parametrize("rows", [1, 256])
def test_gelu_mul(ops, rows, width):
    gate_up = noise(rows, 2 * width, scale=3)
    out, expected = (torch.zeros(rows, width, dtype=BF16, device=DEVICE) for _ in range(2))
    ops.gelu_tanh_mul(gate_up, out)
    TorchOps().gelu_tanh_mul(gate_up, expected)
    same(out, expected, steps=2)


@pytest.mark.parametrize("rows", [1, 3, 64, 300])
def test_experts(ops, rows):
    """One expert gets no rows, another one many. Scores differ enough that rounding does not change the choice."""
    count, per_token, hidden, width = 8, 2, 256, 96
    config = ExpertsConfig(count, per_token, width, normalise=True)
    x, router = noise(rows, hidden), noise(count, hidden, seed=1)
    router[3] = 0
    experts = Experts(
        router, noise(count, 2 * width, hidden, seed=2, scale=0.06), noise(count, hidden, width, seed=3)
    )
    out, expected = torch.empty_like(x), torch.zeros(rows, hidden, device=DEVICE)
    Mixture(config, ops).apply(experts, x, out)
    weights, chosen = torch.softmax(x.float() @ router.float().T, -1).topk(per_token)
    weights /= weights.sum(-1, keepdim=True)
    for e in range(count):
        gate, up = (x.float() @ experts.gate_up[e].float().T).chunk(2, -1)
        down = (torch.nn.functional.silu(gate) * up) @ experts.down[e].float().T
        expected += down * (weights * (chosen == e)).sum(-1, keepdim=True)
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02 * float(expected.std()))


@pytest.mark.parametrize("width", [512, 14336])
@pytest.mark.parametrize("rows", ROWS)
def test_silu_mul(ops, rows, width):
    gate_up = noise(rows, 2 * width, scale=3)
    out, expected = (torch.zeros(rows, width, dtype=BF16, device=DEVICE) for _ in range(2))
    ops.silu_mul(gate_up, out)
    TorchOps().silu_mul(gate_up, expected)
    same(out, expected, steps=2)


@pytest.mark.parametrize("vocab", [384, 32003, 128256])
@pytest.mark.parametrize("rows", [1, 7, 256])
def test_projection(ops, rows, vocab):
    x, weight = noise(rows, 256), noise(vocab, 256, seed=1, scale=0.05)
    out, expected = (torch.zeros(rows, vocab, device=DEVICE) for _ in range(2))
    ops.project(x, weight, out)
    TorchOps().project(x, weight, expected)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)

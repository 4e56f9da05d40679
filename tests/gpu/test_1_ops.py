"""FlashInfer's element-wise kernels against torch, in bf16: one rounding apart at most."""

import pytest
import torch

from daemon.engine.cuda.ops import FlashInferOps, TorchOps
from daemon.engine.rope import rope_tables
from tests.gpu.parts import BF16, DEVICE, card_of

ROWS = [1, 7, 256, 2048]
STEP = 2.0**-7  # of a bf16 number


@pytest.fixture(scope="module")
def ops():
    return FlashInferOps()


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
    same(mine[0], theirs[0], steps=2)  # of a sum that the kernel need not have rounded before


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (9, 3, 64), (32, 8, 128)])
@pytest.mark.parametrize("rows", ROWS)
def test_rotation_of_slices_of_the_fused_product(ops, rows, heads, kv_heads, head_dim):
    angles = torch.cat([torch.from_numpy(t) for t in rope_tables(card_of(head_dim), 2048)], 1).to(DEVICE)
    positions = torch.randint(0, 2048, (rows,), dtype=torch.int32, device=DEVICE)
    width, kv_width = heads * head_dim, kv_heads * head_dim
    results = []
    for each in (ops, TorchOps()):
        fused = noise(rows, width + 2 * kv_width)
        before = fused.clone()
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in fused.split([width, kv_width, kv_width], -1))
        each.rotate(positions, q, k, angles)
        assert torch.equal(v.flatten(1), before[:, -kv_width:])
        assert not torch.equal(q.flatten(1), before[:, :width])
        results.append(fused)
    same(*results)


@pytest.mark.parametrize("width", [512, 14336])
@pytest.mark.parametrize("rows", ROWS)
def test_silu_mul(ops, rows, width):
    gate_up = noise(rows, 2 * width, scale=3)
    same(ops.silu_mul(gate_up), TorchOps().silu_mul(gate_up), steps=2)


@pytest.mark.parametrize("vocab", [384, 32003, 128256])
@pytest.mark.parametrize("rows", [1, 7, 256])
def test_projection(ops, rows, vocab):
    x, weight = noise(rows, 256), noise(vocab, 256, seed=1, scale=0.05)
    out, expected = (torch.zeros(rows, vocab, device=DEVICE) for _ in range(2))
    ops.project(x, weight, out)
    TorchOps().project(x, weight, expected)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)

"""Linear layers: correct, and if tiled independent of the batch; and the kernels between them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.engine.cpu import linear
from daemon.engine.cpu.linear import Linear, choose_arithmetic
from daemon.engine.cpu.ops import compile_ops
from daemon.machine import has_bf16
from daemon.models.model_config import read_model_config
from tests.models.tiny_model import make_tiny_llama

OPS = compile_ops(parallel=False)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(tensor):
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tiled", [False, True])
def test_matches_torchs_linear_layer(dtype, error, bias, tiled):
    weight, b = random(70, 48, dtype=dtype) / 7, random(70, dtype=dtype, seed=1) if bias else None
    layer = Linear(weight, b, tiled=tiled)
    for rows in (1, 2, 16, 33):
        x = random(rows, 48, dtype=dtype, seed=rows)
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        assert layer(x).dtype is dtype
        assert (layer(x).double() - expected).abs().max() < error * expected.abs().max()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 50), st.integers(0, 2**31))
def test_a_tiled_rows_bits_do_not_depend_on_its_batch_or_index(rows, seed):
    layer = Linear(random(576, 1536), tiled=True)
    x = random(rows, 1536, seed=seed)
    together = layer(x)
    for i in {0, rows // 2, rows - 1}:
        assert torch.equal(layer(x[i : i + 1])[0], together[i])


def test_arithmetic_is_fp32_if_bf16_is_emulated(monkeypatch, tmp_path):
    config = read_model_config(make_tiny_llama(tmp_path, weights=False))
    monkeypatch.setattr(linear, "_has_bf16", lambda: False)
    assert choose_arithmetic(config) == "fp32"


@pytest.mark.parametrize("slow, choice", [("bf16", "fp32"), ("fp32", "bf16")])
def test_arithmetic_is_the_faster_one(monkeypatch, tmp_path, slow, choice):
    config = read_model_config(make_tiny_llama(tmp_path, weights=False))
    monkeypatch.setattr(linear, "_has_bf16", lambda: True)
    monkeypatch.setattr(linear, "_layer_seconds", lambda _, arithmetic: 2.0 if arithmetic == slow else 1.0)
    assert choose_arithmetic(config) == choice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_activations_match_torch(dtype):
    x = random(5, 2 * 40, dtype=dtype) * 30
    x[0] /= 30
    out = torch.empty(5, 40, dtype=dtype)
    gate, up = x.float().chunk(2, dim=1)
    OPS.silu_mul(bits(x), bits(out))
    torch.testing.assert_close(out, (torch.nn.functional.silu(gate) * up).to(dtype))
    OPS.gelu_tanh_mul(bits(x), bits(out))
    torch.testing.assert_close(out, (torch.nn.functional.gelu(gate, approximate="tanh") * up).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_norm_groups_normalises_some_columns(dtype):
    x, weight = random(4, 40, dtype=dtype), random(8, seed=2)
    expected = x.clone()
    groups = x[:, 16:32].float().unflatten(1, (2, 8))
    expected[:, 16:32] = torch.nn.functional.rms_norm(groups, (8,), weight, 1e-5).flatten(1).to(dtype)
    OPS.norm_groups(bits(x), 16, 2, weight.numpy(), np.float32(1e-5))
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_add_rows_updates_the_residual_and_copies_rows(dtype):
    residual, delta = random(6, 40), random(6, 40, dtype=dtype, seed=1)
    total = residual + delta.float()
    out = torch.empty(2, 40, dtype=dtype)
    OPS.add_rows(residual.numpy(), bits(delta), np.array([4, 1], np.int32), bits(out))
    torch.testing.assert_close(residual[[4, 1]], total[[4, 1]])
    torch.testing.assert_close(out, total[[4, 1]].to(dtype))


@pytest.mark.parametrize("normalise", [True, False])
def test_add_experts_sums_the_rows_of_each_token(normalise):
    rows, weights = random(6, 40), random(3, 2, seed=1).abs()
    places = torch.tensor([[5, 0], [1, 4], [2, 3]])
    out = torch.empty(3, 40)
    OPS.add_experts(rows.numpy(), places.numpy(), weights.numpy(), normalise, out.numpy())
    share = weights / weights.sum(1, keepdim=True) if normalise else weights
    torch.testing.assert_close(out, (rows[places] * share[:, :, None]).sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_add_rms_norm_updates_the_residual_and_selects_rows(dtype):
    residual, delta, weight = random(6, 40), random(6, 40, dtype=dtype, seed=1), random(40, seed=2)
    total = residual + delta.float()
    rows = np.array([4, 1], np.int32)
    out = torch.empty(2, 40, dtype=dtype)
    OPS.add_rms_norm(residual.numpy(), bits(delta), rows, weight.numpy(), np.float32(1e-5), bits(out))
    expected = torch.nn.functional.rms_norm(total[[4, 1]], (40,), weight, 1e-5)
    torch.testing.assert_close(residual[[4, 1]], total[[4, 1]])
    torch.testing.assert_close(out, expected.to(dtype))


@settings(deadline=None)
@given(st.floats(-(2.0**127), 2.0**127, width=32))
def test_narrow_rounds_to_bfloat16_as_torch_does(value):
    """A rotation by angle 0 copies a value unchanged to the pool."""
    qkv = np.full((1, 6), value, np.float32)
    pool, q = np.zeros(4, np.uint16), np.zeros((1, 2), np.float32)
    one, zero = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    at = np.zeros(1, np.int64)
    OPS.rope_and_store(qkv, at.astype(np.int32), at, one, zero, 2, np.float32(1), 0, 2, 2, q, pool)
    assert torch.equal(torch.from_numpy(pool).view(torch.bfloat16), torch.full((4,), value).bfloat16())


def test_the_check_before_the_start_knows_what_auto_means():
    assert linear._has_bf16() == has_bf16()

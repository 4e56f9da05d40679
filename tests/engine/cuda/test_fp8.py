"""FP8 weights that stay FP8: the products, what is kept, and answers close to those of the dequantised model."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
import torch

from daemon.engine.cuda import fp8
from daemon.engine.cuda.kernels import multiplies_fp8
from daemon.engine.cuda.ops import TorchOps
from daemon.engine.cuda.product_choice import weight_groups
from daemon.engine.cuda.products import Products
from daemon.engine.cuda.weights import DeviceWeights, Linear, load_weights
from daemon.engine.weights import open_weights
from daemon.models.loader import open_model
from tests.engine.cpu.harness import generate, request
from tests.engine.cuda.harness import make_cuda_runner
from tests.models.quantised.quantise import quantise
from tests.models.tiny_families import FAMILIES, make_tiny

pytestmark = pytest.mark.integration
CPU = torch.device("cpu")
BY_ROWS = ("fp8, one scale", "fp8, rows", "compressed, float8 rows")


@pytest.fixture
def computes_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "is_supported", lambda device: True)


def made(path: Path, method: str, family: str = "qwen2", **changes: int) -> tuple[Path, Path]:
    """Return a quantised model, and the same model with plain weights."""
    plain = make_tiny(path / "plain", FAMILIES[family], **changes)
    return quantise(plain, path / "quantised", method), plain


def loaded(path: Path, *, keep_fp8: bool = True, head_dim: int = 16) -> DeviceWeights:
    return load_weights(open_model(path), "auto", CPU, torch.float32, head_dim=head_dim, keep_fp8=keep_fp8)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_products(rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 64, generator=generator) for n in (rows, 48))
    x[0] *= 1000  # each row has its own factor
    values, factors = fp8.round_rows(weight)
    added = torch.randn(48, generator=generator).bfloat16() if bias else None
    linear = Linear.of(values, added, factors.t().contiguous())
    out = torch.empty(rows, 48, dtype=torch.bfloat16)
    Products(TorchOps()).apply(linear, x.bfloat16(), out)
    exact = x @ (values.float() * factors).t() + (0 if added is None else added.float())
    # A number rounded to e4m3 is wrong by a sixteenth at most; the errors of a sum mostly cancel.
    assert ((out.float() - exact).norm(dim=1) < 0.05 * exact.norm(dim=1)).all()


def test_rows_are_rounded_by_their_largest_entry() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-3, -2e-3], [3e4, 1e4], [torch.inf, 1.0]]).bfloat16()
    rounded, scales = fp8.round_rows(x)
    back = rounded.float() * scales
    torch.testing.assert_close(back[:3], x[:3].float(), rtol=2**-4, atol=0)
    assert back[3].isnan().any()  # what bfloat16 would also make of it


@pytest.mark.parametrize("method", BY_ROWS)
@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_matrices_with_factors_of_rows_stay_fp8(tmp_path: Path, method: str, family: str) -> None:
    quantised, _ = made(tmp_path, method, family)
    ours, expected = loaded(quantised), loaded(quantised, keep_fp8=False)
    assert open_model(quantised).fp8_by_rows and ours.in_fp8 and not expected.in_fp8
    for layer, plain in zip(ours.layers, expected.layers, strict=True):
        for name in ("qkv", "out", "gate_up", "down"):
            linear, wanted = getattr(layer, name), getattr(plain, name)
            assert linear.weight.dtype is torch.float8_e4m3fn and linear.weight.is_contiguous()
            assert linear.scales.shape == (1, len(linear.weight)) and linear.scales.is_contiguous()
            assert torch.equal(linear.weight.float() * linear.scales.t(), wanted.weight)
            assert (linear.bias is None) == (wanted.bias is None)
    assert not [group for group in weight_groups(ours, 0) if group.names != ("head",)]


@pytest.mark.parametrize("method", ["fp8, blocks", "compressed, int4 groups", "gptq", "awq", "compressed, int8"])
def test_all_others_are_dequantised(tmp_path: Path, method: str) -> None:
    quantised, _ = made(tmp_path, method)
    assert not open_model(quantised).fp8_by_rows
    assert not loaded(quantised).in_fp8


def test_experts_are_dequantised_and_the_layers_around_them_not(tmp_path: Path) -> None:
    quantised, _ = made(tmp_path, "fp8, rows", "mixtral")
    [layer, _] = loaded(quantised).layers
    assert layer.experts is not None and layer.experts.gate_up.dtype is torch.float32
    assert layer.qkv.scales is not None


def test_matrices_that_do_not_fit_the_kernels_are_dequantised(tmp_path: Path) -> None:
    quantised, _ = made(tmp_path, "fp8, rows", intermediate_size=136)
    [layer, _] = loaded(quantised).layers
    assert layer.qkv.scales is not None
    assert layer.gate_up is not None and layer.gate_up.scales is None
    assert layer.down is not None and layer.down.scales is None


def test_heads_that_are_filled_with_zeros_are_dequantised(tmp_path: Path) -> None:
    quantised, _ = made(tmp_path, "fp8, rows")
    [layer, _] = loaded(quantised, head_dim=32).layers
    assert layer.qkv.scales is None and layer.out.scales is None
    assert layer.down is not None and layer.down.scales is not None


@pytest.mark.parametrize("method", BY_ROWS)
def test_answers_are_close_to_those_of_the_dequantised_model(tmp_path: Path, method: str, computes_fp8: None) -> None:
    """With the products for small batches, which read bf16, switched off."""
    quantised, plain = made(tmp_path, method)
    logits = {}
    for path in (quantised, plain):
        runner = make_cuda_runner(path, gemv=object() if path is quantised else None)
        assert runner.arithmetic == ("fp8" if path is quantised else "float32")
        r = request(list(range(3, 40)), count(1), 64)
        generate(runner, [r], 1)
        logits[path] = runner._forward.logits[0].clone()
        if path is quantised:
            assert list(runner._decode_paths.of(1)) == ["gemm"]
    wrong = (logits[quantised] - logits[plain]).norm() / logits[plain].norm()
    assert 0 < wrong < 0.15


def test_the_dtype_bf16_dequantises(tmp_path: Path, computes_fp8: None) -> None:
    quantised, _ = made(tmp_path, "fp8, rows")
    assert make_cuda_runner(quantised, dtype="bf16").arithmetic == "bfloat16"


def test_a_device_without_fp8_dequantises(tmp_path: Path) -> None:
    quantised, plain = made(tmp_path, "fp8, rows")
    assert not fp8.is_supported(CPU)
    assert make_cuda_runner(quantised).arithmetic == "float32"
    assert open_weights(open_model(plain), "auto").fp8("model.layers.0.mlp.down_proj.weight") is None
    assert open_weights(open_model(plain), "dummy").fp8("model.layers.0.mlp.down_proj.weight") is None


@pytest.mark.parametrize(
    ("arch", "expected"), [("8.0", False), ("8.6", False), ("8.9", True), ("9.0a", True), ("12.0f", True)]
)
def test_architectures(arch: str, expected: bool) -> None:
    assert multiplies_fp8(arch) is expected

"""FP8 weights on the device: products, alone and in CUDA graphs, and the answers of a model that keeps them."""

from __future__ import annotations

import random
from itertools import count
from typing import Any

import pytest
import torch

from daemon.engine.cuda import fp8, kernels
from daemon.engine.cuda.graphs import replay_seconds
from tests.engine.cpu.harness import generate, request
from tests.gpu.parts import (
    BF16,
    DEVICE,
    SIMULATED,
    judge_greedy,
    make_gpu_runner,
    small_family,
    tokens,
    transformers_bf16,
)
from tests.models.quantised.quantise import quantise
from tests.models.tiny_families import FAMILIES

CLOSE, RARE = 0.2, 0.25  # the rows of all inputs are rounded to three bits
COLUMNS, WIDTH = (512, 1024) if SIMULATED else (14336, 4096)


@pytest.fixture(autouse=True)
def device() -> torch.device:
    found = torch.device(DEVICE)
    if torch.cuda.get_device_capability(found) < kernels.FP8_CAPABILITY or (
        SIMULATED and not fp8.is_supported(found)
    ):
        pytest.skip("this device does not multiply FP8")
    return found


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 7, 64, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_products(rows: int, bias: bool, device: torch.device) -> None:
    assert fp8.is_supported(device)
    generator = torch.Generator(device).manual_seed(rows)
    x, weight = (torch.randn(n, WIDTH, device=device, generator=generator).to(BF16) for n in (rows, COLUMNS))
    values, factors = fp8.round_rows(weight)
    added = torch.randn(COLUMNS, device=device, generator=generator).to(BF16) if bias else None
    rounded, scales = fp8.round_rows(x)
    expected = (rounded.float() * scales) @ (values.float() * factors).t() + (0 if added is None else added.float())
    out = torch.empty(rows, COLUMNS, device=device, dtype=BF16)
    fp8.multiply(x, values.t(), factors.t().contiguous(), added, out)
    assert (out.float() - expected).abs().max() <= 2**-6 * expected.abs().max()


@torch.inference_mode()
def test_products_in_a_graph(device: torch.device, report_figure: Any) -> None:
    x = torch.randn(16, WIDTH, device=device).to(BF16)
    weight = torch.randn(COLUMNS, WIDTH, device=device).to(BF16)
    values, factors = fp8.round_rows(weight)
    by_column = factors.t().contiguous()
    out = torch.empty(16, COLUMNS, device=device, dtype=BF16)
    works = {
        "bf16": lambda: torch.mm(x, weight.t(), out=out),
        "FP8": lambda: fp8.multiply(x, values.t(), by_column, None, out),
    }
    stream, seconds = torch.cuda.Stream(device), {}
    for name, work in works.items():
        work()
        wanted = out.clone()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
        out.zero_()
        graph.replay()
        torch.cuda.synchronize(device)
        assert torch.equal(out, wanted)
        seconds[name] = replay_seconds(graph, stream, 20)
    times = ", ".join(f"{s * 1e6:.1f} us in {name}" for name, s in seconds.items())
    report_figure(f"product of 16 rows with {COLUMNS} x {WIDTH} weights: {times}")


@pytest.mark.parametrize("method", ["fp8, one scale", "compressed, float8 rows"])
def test_greedy_tokens_of_a_model(method: str, tmp_path: Any, report_figure: Any) -> None:
    plain = small_family(tmp_path / "plain", FAMILIES["qwen2"])
    runner = make_gpu_runner(quantise(plain, tmp_path / "quantised", method), dtype="auto", blocks=120)
    assert runner.arithmetic == "fp8"
    rng, blocks, answers = random.Random(0), count(1), []
    batch = [request(tokens(rng, rng.randint(1, 120)), blocks, 144) for _ in range(4)]
    generate(runner, batch, output=16, chunk=50, budget=120)
    answers += [(r.tokens, r.prompt_len) for r in batch]
    found = judge_greedy(transformers_bf16(plain, "cpu"), answers)
    report_figure(
        f"{method}: {found.different} of {found.positions} greedy tokens differ from those of bf16, "
        f"the reference leads by {found.worst:.1e} of its logit at most"
    )
    assert found.worst <= CLOSE
    assert found.different <= RARE * found.positions

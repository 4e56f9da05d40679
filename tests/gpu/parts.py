"""Parts of the GPU tests: passes driven by hand, runners, and Transformers as the reference for tokens."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from daemon.engine.cuda.product_choice import LIMITS, Limits
from daemon.engine.cuda.runner import CudaRunner
from daemon.models.architecture import LayerConfig, ModelConfig, RopeConfig
from daemon.models.loader import open_model
from tests.engine.cpu.harness import runner_settings
from tests.models.tiny_families import make_tiny
from tests.models.tiny_model import make_tiny_llama

DEVICE = "cuda:0"
SIMULATED = "SIMGPU" in os.environ
"""True if the device is simulated (tools.simgpu): the long tests then do less."""

BF16 = torch.bfloat16


def model_config_of(head_dim: int) -> ModelConfig:
    """Return the configuration of a small model without files."""
    return ModelConfig(
        path=Path("."),
        name=f"head_dim {head_dim}",
        family="llama",
        vocab_size=384,
        hidden_size=256,
        intermediate_size=512,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        layers=(LayerConfig(),) * 2,
        ropes=(RopeConfig(1e4, head_dim),),
        max_position=2048,
        tie_embeddings=True,
        eos_token_ids=(2,),
        query_scale=head_dim**-0.5,
    )


def small_llama(path: Path, **options: Any) -> Path:
    """Write a bf16 model with heads for which kernels exist, and return its directory."""
    defaults = {
        "hidden": 256,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "layers": 3,
        "dtype": "bfloat16",
        "max_position": 2048,
    }
    return make_tiny_llama(path, **defaults | options)


def small_family(path: Path, kind: tuple[str, dict[str, Any]]) -> Path:
    """Write a bf16 model of `kind`, a value of `tiny_families.FAMILIES`, with heads for which kernels exist.

    Tokens go to all experts: which few are chosen jumps with a rounding, and then the answers of both differ.
    """
    _, arguments = kind
    experts = arguments.get("num_experts") or arguments.get("num_local_experts")
    every = {"num_experts_per_tok": experts} if experts else {}
    make_tiny(path, kind, hidden_size=256, head_dim=64, **every)
    file = path / "model.safetensors"
    save_file({name: tensor.to(BF16) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return path


def make_gpu_runner(
    path: Path,
    *,
    blocks: int = 400,
    decode_path: Any = "auto",
    mixed_steps: Any = "one pass",
    product_limits: Limits = LIMITS,
    **options: Any,
) -> CudaRunner:
    """Return a loaded runner with a pool full of noise, so that a read of KV that was never written is visible."""
    defaults: dict[str, Any] = {"dtype": "bf16", "max_num_seqs": 24, "max_batch_tokens": 128}
    settings = runner_settings(**(defaults | options))
    config = open_model(path, load_format=settings.load_format)
    elements = blocks * 2 * config.num_layers * settings.block_size * config.num_kv_heads * config.head_dim
    kv_memory = elements * (1 if settings.kv_dtype == "fp8" else 2)
    settings = replace(settings, kv_memory=kv_memory)
    runner = CudaRunner(
        config,
        settings,
        device=DEVICE,
        decode_path=decode_path,
        mixed_steps=mixed_steps,
        product_limits=product_limits,
    )
    runner.load()
    runner.pool_memory.view(-1)[runner.pool_spec(1).block_bytes :].fill_(0x41)  # about 10 in bf16, 2 in e4m3
    runner._synchronize()
    return runner


def tokens(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(3, 380) for _ in range(n)]


# -- Transformers as the reference


class Judgement(NamedTuple):
    """Comparison of greedy tokens with the reference, position by position."""

    positions: int
    different: int  # positions with another token than the reference's
    worst: float  # largest gap of our token's logit to the best logit, as a share of the best logit


def transformers_bf16(path: Path, device: str = DEVICE) -> Any:
    """Load the model's bf16 weights for float32 arithmetic: the reference, without rounding of its own."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(device)


@torch.inference_mode()
def logits_after(model: Any, ids: Sequence[int], prompt_len: int) -> torch.Tensor:
    """Return Transformers' logits for each output token, float32[output, vocab]."""
    return model(torch.tensor([list(ids[:-1])], device=model.device)).logits[0, prompt_len - 1 :].float()


def judge_greedy(model: Any, answers: Sequence[tuple[Sequence[int], int]]) -> Judgement:
    """Compare each answer (all ids, length of the prompt) with the choices of Transformers after the same tokens."""
    positions, different, worst = 0, 0, 0.0
    for ids, prompt_len in answers:
        logits = logits_after(model, ids, prompt_len)
        taken = logits.gather(1, torch.tensor(list(ids[prompt_len:]), device=logits.device)[:, None])[:, 0]
        best = logits.amax(1)
        behind = (best - taken) / best.abs()
        positions += len(behind)
        different += int((taken < best).sum())
        worst = max(worst, float(behind.max()))
    return Judgement(positions, different, worst)

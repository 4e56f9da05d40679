"""Transformers on the same device, with random weights of the same shape, for comparison."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch


def model_of(config: dict[str, Any], device: str) -> Any:
    """Make the model on the device, in bf16 (float32 on the CPU)."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    names = ("architectures", "model_type", "torch_dtype")
    shape = LlamaConfig(**{k: v for k, v in config.items() if k not in names})
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        return AutoModelForCausalLM.from_config(shape, dtype=dtype).eval()


def settings(output: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=output, min_new_tokens=output, do_sample=False, eos_token_id=None, pad_token_id=0
    )


def continuous(model: Any, prompts: Sequence[list[int]], output: int) -> tuple[float, int]:
    """Run its continuous batching, including its set-up. Return seconds and output tokens.

    Raises RuntimeError if an answer is missing or too short: Transformers only logs its errors and returns the rest.
    """
    plain = settings(output)
    model.generate_batch(inputs=list(prompts[:2]), generation_config=settings(4))
    began = time.perf_counter()
    answers = model.generate_batch(inputs=list(prompts), generation_config=plain)
    seconds = time.perf_counter() - began
    whole = [a for a in answers.values() if a.error is None and len(a.generated_tokens) == output]
    if len(whole) != len(prompts):
        errors = sorted({str(a.error) for a in answers.values() if a.error is not None})
        raise RuntimeError(f"{len(whole)} of {len(prompts)} prompts were answered {'; '.join(errors)}")
    return seconds, len(prompts) * output


@torch.inference_mode()
def static(model: Any, prompts: Sequence[list[int]], output: int) -> tuple[float, int]:
    """Run all prompts, of equal length, as one batch. Return seconds and output tokens."""
    batch = torch.tensor(list(prompts), device=model.device)
    mask = torch.ones_like(batch)
    model.generate(batch[:2], attention_mask=mask[:2], generation_config=settings(4))
    began = time.perf_counter()
    answer = model.generate(batch, attention_mask=mask, generation_config=settings(output))
    tokens = int((answer.shape[1] - batch.shape[1]) * len(batch))
    return time.perf_counter() - began, tokens

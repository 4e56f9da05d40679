"""What a CUDA engine checks and chooses before it reads a weight: dtypes, the device, the compiled kernels."""

from __future__ import annotations

import os
from typing import Any, Literal, NamedTuple

import torch

from daemon.engine.cuda import driver, kernels
from daemon.engine.runner import RunnerSettings
from daemon.models.model_config import ModelConfig, ModelError

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}


class Format(NamedTuple):
    """The dtype of the model's arithmetic, and the dtype of its KV cache."""

    dtype: torch.dtype
    kv_dtype: torch.dtype


def choose_format(device: torch.device, settings: RunnerSettings) -> Format:
    """Return the dtypes that `settings` mean on `device`. Raises ModelError for a combination that cannot work."""
    dtype, kv_dtype = settings.dtype, settings.kv_dtype
    cuda = device.type == "cuda"
    if cuda and settings.deterministic:
        raise ModelError("deterministic is for CPU engines only: on a GPU the rounding depends on the batch")
    if cuda and dtype == "fp32":
        raise ModelError("a CUDA engine computes in bf16: set dtype to auto or bf16")
    name = dtype if dtype != "auto" else "bf16" if cuda else "fp32"
    if kv_dtype not in ("auto", "fp8"):
        raise ModelError(f"kv_dtype {kv_dtype!r} is unknown; use auto or fp8")
    return Format(_DTYPES[name], _DTYPES[name if kv_dtype == "auto" else kv_dtype])


def check_device(config: ModelConfig, device: torch.device, kv_dtype: str, prefill: Literal["fa2", "fa3"]) -> None:
    """Check the device, and make FlashInfer load the kernels that were compiled ahead of time.

    Raises ModelError that names what is missing.
    """
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
    if "expandable_segments:true" in settings.lower():
        raise ModelError(
            "expandable_segments is on in PYTORCH_ALLOC_CONF: other engines could not map such a pool; remove it"
        )
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(_no_device(device))
    torch.cuda.set_device(device)
    arch = kernels.arch_of(*torch.cuda.get_device_capability(device))
    try:
        specs = kernels.required(config, arch=arch, kv_dtype="fp8" if kv_dtype == "fp8" else "auto", prefill=prefill)
        kernels.use(kernels.check(specs, arch), specs)
    except kernels.KernelError as e:
        raise ModelError(str(e)) from e


def _no_device(device: torch.device) -> str:
    count = torch.cuda.device_count()
    text = f"there is no {device}; PyTorch finds {count} CUDA devices"
    if not count:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as e:  # AssertionError: a build for the CPU
            text += f" ({str(e).splitlines()[0]})"
    why = driver.why_no_device(torch.version.cuda or "")
    return f"{text}: {why}" if why else text


def shared_memory_bytes(device: torch.device) -> int:
    """Return how much shared memory one thread block can have. The CPU has no limit: 1 GiB."""
    if device.type != "cuda":
        return 1 << 30
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)

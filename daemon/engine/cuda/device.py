"""What a CUDA engine checks and chooses before it reads a weight: dtypes, the device, the compiled kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch

from daemon.engine.cuda import driver, kernels
from daemon.engine.cuda.memory import DeviceMemory, out_of_memory
from daemon.engine.runner import RunnerSettings, Unavailable
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

    Raises ModelError that names what is missing, Unavailable without the device.
    """
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
    if "expandable_segments:true" in settings.lower():
        raise ModelError(
            "expandable_segments is on in PYTORCH_ALLOC_CONF: other engines could not map such a pool; remove it"
        )
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise _no_device(device)
    torch.cuda.set_device(device)
    arch = kernels.arch_of(*torch.cuda.get_device_capability(device))
    try:
        specs = kernels.required(config, arch=arch, kv_dtype="fp8" if kv_dtype == "fp8" else "auto", prefill=prefill)
        kernels.use(kernels.check(specs, arch), specs)
    except kernels.KernelError as e:
        raise ModelError(str(e)) from e


def _no_device(device: torch.device) -> ModelError | Unavailable:
    """Return the error for a device that PyTorch does not find. The daemon found it when it started."""
    count = torch.cuda.device_count()
    text = f"there is no {device}; PyTorch finds {count} CUDA devices"
    if not count:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as e:  # AssertionError: a build for the CPU
            text += f" ({str(e).splitlines()[0]})"
    why = driver.why_no_device(torch.version.cuda or "")
    return ModelError(f"{text}: {why}") if why else Unavailable(text)


def device_memory(device: torch.device, share: float) -> DeviceMemory:
    """Return what an engine that may use `share` of the device's memory finds there."""
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(free + torch.cuda.memory_reserved(device), int(total * share))


@contextmanager
def explained_out_of_memory(device: torch.device, share: float, weights: int) -> Iterator[None]:
    """Raise ModelError or Unavailable for a lack of the device's memory. `weights`: bytes of the model's weights."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise out_of_memory(device_memory(device, share), weights) from e


def shared_memory_bytes(device: torch.device) -> int:
    """Return how much shared memory one thread block can have. The CPU has no limit: 1 GiB."""
    if device.type != "cuda":
        return 1 << 30
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def head_dims(device: torch.device) -> tuple[int, ...]:
    """Return the widths of heads that attention can compute; (): all."""
    return kernels.HEAD_DIMS if device.type == "cuda" else ()

"""Which devices this machine has, and what must be there before engines start on its GPUs. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

from daemon.config import Config, ConfigError
from daemon.engine.cuda import kernels
from daemon.engine.cuda.kernels import KernelError, KvDtype
from daemon.models.model_config import ModelConfig

_MOST_ENGINES = 64
_CPU = ["cpu", "cpu"]
_DRIVER = Path("/proc/driver/nvidia/gpus")
_SET_UP = "LLUMD_TORCH=cuda bin/serve sets up what GPUs need"


class Gpus(NamedTuple):
    """The GPUs that CUDA shows to whoever asks here."""

    number: int
    arch: str  # of each of them; "" if they differ, so that only CUDA knows which is which, or if it cannot be told


def find(config: Config, say: Callable[[str], None]) -> list[str]:
    """The default of `devices`: every GPU that CUDA shows; two engines on the CPU where there is none or none of
    use, or where engines compute nothing."""
    if config.engine != "model":
        return list(_CPU)
    try:
        gpus = look().number
    except KernelError as e:
        say(f"llumd: {e}; serving on the CPU")
        return list(_CPU)
    return [f"cuda:{i}" for i in range(min(gpus, _MOST_ENGINES))] or list(_CPU)


def check_gpus(config: Config, model_config: ModelConfig) -> None:
    """Refuse with a ConfigError, before anything is started, what engines on GPUs could not start with: no such GPU,
    packages without CUDA, kernels that nobody has compiled."""
    try:
        gpus = look()
        _check_numbers(config.devices, gpus.number)
        _check_torch()
        kernels.flashinfer_version()
        if gpus.arch:  # else each engine looks for its kernels itself, before it loads the model
            specs = kernels.required(model_config, arch=gpus.arch, kv_dtype=cast(KvDtype, config.kv_dtype))
            kernels.check(specs, gpus.arch, build_command=_build_command(config))
    except KernelError as e:
        raise ConfigError(str(e)) from None


def look(driver: Path = _DRIVER) -> Gpus:
    """What nvidia-smi says or, without that, the driver itself. Raises KernelError for a GPU too old."""
    archs = kernels.gpu_archs()
    installed = len(archs) or (len(list(driver.iterdir())) if driver.is_dir() else 0)
    arch = archs[0] if len(set(archs)) == 1 else ""
    return Gpus(visible(installed, os.environ.get("CUDA_VISIBLE_DEVICES")), arch)


def visible(installed: int, named: str | None) -> int:
    """How many of the `installed` GPUs CUDA shows, given $CUDA_VISIBLE_DEVICES: those up to the first entry that
    names none."""
    if named is None or not installed:
        return installed
    count = 0
    for entry in map(str.strip, named.split(",")):
        if not (re.match("GPU-|MIG-", entry) or (entry.isdecimal() and int(entry) < installed)):
            break
        count += 1
    return count


def torch_cuda(version_file: Path) -> str | None:
    """The CUDA that a PyTorch is built for, by its version.py; None for a build without."""
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", version_file.read_text(), re.MULTILINE)
    return found[1] if found else None


def _check_numbers(devices: list[str], gpus: int) -> None:
    numbers = {int(d.removeprefix("cuda:")) for d in devices}
    absent = sorted(n for n in numbers if n >= gpus)
    if not absent:
        return
    limit = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = f" (CUDA_VISIBLE_DEVICES is {limit!r})" if limit is not None else ""
    there = f"GPUs here are numbered 0 to {gpus - 1}" if gpus else "no NVIDIA GPU is seen here"
    advice = "" if gpus else "; ask nvidia-smi whether the driver works, or serve on the CPU: `--devices cpu,cpu`"
    raise ConfigError(f"devices: there is no cuda:{absent[0]}: {there}{why}{advice}")


def _check_torch() -> None:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise ConfigError(f"PyTorch is not installed; {_SET_UP}")
    if torch_cuda(Path(found.origin).with_name("version.py")) is None:
        raise ConfigError(
            f"devices: PyTorch here is built for the CPU alone; {_SET_UP}; or serve on the CPU: `--devices cpu,cpu`"
        )


def _build_command(config: Config) -> str:
    model = "" if config.model == "demo" else " " + shlex.quote(config.model)
    return f"llumd kernels build{model}" + (" --kv-dtype fp8" if config.kv_dtype == "fp8" else "")

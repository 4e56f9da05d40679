"""Detection of the GPUs of this machine, and checks before engines start on them. Does not import torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

from daemon.cli.commands import command
from daemon.config import MAX_ENGINES, Config, ConfigError
from daemon.engine.cuda import kernels
from daemon.engine.cuda.kernels import KernelError, KvDtype
from daemon.models.model_config import ModelConfig

_CPU = ["cpu", "cpu"]
_DRIVER = Path("/proc/driver/nvidia/gpus")
_SET_UP = "`LLUMD_TORCH=cuda bin/serve` installs the packages for GPUs"


class Gpus(NamedTuple):
    """The GPUs that CUDA makes visible to this process."""

    number: int
    arch: str  # architecture of every GPU; "" if they differ (only CUDA knows their order) or if it is unknown


def default_devices(config: Config, progress: Callable[[str], None]) -> list[str]:
    """Return the default of `devices`: every visible GPU, or two engines on the CPU.

    Machines without usable GPUs and engines without a model use the CPU. If there are GPUs that are not usable,
    `progress` gets the reason.
    """
    if config.engine != "model":
        return list(_CPU)
    try:
        count = detect_gpus().number
    except KernelError as e:
        progress(f"llumd: {e}; serving on the CPU")
        return list(_CPU)
    return [f"cuda:{i}" for i in range(min(count, MAX_ENGINES))] or list(_CPU)


def check_gpus(config: Config, model_config: ModelConfig) -> None:
    """Check that the GPUs exist, that the packages support CUDA and that the kernels are compiled.

    Raises ConfigError.
    """
    try:
        gpus = detect_gpus()
        _check_numbers(config.devices, gpus.number)
        _check_torch()
        kernels.flashinfer_version()
        if gpus.arch:  # otherwise each engine checks its kernels itself, before it loads the model
            specs = kernels.required(model_config, arch=gpus.arch, kv_dtype=cast(KvDtype, config.kv_dtype))
            kernels.check(specs, gpus.arch, build_command=_build_command(config))
    except KernelError as e:
        raise ConfigError(str(e)) from None


def detect_gpus(driver: Path = _DRIVER) -> Gpus:
    """Return the visible GPUs, from nvidia-smi or otherwise from the driver. Raises KernelError for an old GPU."""
    archs = kernels.gpu_archs()
    installed = len(archs) or (len(list(driver.iterdir())) if driver.is_dir() else 0)
    arch = archs[0] if len(set(archs)) == 1 else ""
    return Gpus(count_visible(installed, os.environ.get("CUDA_VISIBLE_DEVICES")), arch)


def count_visible(installed: int, variable: str | None) -> int:
    """Return how many of the `installed` GPUs are visible with this $CUDA_VISIBLE_DEVICES (None: not set).

    As in CUDA, the first entry that is no GPU ends the list.
    """
    if variable is None or not installed:
        return installed
    count = 0
    for entry in map(str.strip, variable.split(",")):
        if not (re.match("GPU-|MIG-", entry) or (entry.isdecimal() and int(entry) < installed)):
            break
        count += 1
    return count


def torch_cuda(version_file: Path) -> str | None:
    """Return the CUDA version of a PyTorch build, from its version.py. None for a build without CUDA."""
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", version_file.read_text(), re.MULTILINE)
    return found[1] if found else None


def _check_numbers(devices: list[str], gpus: int) -> None:
    numbers = {int(d.removeprefix("cuda:")) for d in devices}
    absent = sorted(n for n in numbers if n >= gpus)
    if not absent:
        return
    limit = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = f" (CUDA_VISIBLE_DEVICES is {limit!r})" if limit is not None else ""
    visible = f"the visible GPUs have the numbers 0 to {gpus - 1}" if gpus else "no NVIDIA GPU is visible"
    advice = "" if gpus else "; check the driver with nvidia-smi, or serve on the CPU: `--devices cpu,cpu`"
    raise ConfigError(f"devices: there is no cuda:{absent[0]}: {visible}{why}{advice}")


def _check_torch() -> None:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise ConfigError(f"PyTorch is not installed; {_SET_UP}")
    if torch_cuda(Path(found.origin).with_name("version.py")) is None:
        raise ConfigError(
            f"devices: this PyTorch is built for the CPU only; {_SET_UP}, or serve on the CPU: `--devices cpu,cpu`"
        )


def _build_command(config: Config) -> str:
    model = "" if config.model == "demo" else " " + shlex.quote(config.model)
    return f"{command('llumd')} kernels build{model}" + (" --kv-dtype fp8" if config.kv_dtype == "fp8" else "")

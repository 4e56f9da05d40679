"""Detection of the GPUs of this machine, and checks before engines start on them. Does not import torch."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from daemon.config import MAX_ENGINES, Config, ConfigError
from daemon.engine.cuda import driver, kernels, toolkit
from daemon.engine.cuda.kernels import KernelError

_CPU = ["cpu", "cpu"]
_SET_UP = "`LLUMD_TORCH=cuda bin/serve` installs the packages for GPUs"
_ON_CPU = "or serve on the CPU: `--devices cpu,cpu`"


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs that CUDA makes visible to this process."""

    number: int
    archs: frozenset[str] = frozenset()  # of all GPUs of the machine: only CUDA knows their order; empty: unknown
    driver: str = ""  # its version, "" if it is unknown
    slices: bool = False  # they are MIG slices; CUDA shows one of them to a process


def default_devices(config: Config, progress: Callable[[str], None]) -> list[str]:
    """Return the default of `devices`: every visible GPU, or two engines on the CPU.

    Machines without usable GPUs and engines without a model use the CPU. If there are GPUs that are not usable,
    `progress` gets the reason.
    """
    if config.engine != "model":
        return list(_CPU)
    try:
        gpus = detect_gpus()
    except KernelError as e:
        progress(f"llumd: {e}; serving on the CPU")
        return list(_CPU)
    if gpus.slices and gpus.number:
        progress(f"llumd: one engine on one slice of a GPU: {driver.MIG_ADVICE}")
    return [f"cuda:{i}" for i in range(min(gpus.number, MAX_ENGINES))] or list(_CPU)


def check_gpus(config: Config) -> Gpus:
    """Check that the GPUs exist, and that driver and packages support CUDA. Return the GPUs. Raises ConfigError."""
    try:
        gpus = detect_gpus()
        _check_numbers(config.devices, gpus)
        _check_torch(gpus)
        kernels.flashinfer_version()
    except KernelError as e:
        raise ConfigError(f"devices: {e}") from None
    return gpus


def detect_gpus() -> Gpus:
    """Return the visible GPUs, from nvidia-smi or otherwise from the driver.

    Raises KernelError for an old GPU, and if there are GPUs that this process cannot use.
    """
    report = driver.survey()
    if report.problem:
        raise KernelError(report.problem)
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = count_visible(report.installed, shown)
    slices = _shows_slices(report.mig, shown)
    return Gpus(min(number, 1) if slices else number, frozenset(report.archs), report.version, slices)


def _shows_slices(mig: tuple[bool, ...], variable: str | None) -> bool:
    """Return whether CUDA shows slices: they are named, or a GPU that is not hidden is divided."""
    entries = [] if variable is None else [entry.strip() for entry in variable.split(",")]
    if any(entry.startswith("MIG-") for entry in entries):
        return True
    if entries and all(entry.isdecimal() for entry in entries):
        return any(mig[int(entry)] for entry in entries if int(entry) < len(mig))
    return any(mig)


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


def _check_numbers(devices: list[str], gpus: Gpus) -> None:
    numbers = {int(d.removeprefix("cuda:")) for d in devices}
    absent = sorted(n for n in numbers if n >= gpus.number)
    if not absent:
        return
    limit = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = f" (CUDA_VISIBLE_DEVICES is {limit!r})" if limit is not None else ""
    visible, advice = "no NVIDIA GPU is visible", f"; check the driver with nvidia-smi, {_ON_CPU}"
    if gpus.number:
        visible = f"the visible GPUs have the numbers 0 to {gpus.number - 1}"
        advice = f"; {driver.MIG_ADVICE}" if gpus.slices else ""
    raise ConfigError(f"devices: there is no cuda:{absent[0]}: {visible}{why}{advice}")


def _check_torch(gpus: Gpus) -> None:
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(f"PyTorch is not installed; {_SET_UP}")
    cuda = toolkit.torch_cuda_version()
    if cuda is None:
        raise ConfigError(f"devices: this PyTorch is built for the CPU only; {_SET_UP}, {_ON_CPU}")
    if old := driver.too_old(gpus.driver, cuda):
        raise ConfigError(f"devices: {old}, {_ON_CPU}")

"""What the NVIDIA driver tells about this machine, from nvidia-smi and from files, and why its GPUs cannot be used.

It opens no GPU and needs no torch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from daemon.engine.cuda import kernels

ROOT = Path("/")
_FIELDS = "compute_cap,driver_version,mig.mode.current"
_LEAST_DRIVER = {13: 580, 12: 525, 11: 450}  # major version of CUDA -> of the driver, for every minor version
_SMI_SECONDS = 60
_ASK_CUDA = (
    "import ctypes; v = ctypes.c_int(); "
    "ctypes.CDLL('libcuda.so.1').cuDriverGetVersion(ctypes.byref(v)); print(v.value)"
)
MIG_ADVICE = (
    "CUDA shows a process one MIG slice. CUDA_VISIBLE_DEVICES=MIG-... chooses it (`nvidia-smi -L` lists them), "
    "`--devices cuda:0,cuda:0` puts two engines on it, and another slice needs another llumd: requests do not move "
    "between slices"
)


@dataclass(frozen=True, slots=True)
class Report:
    """The GPUs and the driver of this machine."""

    archs: tuple[str, ...]  # of the GPUs that nvidia-smi lists, by its index
    mig: tuple[bool, ...]  # for each of them: is it divided into slices
    installed: int  # GPUs that the driver has, also if nvidia-smi does not work
    version: str  # of the driver, such as "580.65.06"; "" if it is unknown
    problem: (
        str  # why GPUs that seem to be there cannot be used, and what to do; "" if they can, or if there are none
    )


def survey() -> Report:
    """Ask nvidia-smi and the files of the driver. Raises KernelError for a GPU that is too old."""
    rows, error = _query_gpus()
    archs = tuple(kernels.parse_arch(row[0]) for row in rows)
    folder = ROOT / "proc/driver/nvidia/gpus"
    listed = len(list(folder.iterdir())) if folder.is_dir() else 0
    version = next((row[1] for row in rows if row[1]), "") or _module_version()
    mig = tuple(row[2] == "Enabled" for row in rows)
    return Report(archs, mig, len(rows) or listed, version, "" if rows else _problem(listed, error))


def _query_gpus() -> tuple[list[list[str]], str]:
    """Return compute capability, driver and MIG mode of each GPU, or what nvidia-smi says instead."""
    command = ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
            timeout=_SMI_SECONDS,
        )  # fmt: skip
    except OSError:
        return [], ""
    except subprocess.TimeoutExpired:
        return [], f"it gives no answer within {_SMI_SECONDS} s"
    lines = [[field.strip() for field in line.split(",")] + ["", ""] for line in done.stdout.splitlines()]
    rows = [line for line in lines if re.fullmatch(r"\d+\.\d", line[0])]
    said = next((line.strip() for line in done.stdout.splitlines() if line.strip()), f"exit code {done.returncode}")
    return rows, said if done.returncode else ""


def _module_version() -> str:
    """Return the version of the driver's kernel module."""
    try:
        text = (ROOT / "proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", text)
    return found[1] if found else ""


def _problem(listed: int, error: str) -> str:
    """Say why nvidia-smi lists no GPU, although the driver has some or nvidia-smi is there. "" if neither is so."""
    nodes = sorted((ROOT / "dev").glob("nvidia[0-9]*"))
    if listed and not nodes:
        return (
            f"the driver of this machine has {listed} GPU{'s' if listed > 1 else ''}, but there is no /dev/nvidia0. "
            "A container must be started with its GPUs: `docker run --gpus all`, `podman run --device "
            "nvidia.com/gpu=all`. Outside of a container, `sudo nvidia-modprobe -u -c 0` makes the device files"
        )
    if closed := [node for node in nodes if not os.access(node, os.R_OK | os.W_OK)]:
        return f"this user may not open {closed[0]}; see the group that owns it: `ls -l {closed[0]}`"
    if "version mismatch" in error:
        return f"nvidia-smi fails: {error}. The driver was updated while it was in use; restart this machine"
    if error and not listed and (ROOT / "proc/driver/nvidia/version").exists():
        return f"nvidia-smi fails: {error}. The driver runs, but finds no GPU; `sudo dmesg | grep NVRM` may say why"
    if error and not listed:
        return (
            f"nvidia-smi fails: {error}. The kernel module of the driver is not loaded: `sudo modprobe nvidia`; "
            "if that fails, install the driver again for this kernel"
        )
    return ""


def too_old(version: str, cuda: str) -> str:
    """Say that a driver of `version` is too old for CUDA `cuda`, and what to do. "" if it is not, or not known."""
    least = _LEAST_DRIVER.get(kernels.major(cuda))
    if not version or least is None or kernels.major(version) >= least or _serves(cuda):
        return ""
    return (
        f"the NVIDIA driver {version} is too old for PyTorch with CUDA {cuda}, which needs driver {least} or newer; "
        "update the driver"
    )


def _serves(cuda: str) -> bool:
    """Ask libcuda for its CUDA version: NVIDIA's package cuda-compat brings a newer one than the driver's own."""
    done = subprocess.run([sys.executable, "-I", "-c", _ASK_CUDA], capture_output=True, text=True, check=False)
    return done.stdout.strip().isdecimal() and int(done.stdout) // 1000 >= kernels.major(cuda)


def why_no_device(cuda: str) -> str:
    """Say why PyTorch with CUDA `cuda` ("": a build for the CPU) may find no GPU. "" if nothing is known."""
    try:
        report = survey()
    except kernels.KernelError as e:
        return str(e)
    if report.problem:
        return report.problem
    if cuda and (old := too_old(report.version, cuda)):
        return old
    if any(report.mig):
        return MIG_ADVICE
    if report.archs and list((ROOT / "dev").glob("nvidia[0-9]*")) and not (ROOT / "dev/nvidia-uvm").exists():
        return (
            "there is no /dev/nvidia-uvm: `sudo nvidia-modprobe -u -c 0` makes it; "
            "a container must be started with it, as with the other device files"
        )
    return ""

"""The CUDA engine's compiled kernels: which a configuration needs, where they are kept, how FlashInfer finds them.

FlashInfer compiles its kernels at first use, with nvcc and ninja, in the middle of serving. Here they are compiled
ahead of time (`compile.py`) into a directory with FlashInfer's own layout, `<name>/<name>.so`, and FlashInfer is told
to load them from there and to compile nothing. Everything but `use` and what loads modules works without torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from daemon.config import cache_dir
from daemon.models.model_config import ModelConfig

Dtype = Literal["bf16", "fp16"]
KvDtype = Literal["auto", "fp8"]  # auto: as dtype; fp8: e4m3
Prefill = Literal["fa2", "fa3"]

HEAD_DIMS = (64, 128, 256)  # what FlashInfer's attention kernels are made for
_NVCC_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG")
SAMPLER_NVCC_FLAGS = (*_NVCC_FLAGS, "-fmad=false")  # the noise is exact only without fusing
APPEND_NVCC_FLAGS = SAMPLER_NVCC_FLAGS  # torch's rounding, to the last bit
GEMV_NVCC_FLAGS = _NVCC_FLAGS
RECORD = "built.json"
_SOURCES = Path(__file__).parent / "csrc"
_LEAST_MAJOR = 8  # bf16 on tensor cores
_FA3_MAJOR = 9


class KernelError(Exception):
    """Kernels that cannot be had or used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One compiled module. `generator` and `args` tell `generate.py` what to have FlashInfer write."""

    name: str  # FlashInfer's, and so its file's
    purpose: str
    generator: str
    args: tuple[str | int, ...] = ()


@dataclass(frozen=True, slots=True)
class Built:
    """A module that is whole and in its place, as its record says."""

    name: str
    size: int  # bytes of the .so
    nvcc: str  # version, such as "13.0"
    tvm_ffi: str  # version of the headers it was compiled with


def required(
    model_config: ModelConfig,
    *,
    arch: str,
    dtype: Dtype = "bf16",
    kv_dtype: KvDtype = "auto",
    prefill: Prefill = "fa2",
) -> list[KernelSpec]:
    """Every module that serving `model_config` on a GPU of `arch` loads, the quickly compiled ones first.

    The fa2 prefill module serves decode on tensor cores too, so it is always among them. Raises KernelError for a
    model or a combination that no kernel exists for.
    """
    if model_config.head_dim not in HEAD_DIMS:
        known = ", ".join(map(str, HEAD_DIMS))
        raise KernelError(
            f"{model_config.name}: CUDA kernels exist for head_dim {known}, "
            f"not {model_config.head_dim}; serve it on cpu"
        )
    attention = [_attention("fa2", dtype, kv_dtype, model_config.head_dim)]
    if prefill == "fa3":
        if not arch.startswith(f"{_FA3_MAJOR}."):
            raise KernelError(f"fa3 prefill is for 9.0a alone, not for {arch}; use fa2")
        if kv_dtype == "fp8":
            raise KernelError("fa3 prefill cannot read an fp8 KV cache; use fa2")
        attention.append(_attention("fa3", dtype, kv_dtype, model_config.head_dim))
    return [
        KernelSpec("silu_and_mul", "SiLU and product", "activation", ("silu",)),
        sampler(),
        append(),
        gemv(),
        KernelSpec("norm", "RMSNorm", "norm"),
        *attention,
    ]


def _attention(backend: Prefill, dtype: Dtype, kv_dtype: KvDtype, head_dim: int) -> KernelSpec:
    q = {"bf16": "bf16", "fp16": "f16"}[dtype]
    kv = "e4m3" if kv_dtype == "fp8" else q
    name = (
        f"batch_prefill_with_kv_cache_dtype_q_{q}_dtype_kv_{kv}_dtype_o_{q}_dtype_idx_i32_"
        f"head_dim_qk_{head_dim}_head_dim_vo_{head_dim}_posenc_0_use_swa_False_use_logits_cap_False_f16qk_False"
    )
    what = "prefill and decode attention" if backend == "fa2" else "prefill attention"
    purpose = f"{what}, {backend}, head_dim {head_dim}, {kv} KV"
    return KernelSpec(name + ("_sm90" if backend == "fa3" else ""), purpose, "attention", (backend, q, kv, head_dim))


def sampler() -> KernelSpec:
    """The project's own draw."""
    files = ("host_device.h", "draw.h", "row.h", "pages.h", "launch.cuh", "sampler.cu")
    return _own("sampler", "the draw of tokens", files, SAMPLER_NVCC_FLAGS)


def append() -> KernelSpec:
    """The project's own rotary embedding and append to the paged KV cache."""
    files = ("host_device.h", "pages.h", "append.h", "launch.cuh", "append.cu")
    return _own("append", "rotary embedding and append to the KV cache", files, APPEND_NVCC_FLAGS)


def gemv() -> KernelSpec:
    """The project's own products of few rows."""
    files = ("host_device.h", "pages.h", "gemv.h", "launch.cuh", "gemv.cu")
    return _own("gemv", "products of few rows", files, GEMV_NVCC_FLAGS)


def _own(module: str, purpose: str, files: tuple[str, ...], flags: tuple[str, ...]) -> KernelSpec:
    """A module of `files`, the last of which is compiled. Its name holds a hash of sources and flags: a changed
    source is a missing kernel."""
    digest = hashlib.sha256(" ".join(flags).encode())
    try:
        for file in files:
            digest.update(b"\0" + file.encode() + b"\0" + (_SOURCES / file).read_bytes())
    except FileNotFoundError as e:
        raise KernelError(f"{e.filename} is not there; install llumd again") from None
    name = f"llumd_{module}_{digest.hexdigest()[:12]}"
    return KernelSpec(name, purpose, "own", (str(_SOURCES / files[-1]), *flags))


def parse_arch(text: str) -> str:
    """A compute capability as FlashInfer writes it: "9.0" is "9.0a", "8.6" stays. Raises KernelError."""
    found = re.fullmatch(r"(\d{1,2})\.(\d)([af]?)", text.strip())
    if not found:
        raise KernelError(f"{text!r} is not a GPU architecture; write a compute capability such as 9.0a or 8.9")
    major, minor, suffix = int(found[1]), int(found[2]), found[3]
    if major < _LEAST_MAJOR:
        raise KernelError(f"architecture {text}: 8.0 (Ampere) or newer is needed")
    return f"{major}.{minor}{suffix}" if suffix else arch_of(major, minor)


def arch_of(major: int, minor: int) -> str:
    """The architecture to compile for on a GPU of that compute capability."""
    if major == 12 and minor == 0:
        return "12.0f"
    return f"{major}.{minor}" + ("a" if major >= 9 else "")


def gpu_archs() -> list[str]:
    """Architectures of the GPUs seen, by index; empty without a driver. Raises KernelError for a GPU too old."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [parse_arch(line) for line in done.stdout.split() if re.fullmatch(r"\d+\.\d", line)]


def kernels_dir() -> Path:
    """Where all compiled kernels are kept: $LLUMD_KERNELS, or `kernels` in the cache."""
    named = os.environ.get("LLUMD_KERNELS")
    return Path(named).expanduser().absolute() if named else cache_dir() / "kernels"


def directory(arch: str) -> Path:
    """Where the kernels for `arch` and the installed FlashInfer are kept. Raises KernelError without a FlashInfer."""
    return kernels_dir() / f"{flashinfer_version()}-{arch}"


def flashinfer_version() -> str:
    """Version of the installed FlashInfer, without importing it. Raises KernelError if there is none."""
    return package_version("flashinfer-python")


def package_version(package: str) -> str:
    """Version of an installed package. Raises KernelError if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise KernelError(
            f"{package} is not installed; LLUMD_TORCH=cuda bin/serve sets up what GPUs need, "
            "LLUMD_TORCH=cuda bin/llumd kernels build does so on a machine without one"
        ) from None


def find(where: Path, name: str) -> Built | None:
    """The module `name` under `where`, None unless it is whole."""
    try:
        record: dict[str, Any] = json.loads((where / name / RECORD).read_bytes())
        size = (where / name / f"{name}.so").stat().st_size
        built = Built(name, int(record["size"]), str(record["nvcc"]), str(record["tvm_ffi"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return built if built.size == size else None


def listing(root: Path) -> dict[Path, list[Built]]:
    """Every directory under `root` that holds whole modules, with these."""
    found = {}
    for where in sorted(root.iterdir()) if root.is_dir() else []:
        modules = [find(where, folder.name) for folder in sorted(where.iterdir())] if where.is_dir() else []
        if whole := [built for built in modules if built]:
            found[where] = whole
    return found


def missing(specs: Iterable[KernelSpec], where: Path) -> list[KernelSpec]:
    """Those of `specs` that are not under `where`."""
    return [spec for spec in specs if find(where, spec.name) is None]


def check(specs: Iterable[KernelSpec], arch: str, *, build_command: str = "llumd kernels build") -> Path:
    """The directory that holds all of `specs`. Raises KernelError naming each one missing and how to build it."""
    where = directory(arch)
    absent = missing(specs, where)
    if absent:
        lines = "\n".join(f"  {spec.name} ({spec.purpose})" for spec in absent)
        raise KernelError(
            f"{len(absent)} compiled kernels for {arch} are not in {where}:\n{lines}\n"
            f"build them once, here or on any machine with nvcc: {build_command} --arch {arch}"
        )
    return where


def use(where: Path) -> None:
    """Have FlashInfer load its modules from `where` and compile nothing; before its first import in the process.

    A module that is not there then raises FlashInfer's MissingJITCacheError at its first use: `check` first.
    Raises KernelError if the kernels were compiled for another CUDA than torch's.
    """
    _check_cuda(where)
    os.environ["FLASHINFER_DISABLE_JIT"] = "1"
    # The other norm is compiled at run time too, by a package that need not be there.
    os.environ["FLASHINFER_USE_CUDA_NORM"] = "1"
    # FlashInfer writes a log and generated sources even where it compiles nothing; a service may have no home.
    os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", str(cache_dir()))
    try:
        import flashinfer.norm
        from flashinfer.jit import env
    except OSError as e:
        raise KernelError(f"FlashInfer cannot write in {cache_dir()}: {e}; $LLUMD_CACHE names another place") from e
    if not flashinfer.norm._USE_CUDA_NORM:
        raise RuntimeError("flashinfer was imported before kernels.use")
    env.FLASHINFER_AOT_DIR = where


def _check_cuda(where: Path) -> None:
    import torch

    runtime = torch.version.cuda
    for built in listing(where.parent).get(where, []):
        if runtime and built.nvcc.split(".")[0] != runtime.split(".")[0]:
            raise KernelError(
                f"{where / built.name} was compiled with CUDA {built.nvcc}, PyTorch here has {runtime}; "
                f"build it again with an nvcc {runtime.split('.')[0]}"
            )


def load_sampler() -> Any:
    """The project's draw as a tvm-ffi module: its functions are attributes. After `use`. Raises KernelError."""
    return _load(sampler())


def load_append() -> Any:
    """The project's rotary embedding and append as a tvm-ffi module. After `use`. Raises KernelError."""
    return _load(append())


def load_gemv() -> Any:
    """The project's products of few rows, a `few_rows.Gemv`. After `use`. Raises KernelError."""
    return _load(gemv())


def _load(spec: KernelSpec) -> Any:
    import tvm_ffi
    from flashinfer.jit import env

    file = Path(env.FLASHINFER_AOT_DIR) / spec.name / f"{spec.name}.so"
    if not file.exists():
        raise KernelError(f"{file} is not there; run `llumd kernels build`")
    return tvm_ffi.load_module(str(file))

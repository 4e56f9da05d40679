"""The compiled kernels of the CUDA engine: those a configuration needs, their directory, how FlashInfer finds them.

FlashInfer compiles its kernels at first use, with nvcc and ninja, while it serves. Here they are compiled ahead of
time (`compile.py`) into a directory with FlashInfer's own layout, `<name>/<name>.so`. FlashInfer is configured to
load them from there and to compile nothing. Everything except `use` and the `load_*` functions works without torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from daemon.directories import cache_dir
from daemon.engine.cuda.features import unsupported
from daemon.models.model_config import ModelConfig

Dtype = Literal["bf16", "fp16"]
KvDtype = Literal["auto", "fp8"]  # "auto": the same as dtype; "fp8": e4m3
Prefill = Literal["fa2", "fa3"]

HEAD_DIMS = (64, 128, 256)  # for which FlashInfer has attention kernels
_NVCC_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG")
SAMPLER_NVCC_FLAGS = (*_NVCC_FLAGS, "-fmad=false")  # the noise is exact only without fused multiply-add
APPEND_NVCC_FLAGS = SAMPLER_NVCC_FLAGS  # rounds as torch does, to the last bit
GEMV_NVCC_FLAGS = _NVCC_FLAGS
SILU_NVCC_FLAGS = _NVCC_FLAGS
RECORD = "built.json"
_SOURCES = Path(__file__).parent / "csrc"
_LEAST_MAJOR = 8  # bf16 on tensor cores
_FA3_MAJOR = 9
_ROTATED_AT_A_TIME = 16
FP8_CAPABILITY = (8, 9)  # the least that multiplies e4m3
EXPERT_ARCHS = ("9.", "10.")  # of which PyTorch computes grouped products in one kernel


class KernelError(Exception):
    """Kernels are missing or cannot be used. The message gives the cause and the remedy."""


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One compiled module. `generator` and `args`: the generator in `generate.py` and its arguments."""

    name: str  # FlashInfer's name for it, and the name of its file
    purpose: str
    generator: str
    args: tuple[str | int, ...] = ()  # a bool is an int


class Scores(NamedTuple):
    """What an attention kernel does with the scores of queries and keys, beside scale and causal mask."""

    window: bool  # it can leave out what is before a sliding window
    cap: bool  # it caps them

    @property
    def purpose(self) -> str:
        return (", sliding window" if self.window else "") + (", capped scores" if self.cap else "")


PLAIN = Scores(False, False)


@dataclass(frozen=True, slots=True)
class BuiltKernel:
    """A complete module in its place, as its record describes it."""

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
    """Return every module that serving `model_config` on a GPU of `arch` loads, those that compile fast first.

    The fa2 prefill module also computes decodes on tensor cores, so it is always included. Raises KernelError for a
    model or a combination without a kernel.
    """
    if what := unsupported(model_config):
        raise KernelError(f"{model_config.name}: the CUDA engine does not compute {what}; serve it on cpu")
    if model_config.experts and not arch.startswith(EXPERT_ARCHS):
        raise KernelError(
            f"{model_config.name}: a mixture of experts needs a GPU of compute capability 9.0 or 10.0, for which "
            f"PyTorch has grouped products, not {arch}; serve it on cpu"
        )
    model_config = widened(model_config, HEAD_DIMS)
    if model_config.head_dim not in HEAD_DIMS:
        known = ", ".join(map(str, HEAD_DIMS))
        raise KernelError(
            f"{model_config.name}: CUDA kernels exist for head_dim {known}, "
            f"not {model_config.head_dim}; serve it on cpu"
        )
    for rope in model_config.ropes:
        if rope.rotary_dim % _ROTATED_AT_A_TIME:
            raise KernelError(
                f"{model_config.name}: CUDA kernels rotate multiples of {_ROTATED_AT_A_TIME} elements of a head, "
                f"not {rope.rotary_dim}; serve it on cpu"
            )
    scores = scores_of(model_config)
    attention = [_attention("fa2", dtype, kv_dtype, model_config.head_dim, scores)]
    if prefill == "fa3":
        if not arch.startswith(f"{_FA3_MAJOR}."):
            raise KernelError(f"fa3 prefill is for 9.0a only, not for {arch}; use fa2")
        if kv_dtype == "fp8":
            raise KernelError("fa3 prefill cannot read an fp8 KV cache; use fa2")
        if scores != PLAIN:
            raise KernelError("fa3 prefill is for models without sliding windows and capped scores; use fa2")
        attention.append(_attention("fa3", dtype, kv_dtype, model_config.head_dim))
    return [
        silu(),
        sampler(),
        append(),
        gemv(),
        KernelSpec("norm", "RMSNorm", "norm"),
        *attention,
    ]


def widened(model_config: ModelConfig, head_dims: Sequence[int]) -> ModelConfig:
    """Return the model with heads of the next of `head_dims`, ascending, or unchanged if there is none.

    The added elements of queries, keys and values are zeros, so scores and results stay. Norms of heads would change.
    """
    width = next((dim for dim in head_dims if dim >= model_config.head_dim), 0)
    return model_config if model_config.qk_norm or not width else replace(model_config, head_dim=width)


def known_names() -> frozenset[str]:
    """Return the name of every module that any configuration loads."""
    kinds = list(product(get_args(Dtype), get_args(KvDtype), HEAD_DIMS))
    attention = [_attention("fa3", *kind) for kind in kinds]
    for window, cap in product((False, True), repeat=2):
        attention += [_attention("fa2", *kind, Scores(window, cap)) for kind in kinds]
    return frozenset(
        [spec().name for spec in (silu, sampler, append, gemv)] + ["norm", *(spec.name for spec in attention)]
    )


def scores_of(model_config: ModelConfig) -> Scores:
    """Return what the attention kernel of a model does with scores. Layers without a window use the same kernel."""
    windows = any(layer.window for layer in model_config.layers)
    return Scores(windows, bool(model_config.attention_softcap))


def _attention(
    backend: Prefill, dtype: Dtype, kv_dtype: KvDtype, head_dim: int, scores: Scores = PLAIN
) -> KernelSpec:
    q = {"bf16": "bf16", "fp16": "f16"}[dtype]
    kv = "e4m3" if kv_dtype == "fp8" else q
    name = (
        f"batch_prefill_with_kv_cache_dtype_q_{q}_dtype_kv_{kv}_dtype_o_{q}_dtype_idx_i32_"
        f"head_dim_qk_{head_dim}_head_dim_vo_{head_dim}_posenc_0_use_swa_{scores.window}_use_logits_cap_{scores.cap}_f16qk_False"
    )
    what = "prefill and decode attention" if backend == "fa2" else "prefill attention"
    purpose = f"{what}, {backend}, head_dim {head_dim}, {kv} KV{scores.purpose}"
    arguments = (backend, q, kv, head_dim, *scores)
    return KernelSpec(name + ("_sm90" if backend == "fa3" else ""), purpose, "attention", arguments)


def sampler() -> KernelSpec:
    """Return the spec of our own sampling kernel."""
    files = ("host_device.h", "draw.h", "row.h", "pages.h", "launch.cuh", "sampler.cu")
    return _own("sampler", "token sampling", files, SAMPLER_NVCC_FLAGS)


def append() -> KernelSpec:
    """Return the spec of our own rotary embedding and append to the paged KV cache."""
    files = ("host_device.h", "pages.h", "append.h", "launch.cuh", "append.cu")
    return _own("append", "rotary embedding and append to the KV cache", files, APPEND_NVCC_FLAGS)


def silu() -> KernelSpec:
    """Return the spec of our own SiLU and product."""
    files = ("host_device.h", "pages.h", "silu.h", "launch.cuh", "silu.cu")
    return _own("silu", "SiLU and product", files, SILU_NVCC_FLAGS)


def gemv() -> KernelSpec:
    """Return the spec of our own small-batch products."""
    files = ("host_device.h", "pages.h", "gemv.h", "launch.cuh", "gemv.cu")
    return _own("gemv", "small-batch products", files, GEMV_NVCC_FLAGS)


def _own(module: str, purpose: str, files: tuple[str, ...], flags: tuple[str, ...]) -> KernelSpec:
    """Return the spec of a module of `files`. The last file is compiled, the others are headers.

    The name contains a hash of sources and flags, so a changed source makes the kernel missing.
    """
    digest = hashlib.sha256(" ".join(flags).encode())
    try:
        for file in files:
            digest.update(b"\0" + file.encode() + b"\0" + (_SOURCES / file).read_bytes())
    except FileNotFoundError as e:
        raise KernelError(f"{e.filename} is missing; install llumd again") from None
    name = f"llumd_{module}_{digest.hexdigest()[:12]}"
    return KernelSpec(name, purpose, "own", (str(_SOURCES / files[-1]), *flags))


def parse_arch(text: str) -> str:
    """Return a compute capability as FlashInfer writes it: "9.0" becomes "9.0a", "8.6" stays. Raises KernelError."""
    found = re.fullmatch(r"(\d{1,2})\.(\d)([af]?)", text.strip())
    if not found:
        raise KernelError(f"{text!r} is not a GPU architecture; write a compute capability such as 9.0a or 8.9")
    major, minor, suffix = int(found[1]), int(found[2]), found[3]
    if major < _LEAST_MAJOR:
        raise KernelError(f"architecture {text}: 8.0 (Ampere) or newer is needed")
    return f"{major}.{minor}{suffix}" if suffix else arch_of(major, minor)


def arch_of(major: int, minor: int) -> str:
    """Return the architecture to compile for, for a GPU of that compute capability."""
    if major == 12 and minor == 0:
        return "12.0f"
    return f"{major}.{minor}" + ("a" if major >= 9 else "")


def multiplies_fp8(arch: str) -> bool:
    """Return True if GPUs of an architecture, such as "9.0a", multiply e4m3."""
    major, minor = re.match(r"(\d+)\.(\d+)", arch).groups()  # type: ignore[union-attr]
    return (int(major), int(minor)) >= FP8_CAPABILITY


def kernels_dir() -> Path:
    """Return the directory of all compiled kernels: $LLUMD_KERNELS, or `kernels` in the cache."""
    named = os.environ.get("LLUMD_KERNELS")
    return Path(named).expanduser().absolute() if named else cache_dir() / "kernels"


def directory(arch: str) -> Path:
    """Return the directory of the kernels for `arch` and the installed FlashInfer. Raises KernelError without one."""
    return kernels_dir() / f"{flashinfer_version()}-{arch}"


def flashinfer_version() -> str:
    """Return the version of the installed FlashInfer, without importing it. Raises KernelError if there is none."""
    return package_version("flashinfer-python")


def package_version(package: str) -> str:
    """Return the version of an installed package. Raises KernelError if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise KernelError(
            f"{package} is not installed; LLUMD_TORCH=cuda bin/serve installs what GPUs need; "
            "on a machine without a GPU, LLUMD_TORCH=cuda bin/llumd kernels build installs it"
        ) from None


def major(version: str) -> int:
    """Return the first number of a version."""
    return int(version.split(".", maxsplit=1)[0])


def find(where: Path, name: str) -> BuiltKernel | None:
    """Return the module `name` under `where`, or None if it is missing or incomplete."""
    try:
        record: dict[str, Any] = json.loads((where / name / RECORD).read_bytes())
        size = (where / name / f"{name}.so").stat().st_size
        built = BuiltKernel(name, int(record["size"]), str(record["nvcc"]), str(record["tvm_ffi"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return built if built.size == size else None


def listing(root: Path) -> dict[Path, list[BuiltKernel]]:
    """Return every directory under `root` that has complete modules, with these modules."""
    found = {}
    for where in sorted(root.iterdir()) if root.is_dir() else []:
        modules = [find(where, folder.name) for folder in sorted(where.iterdir())] if where.is_dir() else []
        if complete := [built for built in modules if built]:
            found[where] = complete
    return found


def missing(specs: Iterable[KernelSpec], where: Path, cuda: str | None = None) -> list[KernelSpec]:
    """Return the `specs` that are not under `where`, or that were not compiled for `cuda`, PyTorch's CUDA version."""
    found = {spec: find(where, spec.name) for spec in specs}
    return [spec for spec, built in found.items() if built is None or (cuda and major(built.nvcc) != major(cuda))]


def check(specs: Iterable[KernelSpec], arch: str, *, build_command: str = "llumd kernels build") -> Path:
    """Return the directory that has all `specs`.

    Raises KernelError that names each missing one and the build command.
    """
    where = directory(arch)
    absent = missing(specs, where)
    if absent:
        lines = "\n".join(f"  {spec.name} ({spec.purpose})" for spec in absent)
        raise KernelError(
            f"{len(absent)} compiled kernels for {arch} are not in {where}:\n{lines}\n"
            f"build them once, here or on any machine with nvcc: {build_command} --arch {arch}"
        )
    return where


def use(where: Path, specs: Iterable[KernelSpec] | None = None) -> None:
    """Make FlashInfer load its modules from `where` and compile nothing. Call it before FlashInfer's first import.

    A missing module then raises FlashInfer's MissingJITCacheError at its first use, so call `check` first.
    Raises KernelError if one of the `specs` (None: any module there) was compiled for another CUDA version than
    torch's.
    """
    _check_cuda(where, specs)
    os.environ["FLASHINFER_DISABLE_JIT"] = "1"
    # The default norm is compiled at run time, by a package that may be missing.
    os.environ["FLASHINFER_USE_CUDA_NORM"] = "1"
    # FlashInfer writes a log and generated sources even if it compiles nothing, and a service may have no home.
    os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", str(cache_dir()))
    try:
        import flashinfer.norm
        from flashinfer.jit import env
    except OSError as e:
        raise KernelError(
            f"FlashInfer cannot write in {cache_dir()}: {e}; set $LLUMD_CACHE to another directory"
        ) from e
    if not flashinfer.norm._USE_CUDA_NORM:
        raise RuntimeError("flashinfer was imported before kernels.use")
    env.FLASHINFER_AOT_DIR = where


def _check_cuda(where: Path, specs: Iterable[KernelSpec] | None) -> None:
    import torch

    runtime = torch.version.cuda
    names = None if specs is None else {spec.name for spec in specs}
    for built in listing(where.parent).get(where, []):
        if names is not None and built.name not in names:
            continue
        if runtime and major(built.nvcc) != major(runtime):
            raise KernelError(
                f"{where / built.name} was compiled with CUDA {built.nvcc}, PyTorch here has {runtime}; "
                f"build it again with an nvcc {major(runtime)}"
            )


def load_sampler() -> Any:
    """Load our sampling kernel as a tvm-ffi module: its attributes are the functions. Call `use` first.

    Raises KernelError.
    """
    return _load(sampler())


def load_attention(backend: Prefill, dtype: Dtype, kv_dtype: KvDtype, head_dim: int, scores: Scores = PLAIN) -> Any:
    """Load FlashInfer's attention of chunks, which also computes decodes, as a tvm-ffi module. Call `use` first.

    Raises KernelError.
    """
    return _load(_attention(backend, dtype, kv_dtype, head_dim, scores))


def load_append() -> Any:
    """Load our rotary embedding and append as a tvm-ffi module. Call `use` first. Raises KernelError."""
    return _load(append())


def load_silu() -> Any:
    """Load our SiLU and product. Call `use` first. Raises KernelError."""
    return _load(silu())


def load_gemv() -> Any:
    """Load our small-batch products, a `small_batch.Gemv`. Call `use` first. Raises KernelError."""
    return _load(gemv())


def _load(spec: KernelSpec) -> Any:
    import tvm_ffi
    from flashinfer.jit import env

    file = Path(env.FLASHINFER_AOT_DIR) / spec.name / f"{spec.name}.so"
    if not file.exists():
        raise KernelError(f"{file} is missing; run `llumd kernels build`")
    return tvm_ffi.load_module(str(file))

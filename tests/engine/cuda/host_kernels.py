"""Our kernels on the CPU, compiled from their own sources.

The products (host_gemv.cpp) run with any number of threads in place of lanes; the append is in host_append.cpp,
SiLU and its product in host_silu.cpp.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "daemon" / "engine" / "cuda" / "csrc"
FLAGS = (
    "-std=c++20",
    "-O2",
    "-march=native",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fPIC",
    "-shared",
    "-pthread",
)


def sources_of(name: str) -> list[Path]:
    """Return the files that the library of host_<name>.cpp may depend on, its own source first."""
    return [HERE / f"host_{name}.cpp", *sorted(SOURCES.glob("*.h"))]


def compile_host(name: str, folder: Path) -> Path:
    """Compile the library of host_<name>.cpp by the system's compiler. Raises CalledProcessError."""
    library = folder / f"host_{name}.so"
    command = ["c++", *FLAGS, f"-I{SOURCES}", str(sources_of(name)[0]), "-o", str(library)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    return library


class Team(NamedTuple):
    blocks: int = 1
    warps: int = 1
    lanes: int = 1


class _Team(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in Team._fields]


class _Rows(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("width", ctypes.c_uint32),
        ("norm", ctypes.c_void_p),
        ("eps", ctypes.c_float),
    ]


class _Matrix(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class _NextWeights(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("count", ctypes.c_uint64)]


class _Pages(ctypes.Structure):
    _fields_ = [
        ("indices", ctypes.c_void_p),
        ("indptr", ctypes.c_void_p),
        ("block_size", ctypes.c_uint32),
        ("block_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    ]


class _Tokens(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("stride", ctypes.c_int64)]


class _Append(ctypes.Structure):
    _fields_ = [
        ("q", _Tokens),
        ("k", _Tokens),
        ("v", _Tokens),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("pages", _Pages),
        ("rows", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("angles", ctypes.c_void_p),
        ("tokens", ctypes.c_uint32),
        ("heads", ctypes.c_uint32),
        ("kv_heads", ctypes.c_uint32),
        ("half", ctypes.c_uint32),
        ("rotated", ctypes.c_uint32),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("norm_offset", ctypes.c_float),
        ("eps", ctypes.c_float),
    ]


def _pages(keys: torch.Tensor, indices: torch.Tensor, indptr: torch.Tensor) -> _Pages:
    return _Pages(_at(indices), _at(indptr), keys.shape[1], *keys.stride()[:3])


def _next_weights(tensor: torch.Tensor | None) -> _NextWeights:
    return _NextWeights(_at(tensor), 0 if tensor is None else tensor.numel() // 8)


def _at(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _aligned(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return the tensor aligned to 16 bytes. GPU allocations are aligned; a tensor in a mapped file may not be."""
    return tensor if tensor is None or tensor.data_ptr() % 16 == 0 else tensor.clone()


class HostGemv:
    """`Gemv` for bfloat16 tensors on the CPU."""

    def __init__(self, library: Path, team: Team | None = None) -> None:
        self._library = ctypes.CDLL(str(library))
        self._team = _Team(*(team or Team()))

    def add(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> None:
        self._library.add(
            *self._product(x, None, 0.0, weight, bias),
            _at(residual),
            ctypes.c_int64(residual.stride(0)),
            ctypes.c_uint32(len(weight)),
        )

    def gate(
        self,
        x: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        self._library.gate(
            *self._product(x, norm, eps, weight, bias),
            _at(out),
            ctypes.c_int64(out.stride(0)),
            ctypes.c_uint32(len(weight) // 2),
        )

    def logits(
        self, x: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, out: torch.Tensor
    ) -> None:
        self._library.logits(
            *self._product(x, norm, eps, weight, None),
            _at(out),
            ctypes.c_int64(out.stride(0)),
            ctypes.c_uint32(len(weight)),
        )

    def heads(
        self,
        x: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
        indptr: torch.Tensor,
        positions: torch.Tensor,
        angles: torch.Tensor,
        prefetch: torch.Tensor | None,
    ) -> None:
        self._library.heads(
            *self._product(x, norm, eps, weight, bias),
            _at(q),
            _at(keys),
            _at(values),
            _pages(keys, indices, indptr),
            _at(positions),
            _at(angles),
            ctypes.c_uint32(q.shape[1]),
            ctypes.c_uint32(keys.shape[2]),
            ctypes.c_uint32(q.shape[2] // 2),
            ctypes.c_bool(keys.dtype == torch.float8_e4m3fn),
            _next_weights(prefetch),
        )

    def count_prefetches(self, prefetch: torch.Tensor) -> list[int]:
        """Return how often each group of eight of `prefetch` is prefetched at the end of a product."""
        times = torch.zeros(prefetch.numel() // 8, dtype=torch.int32)
        self._library.count_prefetches(self._team, _next_weights(prefetch), _at(times))
        return times.tolist()

    def _product(
        self, x: torch.Tensor, norm: torch.Tensor | None, eps: float, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[Any, ...]:
        """Return the arguments that all products share."""
        assert x.dtype == weight.dtype == torch.bfloat16 and weight.is_contiguous() and x.stride(1) == 1
        norm, weight = self._kept_alive = _aligned(norm), _aligned(weight)
        rows = _Rows(_at(x), x.stride(0), x.shape[1], _at(norm), eps)
        return self._team, ctypes.c_uint32(len(x)), rows, _Matrix(_at(weight), _at(bias))


class HostAppend:
    """The function of `append.cu`, for bfloat16 tensors on the CPU."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def append(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
        indptr: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        angles: torch.Tensor,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        norm_offset: float = 0.0,
        eps: float = 0.0,
    ) -> None:
        tokens = [_Tokens(_at(x), x.stride(0)) for x in (q, k, v)]
        description = _Append(
            *tokens,
            _at(keys),
            _at(values),
            _pages(keys, indices, indptr),
            _at(rows),
            _at(positions),
            _at(angles),
            len(q),
            q.shape[1],
            k.shape[1],
            q.shape[2] // 2,
            angles.shape[1] // 2,
            _at(q_norm),
            _at(k_norm),
            norm_offset,
            eps,
        )
        self._library.append(ctypes.byref(description), ctypes.c_bool(keys.dtype == torch.float8_e4m3fn))


class HostSilu:
    """The functions of `silu.cu`, for bfloat16 tensors on the CPU."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        rows, width = out.shape
        self._library.silu_mul(_at(gate_up), _at(out), ctypes.c_uint32(rows), ctypes.c_uint32(width))

    def gelu_tanh_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        rows, width = out.shape
        self._library.gelu_tanh_mul(_at(gate_up), _at(out), ctypes.c_uint32(rows), ctypes.c_uint32(width))

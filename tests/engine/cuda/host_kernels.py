"""Our kernels on the CPU, from their own sources: `Gemv` with threads for lanes, as few or many as one likes
(host_gemv.cpp), and the append (host_append.cpp)."""

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
    """What the library of host_<name>.cpp may depend on; itself first."""
    return [HERE / f"host_{name}.cpp", *sorted(SOURCES.glob("*.h"))]


def compile_host(name: str, folder: Path) -> Path:
    """The library of host_<name>.cpp, made by the system's compiler. Raises CalledProcessError."""
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


class _Ahead(ctypes.Structure):
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
    ]


def _pages(keys: torch.Tensor, indices: torch.Tensor, indptr: torch.Tensor) -> _Pages:
    return _Pages(_at(indices), _at(indptr), keys.shape[1], *keys.stride()[:3])


def _ahead(tensor: torch.Tensor | None) -> _Ahead:
    return _Ahead(_at(tensor), 0 if tensor is None else tensor.numel() // 8)


def _at(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _aligned(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """What a GPU allocates is; what lies in a file need not be."""
    return tensor if tensor is None or tensor.data_ptr() % 16 == 0 else tensor.clone()


class HostGemv:
    """Of bfloat16 tensors on the CPU."""

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
        num_inflight_tokens: torch.Tensor | None,
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
            _ahead(num_inflight_tokens),
        )

    def asked_ahead(self, num_inflight_tokens: torch.Tensor) -> list[int]:
        """How often each group of eight of `num_inflight_tokens` is asked for when a product ends."""
        times = torch.zeros(num_inflight_tokens.numel() // 8, dtype=torch.int32)
        self._library.asked_ahead(self._team, _ahead(num_inflight_tokens), _at(times))
        return times.tolist()

    def _product(
        self, x: torch.Tensor, norm: torch.Tensor | None, eps: float, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[Any, ...]:
        """The arguments that all have."""
        assert x.dtype == weight.dtype == torch.bfloat16 and weight.is_contiguous() and x.stride(1) == 1
        self._held = _aligned(norm), _aligned(weight)
        norm, weight = self._held
        rows = _Rows(_at(x), x.stride(0), x.shape[1], _at(norm), eps)
        return self._team, ctypes.c_uint32(len(x)), rows, _Matrix(_at(weight), _at(bias))


class HostAppend:
    """`append.cu`'s function, of bfloat16 tensors on the CPU."""

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
    ) -> None:
        tokens = [_Tokens(_at(x), x.stride(0)) for x in (q, k, v)]
        everything = _Append(
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
        )
        self._library.append(ctypes.byref(everything), ctypes.c_bool(keys.dtype == torch.float8_e4m3fn))

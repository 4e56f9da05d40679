"""The calls of cuBLASLt that compute a product by a named algorithm, by ctypes.

cuBLAS computes a product by the first algorithm that its heuristic returns. cuBLASLt returns several, so that they
can be measured. A call from Python takes longer than one from C++, which does not matter in a CUDA graph.

cuBLASLt numbers the elements of a matrix by columns, so each matrix here is the transpose of its tensor.
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from typing import Any, NamedTuple

from daemon.kvpool.cudart import load_library

ALIGNMENT = 256
"""Bytes to which the addresses of a product's matrices and of its workspace must be aligned."""

_NAMES = ("libcublasLt.so.13", "libcublasLt.so.12")

# Values of cublasLt.h, cublas_api.h and library_types.h.
SUCCESS = 0  # CUBLAS_STATUS_SUCCESS
COMPUTE_FLOAT = 68  # CUBLAS_COMPUTE_32F: sums are float32
TRANSPOSE = 1  # CUBLAS_OP_T
FLOAT, BFLOAT16 = 0, 14  # CUDA_R_32F, CUDA_R_16BF
TRANSPOSE_A = 3  # CUBLASLT_MATMUL_DESC_TRANSA
MOST_WORKSPACE = 1  # CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES


class CublasError(RuntimeError):
    """A failed call; `status` is its cublasStatus_t."""

    def __init__(self, call: str, status: int) -> None:
        super().__init__(f"{call} failed: cublasStatus_t {status}")
        self.status = status


class AlgorithmData(ctypes.Structure):
    """cublasLtMatmulAlgo_t"""

    _fields_ = (("data", c_uint64 * 8),)


class HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algorithm", AlgorithmData),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class Algorithm(NamedTuple):
    """One way to compute a product, and the bytes of workspace that it needs."""

    data: AlgorithmData
    workspace_bytes: int


class Shape(NamedTuple):
    """The product of bfloat16 `x` [rows, width] and `weight` [columns, width]: x @ weight.T, [rows, columns].

    `wide`: the result is float32, else bfloat16.
    """

    rows: int
    columns: int
    width: int
    wide: bool = False


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (POINTER(c_void_p),),
    "cublasLtMatmulDescCreate": (POINTER(c_void_p), c_int, c_int),
    "cublasLtMatmulDescSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatrixLayoutCreate": (POINTER(c_void_p), c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutDestroy": (c_void_p,),
    "cublasLtMatmulPreferenceCreate": (POINTER(c_void_p),),
    "cublasLtMatmulPreferenceSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    # handle, operation, layouts of A, B, C and D, preference, how many are wanted, results, how many there are
    "cublasLtMatmulAlgoGetHeuristic": (*(c_void_p,) * 7, c_int, POINTER(HeuristicResult), POINTER(c_int)),
    # handle, operation, alpha, A and its layout, B and its layout, beta, C and its layout, D and its layout,
    # algorithm, workspace and its bytes, stream
    "cublasLtMatmul": (
        *(c_void_p,) * 2, POINTER(c_float), *(c_void_p,) * 4, POINTER(c_float), *(c_void_p,) * 4,
        POINTER(AlgorithmData), c_void_p, c_size_t, c_void_p,
    ),
}  # fmt: skip


class CublasLt:
    """cuBLASLt on the current device. Every method raises CublasError.

    `workspace_bytes`: the most that an algorithm may need. `library`: path or name; by default the one that this
    process has already mapped, such as torch's own. Raises OSError if there is none.
    """

    def __init__(self, workspace_bytes: int, library: str = "") -> None:
        self._lib = ctypes.CDLL(library) if library else load_library("libcublasLt", _NAMES)
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._lib, name)
            function.argtypes, function.restype = arguments, c_int
        self.handle, self.operation, self._preference = c_void_p(), c_void_p(), c_void_p()
        self.call("cublasLtCreate", byref(self.handle))
        self.call("cublasLtMatmulDescCreate", byref(self.operation), COMPUTE_FLOAT, FLOAT)
        transpose = c_int32(TRANSPOSE)
        self.call("cublasLtMatmulDescSetAttribute", self.operation, TRANSPOSE_A, byref(transpose), 4)
        self.call("cublasLtMatmulPreferenceCreate", byref(self._preference))
        most = c_uint64(workspace_bytes)
        self.call("cublasLtMatmulPreferenceSetAttribute", self._preference, MOST_WORKSPACE, byref(most), 8)

    def layout(self, dtype: int, rows: int, columns: int) -> c_void_p:
        """Return the layout of a matrix that is stored column by column. It lives until `destroy_layout`."""
        made = c_void_p()
        self.call("cublasLtMatrixLayoutCreate", byref(made), dtype, rows, columns, rows)
        return made

    def destroy_layout(self, layout: c_void_p) -> None:
        self.call("cublasLtMatrixLayoutDestroy", layout)

    def algorithms(self, layouts: tuple[c_void_p, c_void_p, c_void_p], most: int) -> list[Algorithm]:
        """Return up to `most` algorithms for products with these layouts of A, B and the result, best guess first."""
        results, found = (HeuristicResult * most)(), c_int()
        a, b, result = layouts
        self.call(
            "cublasLtMatmulAlgoGetHeuristic",
            self.handle, self.operation, a, b, result, result, self._preference, most, results, byref(found),
        )  # fmt: skip
        valid = [one for one in results[: found.value] if one.state == SUCCESS]
        return [Algorithm(one.algorithm, one.workspace_bytes) for one in valid]

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the library."""
        status = getattr(self._lib, name)(*arguments)
        if status != SUCCESS:
            raise CublasError(name, status)


class Product:
    """The products of one shape. Addresses are of device memory, aligned to ALIGNMENT, without gaps between rows."""

    def __init__(self, library: CublasLt, shape: Shape) -> None:
        self._library = library
        rows, columns, width, wide = shape
        self._weight = library.layout(BFLOAT16, width, columns)
        self._x = library.layout(BFLOAT16, width, rows)
        self._out = library.layout(FLOAT if wide else BFLOAT16, columns, rows)
        for layout in (self._weight, self._x, self._out):
            weakref.finalize(self, library.destroy_layout, layout).atexit = False
        self._one, self._zero = c_float(1), c_float(0)

    def algorithms(self, most: int) -> list[Algorithm]:
        """Return up to `most` algorithms, best guess first. Raises CublasError if there is none."""
        return self._library.algorithms((self._weight, self._x, self._out), most)

    def compute(self, algorithm: Algorithm, weight: int, x: int, out: int, workspace: int, stream: int) -> None:
        """Write the product to `out`, in stream order. `workspace`: as many bytes as the algorithm needs.

        Raises CublasError if the algorithm cannot do it.
        """
        self._library.call(
            "cublasLtMatmul",
            self._library.handle, self._library.operation,
            byref(self._one), weight, self._weight, x, self._x,
            byref(self._zero), out, self._out, out, self._out,
            byref(algorithm.data), workspace, algorithm.workspace_bytes, stream,
        )  # fmt: skip

"""Register-blocked inner products for compiled kernels, written as LLVM vectors.

Numba relies on LLVM's vectoriser, which does not keep an array of sums in registers across a loop. `multiply` and
`dots` do. Each output element is one chain of multiply-adds in a fixed order, independent of the neighbouring rows.
Operands are C-contiguous arrays with an element offset and row strides: float32, or bfloat16 bits where stated.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from math import gcd
from typing import Any

from daemon.engine import jit  # isort: skip  # noqa: F401  first: it points numba at its cache
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_FAST = ("fast",)
_F32 = ir.FloatType()
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


def width(columns: int) -> int:
    """Return the lanes of the vectors that hold a row of `columns` floats: at most 16 (one AVX-512 register)."""
    return gcd(columns, 16)


def _emitted(describe: Callable[..., Any]) -> Any:
    """Make a function that kernels can call: `describe` returns its signature and the generator of its code."""
    return intrinsic(prefer_literal=True)(describe)


class _Operand:
    """An array argument, starting at element `offset`, inside a code generator."""

    def __init__(self, context: Any, builder: Any, kind: Any, value: Any, offset: Any) -> None:
        self.builder = builder
        self.half = kind.dtype == types.uint16
        self.data = builder.gep(context.make_array(kind)(context, builder, value).data, [offset])

    def at(self, *terms: tuple[Any, Any]) -> Any:
        """Return the address of an element. Its index is the sum of the products in `terms`."""
        where = _I64(0)
        for stride, index in terms:
            where = self.builder.add(where, self.builder.mul(stride, index))
        return self.builder.gep(self.data, [where])

    def load(self, where: Any, lanes: int) -> Any:
        """Emit the load of `lanes` consecutive elements as a float32 vector."""
        element = _I16 if self.half else _F32
        pointer = self.builder.bitcast(where, ir.VectorType(element, lanes).as_pointer())
        value = self.builder.load(pointer, align=2 if self.half else 4)
        if not self.half:
            return value
        wide = ir.VectorType(_I32, lanes)
        bits = self.builder.shl(self.builder.zext(value, wide), ir.Constant(wide, [16] * lanes))
        return self.builder.bitcast(bits, ir.VectorType(_F32, lanes))

    def store(self, value: Any, where: Any) -> None:
        self.builder.store(value, self.builder.bitcast(where, value.type.as_pointer()), align=4)


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(_F32, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _sum_lanes(builder: Any, value: Any, lanes: int) -> Any:
    kind = ir.FunctionType(_F32, [_F32, value.type])
    add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{lanes}f32")
    return builder.call(add, [_F32(-0.0), value], fastmath=_FAST)


@_emitted
def multiply(
    _: Any,
    rows: Any,
    columns: Any,
    add: Any,
    a: Any,
    a0: Any,
    a_row: Any,
    b: Any,
    b0: Any,
    b_row: Any,
    c: Any,
    c0: Any,
    c_row: Any,
    depth: Any,
) -> tuple[Any, Callable[..., Any]]:
    """Compute ``C = A B``, or ``C += A B`` if `add` is 1. A [rows, depth], B [depth, columns], C [rows, columns].

    `rows`, `columns` and `add` are compile-time constants: rows * columns / 16 vectors of sums (at most 24
    of the 32 registers of AVX-512) stay in registers. A and C are float32; B may be bfloat16 bits.
    """
    m, n, keep = rows.literal_value, columns.literal_value, add.literal_value
    lanes = width(n)
    signature = types.void(rows, columns, add, a, *[types.intp] * 2, b, *[types.intp] * 2, c, *[types.intp] * 3)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        left = _Operand(context, builder, sig.args[3], args[3], args[4])
        right = _Operand(context, builder, sig.args[6], args[6], args[7])
        out = _Operand(context, builder, sig.args[9], args[9], args[10])
        a_stride, b_stride, c_stride, steps = args[5], args[8], args[11], args[12]
        places = [[out.at((c_stride, _I64(i)), (_I64(j), _I64(1))) for j in range(0, n, lanes)] for i in range(m)]
        vector = ir.VectorType(_F32, lanes)
        sums = [[cgutils.alloca_once(builder, vector) for _ in row] for row in places]
        cells = list(zip(chain.from_iterable(places), chain.from_iterable(sums), strict=True))
        for place, total in cells:
            builder.store(out.load(place, lanes) if keep else ir.Constant(vector, [0.0] * lanes), total)
        with cgutils.for_range(builder, steps) as loop:
            values = [
                right.load(right.at((b_stride, loop.index), (_I64(j), _I64(1))), lanes) for j in range(0, n, lanes)
            ]
            for i in range(m):
                x = _splat(builder, builder.load(left.at((a_stride, _I64(i)), (loop.index, _I64(1)))), lanes)
                for value, total in zip(values, sums[i], strict=True):
                    product = builder.fmul(x, value, flags=_FAST)
                    builder.store(builder.fadd(builder.load(total), product, flags=_FAST), total)
        for place, total in cells:
            out.store(builder.load(total), place)
        return context.get_dummy_value()

    return signature, generate


@_emitted
def dots(
    _: Any,
    rows: Any,
    length: Any,
    a: Any,
    a0: Any,
    b: Any,
    b0: Any,
    b_row: Any,
    c: Any,
    c0: Any,
    c_row: Any,
    count: Any,
) -> tuple[Any, Callable[..., Any]]:
    """Compute ``C = A B^T``. A [rows, length] contiguous, B [count, length] with row stride `b_row`, C [rows, count].

    `rows` and `length` are compile-time constants. A and C are float32; B may be bfloat16 bits.
    """
    m, n = rows.literal_value, length.literal_value
    lanes = width(n)
    signature = types.void(rows, length, a, types.intp, b, *[types.intp] * 2, c, *[types.intp] * 3)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        left = _Operand(context, builder, sig.args[2], args[2], args[3])
        right = _Operand(context, builder, sig.args[4], args[4], args[5])
        out = _Operand(context, builder, sig.args[7], args[7], args[8])
        b_stride, c_stride, steps = args[6], args[9], args[10]
        queries = [
            [left.load(left.at((_I64(i * n + j), _I64(1))), lanes) for j in range(0, n, lanes)] for i in range(m)
        ]
        with cgutils.for_range(builder, steps) as loop:
            keys = [
                right.load(right.at((b_stride, loop.index), (_I64(j), _I64(1))), lanes) for j in range(0, n, lanes)
            ]
            for i, query in enumerate(queries):
                total = builder.fmul(query[0], keys[0], flags=_FAST)
                for x, y in zip(query[1:], keys[1:], strict=True):
                    total = builder.fadd(total, builder.fmul(x, y, flags=_FAST), flags=_FAST)
                place = out.at((c_stride, _I64(i)), (loop.index, _I64(1)))
                builder.store(_sum_lanes(builder, total, lanes), place)
        return context.get_dummy_value()

    return signature, generate


@_emitted
def prefetch(_: Any, rows: Any, length: Any, a: Any, a0: Any, a_row: Any) -> tuple[Any, Callable[..., Any]]:
    """Prefetch `rows` rows of `length` elements (both compile-time constants) with stride `a_row` into the cache."""
    m, n = rows.literal_value, length.literal_value
    signature = types.void(rows, length, a, *[types.intp] * 2)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array = _Operand(context, builder, sig.args[2], args[2], args[3])
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        line = 64 // (2 if array.half else 4)
        for i in range(m):
            for j in range(0, n, line):
                where = builder.bitcast(array.at((args[4], _I64(i)), (_I64(j), _I64(1))), pointer)
                builder.call(fetch, [where, _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return signature, generate

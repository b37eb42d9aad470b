"""A vector of floats as a Numba type, and memory behind an address: what the kernels are written in.

`WIDTH` floats make one value: 16 where the processor has AVX-512, else 8; LLVM splits it where registers are narrower. An address is an
int64, an index counts elements, and nothing here checks a bound. `fma` is one rounding where the processor has it. Sums of lanes take a tree.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic, models, register_model

__all__ = [
    "WIDTH", "Lanes", "add", "clamped", "fma", "integer", "lane_sum", "lanes", "load", "multiply", "negative", "number",
    "prefetch", "put", "real", "splat", "spread", "store",
    "two_to", "zero_below",
]  # fmt: skip


def _width() -> int:
    """By the features that Numba compiles for: the host's, unless NUMBA_CPU_NAME or NUMBA_CPU_FEATURES say otherwise."""
    if config.CPU_NAME is None and config.CPU_FEATURES is None:
        return 16 if llvm.get_host_cpu_features().get("avx512f", False) else 8
    return 16 if "+avx512f" in (config.CPU_FEATURES or "") else 8


WIDTH = _width()
_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, WIDTH)
_I32 = ir.IntType(32)
_IVECTOR = ir.VectorType(_I32, WIDTH)


class Lanes(types.Type):
    """`WIDTH` float32 in one register, or in as many as that takes."""

    def __init__(self) -> None:
        super().__init__(name=f"Lanes{WIDTH}")


lanes = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _VECTOR)


def _element(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, kind: ir.Type) -> ir.Value:
    """The pointer to one element."""
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


def _reader(kind: ir.Type) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.load(_element(builder, args[0], args[1], kind))

    return codegen


@intrinsic
def number(typingctx: Any, address: Any, index: Any) -> Any:
    """One float32."""
    return types.float32(types.int64, types.int64), _reader(_FLOAT)


@intrinsic
def real(typingctx: Any, address: Any, index: Any) -> Any:
    """One float64."""
    return types.float64(types.int64, types.int64), _reader(ir.DoubleType())


@intrinsic
def integer(typingctx: Any, address: Any, index: Any) -> Any:
    """One int64."""
    return types.int64(types.int64, types.int64), _reader(ir.IntType(64))


@intrinsic
def put(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
    """Writes one float32."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        builder.store(args[2], _element(builder, args[0], args[1], _FLOAT))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


def _vector_at(builder: ir.IRBuilder, address: ir.Value, index: ir.Value) -> ir.Value:
    return builder.bitcast(_element(builder, address, index, _FLOAT), _VECTOR.as_pointer())


@intrinsic
def load(typingctx: Any, address: Any, index: Any) -> Any:
    """`WIDTH` neighbours, at any alignment."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.load(_vector_at(builder, args[0], args[1]), align=4)

    return lanes(types.int64, types.int64), codegen


@intrinsic
def store(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
    """Writes `WIDTH` neighbours, at any alignment."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        builder.store(args[2], _vector_at(builder, args[0], args[1]), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, lanes), codegen


def _spread(builder: ir.IRBuilder, value: ir.Value, kind: ir.VectorType = _VECTOR) -> ir.Value:
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), ir.Constant(_IVECTOR, [0] * WIDTH))


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Asks for the cache line at an address, which need not be one."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(args[0], byte), _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """One float32 in every lane."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _spread(builder, args[0])

    return lanes(types.float32), codegen


@intrinsic
def spread(typingctx: Any, address: Any, index: Any) -> Any:
    """One float32 of memory in every lane."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _spread(builder, builder.load(_element(builder, args[0], args[1], _FLOAT)))

    return lanes(types.int64, types.int64), codegen


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{WIDTH}f32")
        return builder.call(function, args)

    return lanes(lanes, lanes, lanes), codegen


@intrinsic
def add(typingctx: Any, a: Any, b: Any) -> Any:
    """a + b."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.fadd(*args)

    return lanes(lanes, lanes), codegen


@intrinsic
def multiply(typingctx: Any, a: Any, b: Any) -> Any:
    """a b."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.fmul(*args)

    return lanes(lanes, lanes), codegen


@intrinsic
def negative(typingctx: Any, a: Any) -> Any:
    """-a, which costs nothing as a factor of `fma`."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.fneg(args[0])

    return lanes(lanes), codegen


@intrinsic
def lane_sum(typingctx: Any, a: Any) -> Any:
    """The sum of the lanes, halves added to halves."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        x, width = args[0], WIDTH
        while width > 1:
            width //= 2
            undefined = ir.Constant(x.type, ir.Undefined)
            low, high = (
                builder.shuffle_vector(x, undefined, ir.Constant(ir.VectorType(_I32, width), list(range(first, first + width))))
                for first in (0, width)
            )
            x = builder.fadd(low, high)
        return builder.extract_element(x, _I32(0))

    return types.float32(lanes), codegen


@intrinsic
def clamped(typingctx: Any, a: Any, low: Any, high: Any) -> Any:
    """Each lane between low and high; NaN stays."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        a, low, high = args
        a = builder.select(builder.fcmp_ordered("<", a, low), low, a)
        return builder.select(builder.fcmp_ordered(">", a, high), high, a)

    return lanes(lanes, lanes, lanes), codegen


@intrinsic
def zero_below(typingctx: Any, x: Any, limit: Any, value: Any) -> Any:
    """`value`, but 0 in the lanes where x < limit."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        x, limit, value = args
        return builder.select(builder.fcmp_ordered("<", x, limit), ir.Constant(_VECTOR, [0.0] * WIDTH), value)

    return lanes(lanes, lanes, lanes), codegen


@intrinsic
def two_to(typingctx: Any, shifted: Any) -> Any:
    """2^n, where the lanes hold 1.5 * 2^23 + n: the integer n of such a float stands in its lowest bits. n from -126 to 127."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        bits = builder.bitcast(args[0], _IVECTOR)
        biased = builder.add(bits, ir.Constant(_IVECTOR, [127 - 0x4B400000] * WIDTH))
        return builder.bitcast(builder.shl(biased, ir.Constant(_IVECTOR, [23] * WIDTH)), _VECTOR)

    return lanes(lanes), codegen

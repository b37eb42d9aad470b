"""Operands of a product. A tensor core reads the upper bits of a float32 operand in tf32 and drops the rest; rounding first halves the error and its bias."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["operand"]


@triton.jit
def operand(x, DTYPE: tl.constexpr, DOT: tl.constexpr):
    """`x` as an operand of dtype DTYPE: for float32 in tf32 rounded to 10 bits of mantissa, ties away from zero, else converted."""
    if DTYPE == tl.float32 and DOT == "tf32":
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x)
    else:
        return x.to(DTYPE)

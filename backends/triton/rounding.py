"""Operands of a product. A tensor core reads the upper bits of a float32 operand in tf32 and drops the rest; rounding first halves the error and its bias.

Tokens that are alike fill each diagonal of a block with one number, of which rounding to the nearest drops the same part everywhere, and a sum over tokens
adds that up; `evenly` rounds up as often as the dropped part says.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["evenly", "operand"]


@triton.jit
def operand(x, DTYPE: tl.constexpr, DOT: tl.constexpr):
    """`x` as an operand of dtype DTYPE: for float32 in tf32 rounded to 10 bits of mantissa, ties away from zero, else converted."""
    if DTYPE == tl.float32 and DOT == "tf32":
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x)
    else:
        return x.to(DTYPE)


@triton.jit
def evenly(x, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """`x [BLOCK, BLOCK]` of float32 in 16 bits, rounded up or down by the place: errors of equal numbers in a row, column or diagonal cancel. The same bits twice.

    An error is at most a whole last digit and not half of one; what DTYPE holds exactly stays as it is. Nothing is done for float32.
    """
    if DTYPE == tl.float32:
        return x
    else:
        DROPPED: tl.constexpr = 16 if DTYPE == tl.bfloat16 else 13
        line = tl.arange(0, BLOCK)
        steps = line[:, None] * 37344 + line[None, :] * 49473  # 2^16 times two irrational numbers: modulo 2^16 they fill evenly
        level = (steps & 0xFFFF) >> (16 - DROPPED)
        rounded = ((x.to(tl.int32, bitcast=True) + level) & (-1 << DROPPED)).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x).to(DTYPE)

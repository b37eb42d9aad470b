"""The inverse of a unit lower triangular block, on chip, by doubling: two inverted diagonal blocks and one pair of products make one of twice the size.

With 16-bit operands every step is a product of the whole block, whose zeros cost nothing that the tensor cores notice. In float32 the first 16 rows are
doubled as a batch of 16 x 16 products. No powers of the block are formed: on similar keys they grow like binomials (SPEC.md 12).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import operand as as_operand

__all__ = ["unit_lower_inverse"]


@triton.jit
def unit_lower_inverse(lower, BLOCK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 in float32 of a strictly lower L `[BLOCK, BLOCK]`, BLOCK 16, 32 or 64, for a call with operands of DTYPE.

    bfloat16 calls multiply in float16: entries of the inverse are of the order of 1, and its three more bits keep hostile keys within tolerance.
    float16 calls, whose tolerance is tf32's, multiply in float32.
    """
    MERGE: tl.constexpr = tl.float16 if DTYPE == tl.bfloat16 else tl.float32
    DOT: tl.constexpr = "tf32x3" if DTYPE == tl.float16 else PRECISION
    row = tl.arange(0, BLOCK)
    apart = row[:, None] ^ row[None, :]
    below = as_operand(lower, MERGE, DOT)
    if MERGE == tl.float32 and BLOCK > 16:
        inverse = _doubled_blocks(lower, BLOCK, DOT)
    else:
        inverse = tl.where(apart == 0, 1.0, tl.where(apart == 1, -lower, 0.0))
        inverse = _double(inverse, below, apart, 2, DOT)
        inverse = _double(inverse, below, apart, 4, DOT)
        inverse = _double(inverse, below, apart, 8, DOT)
    if BLOCK >= 32:
        inverse = _double(inverse, below, apart, 16, DOT)
    if BLOCK >= 64:
        inverse = _double(inverse, below, apart, 32, DOT)
    return inverse


@triton.jit
def _doubled_blocks(lower, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """The inverses of the 16 x 16 diagonal blocks, in their places."""
    COUNT: tl.constexpr = BLOCK // 16
    block = tl.arange(0, COUNT)
    same = block[:, None, None, None] == block[None, None, :, None]
    diagonal = tl.sum(tl.where(same, tl.reshape(lower, [COUNT, 16, COUNT, 16]), 0.0), 2)
    apart = tl.arange(0, 16)[None, :, None] ^ tl.arange(0, 16)[None, None, :]
    x = tl.where(apart == 0, 1.0, tl.where(apart == 1, -diagonal, 0.0))
    x = _double(x, diagonal, apart, 2, PRECISION)
    x = _double(x, diagonal, apart, 4, PRECISION)
    x = _double(x, diagonal, apart, 8, PRECISION)
    return tl.reshape(tl.where(same, x[:, :, None, :], 0.0), [BLOCK, BLOCK])


@triton.jit
def _double(inverse, lower, apart, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """From inverses of diagonal blocks of WIDTH rows to those of twice as many: the new corner is -D2 L21 D1.

    `apart` is row XOR column: WIDTH to 2 WIDTH - 1 in the corner and in its mirror image, where the product is zero.
    """
    left = as_operand(inverse, lower.dtype, PRECISION)
    product = as_operand(tl.dot(left, lower, input_precision=PRECISION), lower.dtype, PRECISION)
    product = tl.dot(product, left, input_precision=PRECISION)
    return tl.where(apart // WIDTH == 1, -product, inverse)

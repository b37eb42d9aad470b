"""The inverse of a unit lower triangular block, on chip, by doubling: two inverted diagonal blocks and one pair of products make one of twice the size.

With 16-bit operands every step is a product of the whole block, whose zeros cost nothing that the tensor cores notice. In float32 the first 16 rows are
doubled as a batch of 16 x 16 products. No powers of the block are formed: on similar keys they grow like binomials (SPEC.md 12).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["unit_lower_inverse"]


@triton.jit
def unit_lower_inverse(lower, BLOCK: tl.constexpr, MERGE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 in float32 of a strictly lower L `[BLOCK, BLOCK]`, BLOCK 16, 32 or 64; products of MERGE operands, accumulated in float32."""
    row = tl.arange(0, BLOCK)
    apart = row[:, None] ^ row[None, :]
    operand = lower.to(MERGE)
    if MERGE == tl.float32 and BLOCK > 16:
        inverse = _doubled_blocks(lower, BLOCK, PRECISION)
    else:
        inverse = tl.where(apart == 0, 1.0, tl.where(apart == 1, -lower, 0.0))
        inverse = _double(inverse, operand, apart, 2, PRECISION)
        inverse = _double(inverse, operand, apart, 4, PRECISION)
        inverse = _double(inverse, operand, apart, 8, PRECISION)
    if BLOCK >= 32:
        inverse = _double(inverse, operand, apart, 16, PRECISION)
    if BLOCK >= 64:
        inverse = _double(inverse, operand, apart, 32, PRECISION)
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
    operand = inverse.to(lower.dtype)
    product = tl.dot(operand, lower, input_precision=PRECISION).to(lower.dtype)
    product = tl.dot(product, operand, input_precision=PRECISION)
    return tl.where(apart // WIDTH == 1, -product, inverse)

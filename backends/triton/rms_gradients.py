"""The gradients of the gated RMS norm: x, gate and dy read once, dx and dgate written once, the rate computed again.

Floor: 5 x 2 V bytes a row, 100 us at 1x8192 with 32 heads of 128 in bfloat16 over 3.35 TB/s, 9 us at 12 heads of 32; 20 FLOP a number and one exponential
are less. A program keeps the weight's gradient of its tokens; `partial_sums` adds the programs' up in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Kernel
from .rms_rows import tile

__all__ = ["RMS_GRADIENTS"]


@triton.jit
def _rms_gradients(
    x, gate, weight, d_y, dx, d_gate, partial, eps, tokens, heads, x_b, x_t, x_h, gate_b, gate_t, gate_h, dy_b, dy_t, dy_h,
    V: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """BLOCKS times ROWS tokens of one head, one block after the other."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    slots = tl.cdiv(tokens, ROWS * BLOCKS)
    row = (program // heads // slots).to(tl.int64)
    start = program // heads % slots * ROWS * BLOCKS
    column = tl.arange(0, BLOCK)
    x += row * x_b + head * x_h
    gate += row * gate_b + head * gate_h
    d_y += row * dy_b + head * dy_h
    scale = tl.load(weight + column, mask=column < V, other=0.0).to(tl.float32)
    d_scale = tl.zeros([ROWS, BLOCK], tl.float32)
    for low in range(0, tl.minimum(tokens - start, ROWS * BLOCKS), ROWS):
        token = start + low + tl.arange(0, ROWS)
        value = tile(x, token, column, tokens, x_t, V)
        opening = tile(gate, token, column, tokens, gate_t, V)
        grad = tile(d_y, token, column, tokens, dy_t, V)
        sigmoid = tl.sigmoid(opening)
        opened = sigmoid
        slope = sigmoid * (1.0 - sigmoid)
        if SILU:
            opened = sigmoid * opening
            slope = sigmoid * (1.0 + opening * (1.0 - sigmoid))
        rate = tl.rsqrt(tl.sum(value * value, 1) / V + eps)
        unit = value * rate[:, None]
        place = ((row * tokens + token) * heads + head)[:, None] * V + column[None, :]
        inside = (token < tokens)[:, None] & (column < V)[None, :]
        if dx is not None:
            d_unit = grad * scale[None, :] * opened
            found = (d_unit - unit * (tl.sum(d_unit * unit, 1) / V)[:, None]) * rate[:, None]
            tl.store(dx + place, found.to(dx.dtype.element_ty), mask=inside)
        if d_gate is not None:
            tl.store(d_gate + place, (grad * unit * scale[None, :] * slope).to(d_gate.dtype.element_ty), mask=inside)
        if partial is not None:
            d_scale += grad * unit * opened
    if partial is not None:
        tl.store(partial + program.to(tl.int64) * V + column, tl.sum(d_scale, 0), mask=column < V)


RMS_GRADIENTS = Kernel(_rms_gradients)

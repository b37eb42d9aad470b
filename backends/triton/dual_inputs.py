"""What dual_core's recurrent scans want of a call beforehand: both cores' weights, and q and k of unit norm where asked.

Two small kernels bound by the bytes they move; an element is read and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_backends.contracts.dual_core import DualCore

from .grid import unit_stride
from .launch import Kernel
from .serving import tile_width

__all__ = ["core_weights", "unit_operands"]

_NONE = (0, 0, 0)
_ELEMENTS = 1024


@triton.jit
def _weights(
    alpha, fast_gate, slow_gate, fast, slow, number, tokens, heads, count,
    alpha_b, alpha_t, alpha_h, fast_b, fast_t, fast_h, slow_b, slow_t, slow_h, BLOCK: tl.constexpr,
):  # fmt: skip
    """alpha f and (1 - alpha) s, `[B, T, H]` in float32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    head = at % heads
    token = at // heads % tokens
    batch = at // heads // tokens
    if alpha is not None:
        share = tl.load(alpha + batch * alpha_b + token * alpha_t + head * alpha_h, mask=inside, other=0.0).to(tl.float32)
    else:
        share = tl.zeros([BLOCK], tl.float32) + number
    rest = 1.0 - share
    if fast_gate is not None:
        share *= tl.load(fast_gate + batch * fast_b + token * fast_t + head * fast_h, mask=inside, other=0.0).to(tl.float32)
    if slow_gate is not None:
        rest *= tl.load(slow_gate + batch * slow_b + token * slow_t + head * slow_h, mask=inside, other=0.0).to(tl.float32)
    tl.store(fast + at, share, mask=inside)
    tl.store(slow + at, rest, mask=inside)


@triton.jit
def _unit(
    q, k, q_unit, k_unit, tokens, groups, rows, half,
    q_b, q_t, q_h, k_b, k_t, k_h, K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x * rsqrt(sum x^2 + 1e-6) of every row, contiguous: the first `half` programs take q, the others k."""
    program = tl.program_id(0)
    of_k = program >= half
    line = tl.where(of_k, program - half, program).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_K)
    inside = (line < rows)[:, None] & (column[None, :] < K)
    batch = line // groups // tokens
    token = line // groups % tokens
    group = line % groups
    to = line[:, None] * K + column[None, :]
    if of_k:
        x = tl.load(k + (batch * k_b + token * k_t + group * k_h)[:, None] + column[None, :], mask=inside, other=0.0)
        wide = x.to(tl.float32)
        tl.store(k_unit + to, (wide * tl.rsqrt(tl.sum(wide * wide, 1) + 1e-6)[:, None]).to(x.dtype), mask=inside)
    else:
        x = tl.load(q + (batch * q_b + token * q_t + group * q_h)[:, None] + column[None, :], mask=inside, other=0.0)
        wide = x.to(tl.float32)
        tl.store(q_unit + to, (wide * tl.rsqrt(tl.sum(wide * wide, 1) + 1e-6)[:, None]).to(x.dtype), mask=inside)


WEIGHTS = Kernel(_weights)
UNIT = Kernel(_unit)


def core_weights(call: DualCore) -> tuple[Tensor, Tensor]:
    """alpha f and (1 - alpha) s, both `[B, T, H]` in float32."""
    batch, tokens, heads = call.v.shape[:3]
    both = torch.empty((2, batch, tokens, heads), dtype=torch.float32, device=call.v.device)
    fast, slow = both[0], both[1]
    alpha, number, steps = call.alpha, 0.0, _NONE
    if not isinstance(alpha, Tensor):
        number, alpha = float(alpha), None
    elif alpha.dim():
        steps = alpha.stride() if alpha.dim() == 3 else (0, 0, alpha.stride(0))
    gates = (call.fast_gate, call.slow_gate)
    count = batch * tokens * heads
    args = (alpha, *gates, fast, slow, number, tokens, heads, count, *steps)
    for gate in gates:
        args += _NONE if gate is None else gate.stride()
    WEIGHTS(-(-count // _ELEMENTS), args, (_ELEMENTS,), 4, 2)
    return fast, slow


def unit_operands(call: DualCore) -> tuple[Tensor, Tensor]:
    """q and k `[B, T, G, K]` as they are, or under `qk_l2norm` their rows of unit norm, in their dtype."""
    q, k = unit_stride(call.q), unit_stride(call.k)
    if not call.qk_l2norm:
        return q, k
    batch, tokens, groups, keys = k.shape
    q_unit, k_unit = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    width = tile_width(keys)
    lines, rows = max(1, 4096 // width), batch * tokens * groups
    half = -(-rows // lines)
    UNIT(2 * half, (q, k, q_unit, k_unit, tokens, groups, rows, half, *q.stride()[:3], *k.stride()[:3]), (keys, width, lines), 4, 2)
    return q_unit, k_unit

"""What dual_core's backward does between its parts: beta v before them, the sums of their gradients behind (SPEC.md 5, 10).

    scaled     values = beta v
    operands   dx = the sum of the parts' dX, for q and for k; with n = 1 / |x|, where the parts saw n x:  dx = n (dX - x n^2 <x, dX>)
    values     dv = d_below + beta d_values      dbeta = d_below + <d_values, v>
               dg = the sum of the parts'      df = alpha dF      ds = (1 - alpha) dS      dalpha = f dF - s dS, where F = alpha f and S = (1 - alpha) s

Rows are read and written once, in tiles of 4096 elements, summed in float32 and rounded once. A row of D elements moves, in their dtype: scaled 2 D,
operands 3 D (k with a transform 4 D, under `qk_l2norm` D more), values 4 D. Nothing is computed to speak of: bytes limit all three.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_backends.contracts.dual_core import DualCore

from .delta_prepare import row_norm
from .grid import strides
from .launch import Kernel
from .serving import tile_width

__all__ = ["joined_operands", "joined_values", "scaled_values"]

_ELEMENTS = 4096
_LINES = 1024
"""Rows of a program that has nothing but their vectors to do."""


@triton.jit
def _places(program, tokens, heads, ROWS: tl.constexpr):
    """(number, batch row, token, head) of a program's rows of `[B, T, heads, D]`, divided in 64 bits only once."""
    row = tl.arange(0, ROWS)
    local = program % heads * ROWS
    line = (program // heads).to(tl.int64) * ROWS + local // heads
    local = local % heads + row
    token = (line % tokens).to(tl.int32) + local // heads
    batch = line // tokens + token // tokens
    return program.to(tl.int64) * ROWS + row, batch, (token % tokens).to(tl.int64), (local % heads).to(tl.int64)


@triton.jit
def _inside(there, column, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The mask of a tile."""
    return there[:, None] if COLUMNS == BLOCK else there[:, None] & (column[None, :] < COLUMNS)


@triton.jit
def _plus(total, x, at, inside):
    """With what a part found, where it found something."""
    if x is not None:
        total += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _scaled(v, beta, values, tokens, heads, rows, v_b, v_t, v_h, beta_b, beta_t, beta_h, V: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr):
    """beta v, contiguous."""
    line, batch, token, head = _places(tl.program_id(0), tokens, heads, ROWS)
    column = tl.arange(0, BLOCK_V)
    inside = _inside(line < rows, column, V, BLOCK_V)
    b = tl.load(beta + batch * beta_b + token * beta_t + head * beta_h, mask=line < rows, other=0.0).to(tl.float32)
    x = tl.load(v + (batch * v_b + token * v_t + head * v_h)[:, None] + column[None, :], mask=inside, other=0.0)
    tl.store(values + line[:, None] * V + column[None, :], (x.to(tl.float32) * b[:, None]).to(x.dtype), mask=inside)


SCALED = Kernel(_scaled)


@triton.jit
def _operand(
    x,
    fast,
    slow,
    below,
    dx,
    program,
    tokens,
    groups,
    rows,
    x_b,
    x_t,
    x_h,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    L2NORM: tl.constexpr,
):
    """Rows of one operand's gradient."""
    line, batch, token, group = _places(program, tokens, groups, ROWS)
    column = tl.arange(0, BLOCK_K)
    inside = _inside(line < rows, column, K, BLOCK_K)
    at = line[:, None] * K + column[None, :]
    total = _plus(tl.zeros([ROWS, BLOCK_K], tl.float32), fast, at, inside)
    total = _plus(total, slow, at, inside)
    total = _plus(total, below, at, inside)
    if L2NORM:
        wide = tl.load(x + (batch * x_b + token * x_t + group * x_h)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        norm = row_norm(wide)
        total = norm[:, None] * (total - wide * (norm * norm * tl.sum(wide * total, 1))[:, None])
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _operands(
    q, k, fast_q, slow_q, fast_k, slow_k, below_k, dq, dk, tokens, groups, rows, half,
    q_b, q_t, q_h, k_b, k_t, k_h, K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, L2NORM: tl.constexpr,
):  # fmt: skip
    """dq and dk, contiguous: the first `half` programs make dq, the others dk."""
    program = tl.program_id(0)
    if dq is not None:
        if program < half:
            _operand(q, fast_q, slow_q, None, dq, program, tokens, groups, rows, q_b, q_t, q_h, K, BLOCK_K, ROWS, L2NORM)
    if dk is not None:
        if program >= half:
            _operand(k, fast_k, slow_k, below_k, dk, program - half, tokens, groups, rows, k_b, k_t, k_h, K, BLOCK_K, ROWS, L2NORM)


OPERANDS = Kernel(_operands)


@triton.jit
def _values(
    v, beta, fast_v, below_v, below_beta, slow_g, below_g, of_fast, of_slow, alpha, fast_gate, slow_gate, dv, dbeta, dg, d_alpha, d_fast_gate, d_slow_gate,
    number, tokens, heads, rows, v_b, v_t, v_h, beta_b, beta_t, beta_h, alpha_b, alpha_t, alpha_h, fast_b, fast_t, fast_h, slow_b, slow_t, slow_h,
    V: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dv `[B, T, H, V]` and what belongs to its rows: the gradients of beta, g, alpha and both gates `[B, T, H]`, contiguous."""
    line, batch, token, head = _places(tl.program_id(0), tokens, heads, ROWS)
    there = line < rows
    nothing = tl.zeros([ROWS], tl.float32)
    if dv is not None or dbeta is not None:
        column = tl.arange(0, BLOCK_V)
        inside = _inside(there, column, V, BLOCK_V)
        at = line[:, None] * V + column[None, :]
        arrived = _plus(tl.zeros([ROWS, BLOCK_V], tl.float32), fast_v, at, inside)
        if dbeta is not None:
            found = _plus(nothing, below_beta, line, there)
            if fast_v is not None:
                x = tl.load(v + (batch * v_b + token * v_t + head * v_h)[:, None] + column[None, :], mask=inside, other=0.0)
                found += tl.sum(arrived * x.to(tl.float32), 1)
        if dv is not None:
            b = tl.load(beta + batch * beta_b + token * beta_t + head * beta_h, mask=there, other=0.0).to(tl.float32)
            total = _plus(arrived * b[:, None], below_v, at, inside)
            tl.store(dv + at, total.to(dv.dtype.element_ty), mask=inside)
        if dbeta is not None:
            tl.store(dbeta + line, found.to(dbeta.dtype.element_ty), mask=there)
    if dg is not None:
        total_g = _plus(_plus(nothing, slow_g, line, there), below_g, line, there)
        tl.store(dg + line, total_g.to(dg.dtype.element_ty), mask=there)
    if d_alpha is not None or d_fast_gate is not None or d_slow_gate is not None:
        quick = _plus(nothing, of_fast, line, there)
        steady = _plus(nothing, of_slow, line, there)
        share = nothing + number
        if alpha is not None:
            share = tl.load(alpha + batch * alpha_b + token * alpha_t + head * alpha_h, mask=there, other=0.0).to(tl.float32)
        if d_fast_gate is not None:
            tl.store(d_fast_gate + line, (quick * share).to(d_fast_gate.dtype.element_ty), mask=there)
        if d_slow_gate is not None:
            tl.store(d_slow_gate + line, (steady * (1.0 - share)).to(d_slow_gate.dtype.element_ty), mask=there)
        if d_alpha is not None:
            if fast_gate is not None:
                quick *= tl.load(fast_gate + batch * fast_b + token * fast_t + head * fast_h, mask=there, other=0.0).to(tl.float32)
            if slow_gate is not None:
                steady *= tl.load(slow_gate + batch * slow_b + token * slow_t + head * slow_h, mask=there, other=0.0).to(tl.float32)
            tl.store(d_alpha + line, (quick - steady).to(d_alpha.dtype.element_ty), mask=there)


VALUES = Kernel(_values)


def scaled_values(v: Tensor, beta: Tensor) -> Tensor:
    """beta v `[B, T, H, V]` in v's dtype; v has rows of unit stride."""
    batch, tokens, heads, columns = v.shape
    values = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    width, rows = tile_width(columns), batch * tokens * heads
    lines = max(1, _ELEMENTS // width)
    SCALED(-(-rows // lines), (v, beta, values, tokens, heads, rows, *strides(v), *strides(beta)), (columns, width, lines), 4, 1)
    return values


def joined_operands(
    call: DualCore, fast: Mapping[str, Tensor], slow: Mapping[str, Tensor], below: Mapping[str, Tensor], names: frozenset[str]
) -> dict[str, Tensor]:
    """Those of dq and dk `[B, T, G, K]` that `names` has, from the parts' contiguous ones; a part without any found nothing but zeros."""
    k = call.k
    into: dict[str, Tensor] = {name: torch.empty(k.shape, dtype=k.dtype, device=k.device) for name in ("q", "k") if name in names}
    if into:
        batch, tokens, groups, keys = k.shape
        width, rows = tile_width(keys), batch * tokens * groups
        lines = max(1, _ELEMENTS // width)
        blocks = -(-rows // lines)
        args = (
            call.q, k, fast.get("q"), slow.get("q"), fast.get("k"), slow.get("k"), below.get("k"), into.get("q"), into.get("k"),
            tokens, groups, rows, blocks if "q" in into else 0, *strides(call.q), *strides(k),
        )  # fmt: skip
        OPERANDS(blocks * len(into), args, (keys, width, lines, call.qk_l2norm), 4, 1)
    return into


def joined_values(
    call: DualCore, fast: Mapping[str, Tensor], slow: Mapping[str, Tensor], below: Mapping[str, Tensor], names: frozenset[str]
) -> dict[str, Tensor]:
    """Those gradients of v, beta, g, alpha and the gates that `names` has; `slow` has those of g and S, `fast` those of beta v and F, `below` the rest."""
    shape, device, alpha = call.v.shape[:3], call.v.device, call.alpha
    number, whole = (0.0, alpha.expand(shape)) if isinstance(alpha, Tensor) else (float(alpha), None)
    given = {"v": call.v, "beta": call.beta, "g": call.g, "alpha": whole, "fast_gate": call.fast_gate, "slow_gate": call.slow_gate}
    summed = isinstance(alpha, Tensor) and alpha.dim() < 3
    dtypes = {"alpha": torch.float32} if summed else {}
    into = {
        name: torch.empty(x.shape, dtype=dtypes.get(name, x.dtype), device=device) for name, x in given.items() if name in names and x is not None
    }
    if not into:
        return into
    args = (
        call.v, call.beta, fast.get("v"), below.get("v"), below.get("beta"), slow.get("g"), below.get("g"), fast.get("gate"), slow.get("gate"),
        whole, call.fast_gate, call.slow_gate, *(into.get(name) for name in given), number, call.v.shape[1], shape[2], shape.numel(),
        *strides(call.v), *strides(call.beta), *strides(whole), *strides(call.fast_gate), *strides(call.slow_gate),
    )  # fmt: skip
    width = tile_width(call.v.shape[3])
    lines = max(1, _ELEMENTS // width) if into.keys() & {"v", "beta"} else _LINES
    VALUES(-(-shape.numel() // lines), args, (call.v.shape[3], width, lines), 4, 1)
    if "alpha" in into and isinstance(alpha, Tensor) and summed:
        into["alpha"] = into["alpha"].sum_to_size(alpha.shape).to(alpha.dtype)
    return into

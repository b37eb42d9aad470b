"""One to eight tokens of dual_core's recurrent memory on a tile of both states, which never leave the registers between them.

A program owns BLOCK_V value columns of one head of one sequence: it moves 16 K BLOCK_V bytes of float32 states (read and written once) and a few hundred
bytes of tokens, and computes 11 K BLOCK_V FLOP a token: bound by device memory (4 heads of 128 at 3.35 TB/s: 0.3 us), or for few heads by latency. So a
token's two reductions over K are taken side by side from the states before it: what S knows of k, and both reads, weighed and added first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Kernel

__all__ = ["DUAL_STEP"]


@triton.jit
def _vector(x, column, K: tl.constexpr, BLOCK_K: tl.constexpr, L2NORM: tl.constexpr):
    """One token's q or k in float32, with length 1 if asked."""
    wide = (tl.load(x + column, mask=column < K, other=0.0) if K != BLOCK_K else tl.load(x + column)).to(tl.float32)
    return wide * tl.rsqrt(tl.sum(wide * wide, 0) + 1e-6) if L2NORM else wide


@triton.jit
def _tile(state, at, whole, MASKED: tl.constexpr):
    """A state's tile."""
    return tl.load(state + at, mask=whole, other=0.0) if MASKED else tl.load(state + at)


@triton.jit
def _keep(state, at, tile, whole, MASKED: tl.constexpr):
    """Writes a state's tile."""
    if MASKED:
        tl.store(state + at, tile, mask=whole)
    else:
        tl.store(state + at, tile)


@triton.jit
def _dual_step(
    q, k, v, beta, g, fast_gate, slow_gate, alpha, state, fast, after, fast_after, position, slots, o,
    number, scale, tokens, heads, group, chunk, position_stride, slot_stride,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, fg_b, fg_t, fg_h, sg_b, sg_t, sg_h, alpha_b, alpha_t, alpha_h,
    state_b, state_h, state_t, state_v, fast_b, fast_h, fast_t, fast_v,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ONE: tl.constexpr, L2NORM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A value tile of one head of one sequence. `state_t`, `fast_t`: from one key's row to the next; `after`, `fast_after`: contiguous; absent: in place."""
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    MASKED: tl.constexpr = K != BLOCK_K or V % BLOCK_V != 0
    program = tl.program_id(0)
    tile = program % TILES
    head = (program // TILES % heads).to(tl.int64)
    row = (program // TILES // heads).to(tl.int64)
    shared = head // group
    column = tl.arange(0, BLOCK_K)
    value = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = value < V
    slot = row
    if slots is not None:
        slot = tl.load(slots + row * slot_stride).to(tl.int64)
    count = 1 if ONE else tokens
    o += (row * count * heads + head) * V
    if slot < 0:
        for _t in range(count):
            if V % BLOCK_V:
                tl.store(o + value, tl.zeros([BLOCK_V], o.dtype.element_ty), mask=inside)
            else:
                tl.store(o + value, tl.zeros([BLOCK_V], o.dtype.element_ty))
            o += heads * V
    else:
        whole = (column[:, None] < K) & inside[None, :]
        place = tl.load(position + row * position_stride)
        wide = column[:, None].to(tl.int64)
        at = wide * state_t + (value[None, :] if UNIT else value[None, :].to(tl.int64) * state_v)
        fast_at = wide * fast_t + (value[None, :] if UNIT else value[None, :].to(tl.int64) * fast_v)
        state += slot * state_b + head * state_h
        fast += slot * fast_b + head * fast_h
        memory = _tile(state, at, whole, MASKED)
        recent = _tile(fast, fast_at, whole, MASKED)
        q += row * q_b + shared * q_h
        k += row * k_b + shared * k_h
        v += row * v_b + head * v_h
        beta += row * beta_b + head * beta_h
        if g is not None:
            g += row * g_b + head * g_h
        if fast_gate is not None:
            fast_gate += row * fg_b + head * fg_h
        if slow_gate is not None:
            slow_gate += row * sg_b + head * sg_h
        if alpha is not None:
            alpha += row * alpha_b + head * alpha_h
        place = (place % chunk).to(tl.int32)
        for _t in range(count):
            query = _vector(q, column, K, BLOCK_K, L2NORM)
            key = _vector(k, column, K, BLOCK_K, L2NORM)
            x = (tl.load(v + value, mask=inside, other=0.0) if V % BLOCK_V else tl.load(v + value)).to(tl.float32)
            rate = tl.load(beta).to(tl.float32)
            by_fast = number
            if alpha is not None:
                by_fast = tl.load(alpha).to(tl.float32)
                alpha += alpha_t
            by_slow = (1.0 - by_fast) * scale
            by_fast *= scale
            if fast_gate is not None:
                by_fast *= tl.load(fast_gate).to(tl.float32)
                fast_gate += fg_t
            if slow_gate is not None:
                by_slow *= tl.load(slow_gate).to(tl.float32)
                slow_gate += sg_t
            if g is not None:
                memory *= tl.exp(tl.load(g).to(tl.float32))
                g += g_t
            recent = tl.where(place == 0, 0.0, recent)
            known = tl.sum(memory * key[:, None], 0)
            read = tl.sum((by_fast * recent + by_slow * memory) * query[:, None], 0)
            u = (x - known) * rate
            x *= rate
            memory += key[:, None] * u[None, :]
            recent += key[:, None] * x[None, :]
            y = (read + tl.sum(key * query, 0) * (by_fast * x + by_slow * u)).to(o.dtype.element_ty)
            if V % BLOCK_V:
                tl.store(o + value, y, mask=inside)
            else:
                tl.store(o + value, y)
            place += 1
            place = tl.where(place == chunk, 0, place)
            q += q_t
            k += k_t
            v += v_t
            beta += beta_t
            o += heads * V
        if after is None:
            _keep(state, at, memory, whole, MASKED)
            _keep(fast, fast_at, recent, whole, MASKED)
        else:
            to = (row * heads + head) * (K * V) + wide * V + value[None, :]
            _keep(after, to, memory, whole, MASKED)
            _keep(fast_after, to, recent, whole, MASKED)


DUAL_STEP = Kernel(_dual_step)

"""One to eight tokens of deep_core on a tile of its carry, D and E, that stays in the registers between them.

A program owns BLOCK_V value columns of one head of one row: it moves 16 K BLOCK_V bytes of float32 carry (12 in place, where D is written only if
its block closed) and computes 6 K BLOCK_V FLOP a token: bound by device memory, or for few heads by latency. A row's mass and summed g belong to all
of its tiles: where they are written over what is read, and a head is several tiles, SUMS does it in a launch of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Kernel

__all__ = ["STEP", "SUMS"]


@triton.jit
def divisor(mass, span, NORMALIZE: tl.constexpr):
    """Z of a block of `span` tokens."""
    if NORMALIZE == "safe":
        return tl.maximum(mass, 1.0)
    elif NORMALIZE == "mean":
        return mass * 0.0 + span
    else:
        return mass * 0.0 + 1.0


@triton.jit
def _row(x, column, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """One token's q or k, or a tile of its v, in float32."""
    return (tl.load(x + column, mask=column < K, other=0.0) if K % BLOCK_K else tl.load(x + column)).to(tl.float32)


@triton.jit
def _step(
    q, k, v, eta, g, gate, state, error, mass, log_decay, position, slots, o, after_state, after_error, after_mass, after_log,
    scale, tokens, heads, group, span, position_stride, slot_stride,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, eta_b, eta_t, eta_h, g_b, g_t, g_h, gate_b, gate_t, gate_h,
    state_b, state_h, state_t, state_v, error_b, error_h, error_t, error_v, mass_b, mass_h, log_b, log_h,
    to_state_b, to_state_h, to_state_t, to_error_b, to_error_h, to_error_t, to_mass_b, to_mass_h, to_log_b, to_log_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ONE: tl.constexpr, NORMALIZE: tl.constexpr,
    SAME: tl.constexpr, UNIT: tl.constexpr, WRITES_SUMS: tl.constexpr,
):  # fmt: skip
    """A value tile of one head of one row. `_t` of a carry: from one key's row to the next, `_v`: between values. SAME: the carry is written where it was read."""
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    tile = program % TILES
    head = (program // TILES % heads).to(tl.int64)
    row = (program // TILES // heads).to(tl.int64)
    shared = head // group
    column = tl.arange(0, BLOCK_K)
    value = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = value < V
    count = 1 if ONE else tokens
    o += (row * count * heads + head) * V
    slot = row
    if slots is not None:
        slot = tl.load(slots + row * slot_stride).to(tl.int64)
    if slot < 0:
        for _t in range(count):
            tl.store(o + value, tl.zeros([BLOCK_V], o.dtype.element_ty), mask=inside)
            o += heads * V
    else:
        q += row * q_b + shared * q_h
        k += row * k_b + shared * k_h
        v += row * v_b + head * v_h
        eta += row * eta_b + head * eta_h
        if g is not None:
            g += row * g_b + head * g_h
        if gate is not None:
            gate += row * gate_b + head * gate_h
        whole = (column[:, None] < K) & inside[None, :]
        wide = column[:, None].to(tl.int64)
        places = value[None, :] if UNIT else value[None, :].to(tl.int64) * state_v
        memory = tl.load(state + slot * state_b + head * state_h + wide * state_t + places, mask=whole, other=0.0).to(tl.float32)
        places = value[None, :] if UNIT else value[None, :].to(tl.int64) * error_v
        missed = tl.load(error + slot * error_b + head * error_h + wide * error_t + places, mask=whole, other=0.0).to(tl.float32)
        total = tl.load(mass + slot * mass_b + head * mass_h).to(tl.float32)
        decay = tl.load(log_decay + slot * log_b + head * log_h).to(tl.float32)
        place = tl.load(position + row * position_stride).to(tl.int32)
        closed = place < 0
        for _t in range(count):
            query = _row(q, column, K, BLOCK_K)
            key = _row(k, column, K, BLOCK_K)
            step = tl.load(eta).to(tl.float32)
            off = (tl.load(v + value, mask=inside, other=0.0)).to(tl.float32) - tl.sum(memory * key[:, None], 0)
            y = tl.sum(memory * query[:, None], 0) * scale
            if gate is not None:
                y *= tl.load(gate).to(tl.float32)
                gate += gate_t
            tl.store(o + value, y.to(o.dtype.element_ty), mask=inside)
            missed += (step * key)[:, None] * off[None, :]
            total += step * tl.sum(key * key, 0)
            if g is not None:
                decay += tl.load(g).to(tl.float32)
                g += g_t
            place += 1
            if place == span:
                memory = tl.exp(decay) * memory + missed / divisor(total, span, NORMALIZE)
                missed = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
                total = tl.zeros([], tl.float32)
                decay = tl.zeros([], tl.float32)
                place *= 0
                closed = place == 0
            q += q_t
            k += k_t
            v += v_t
            eta += eta_t
            o += heads * V
        places = value[None, :] if UNIT or not SAME else value[None, :].to(tl.int64) * error_v
        tl.store(after_error + slot * to_error_b + head * to_error_h + wide * to_error_t + places, missed, mask=whole)
        places = value[None, :] if UNIT or not SAME else value[None, :].to(tl.int64) * state_v
        at = after_state + slot * to_state_b + head * to_state_h + wide * to_state_t + places
        if SAME:
            if closed:
                tl.store(at, memory, mask=whole)
        else:
            tl.store(at, memory, mask=whole)
        if WRITES_SUMS:
            if tile == 0:
                tl.store(after_mass + slot * to_mass_b + head * to_mass_h, total)
                tl.store(after_log + slot * to_log_b + head * to_log_h, decay)


@triton.jit
def _sums(
    k, eta, g, mass, log_decay, position, slots, tokens, heads, group, span, position_stride, slot_stride,
    k_b, k_t, k_h, eta_b, eta_t, eta_h, g_b, g_t, g_h, mass_b, mass_h, log_b, log_h,
    K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The mass and the summed g of one head of one row, in place."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    row = (program // heads).to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    slot = row
    if slots is not None:
        slot = tl.load(slots + row * slot_stride).to(tl.int64)
    if slot >= 0:
        k += row * k_b + head // group * k_h
        eta += row * eta_b + head * eta_h
        if g is not None:
            g += row * g_b + head * g_h
        mass += slot * mass_b + head * mass_h
        log_decay += slot * log_b + head * log_h
        total = tl.load(mass)
        decay = tl.load(log_decay)
        place = tl.load(position + row * position_stride).to(tl.int32)
        for _t in range(tokens):
            key = _row(k, column, K, BLOCK_K)
            total += tl.load(eta).to(tl.float32) * tl.sum(key * key, 0)
            if g is not None:
                decay += tl.load(g).to(tl.float32)
                g += g_t
            place += 1
            if place == span:
                total = tl.zeros([], tl.float32)
                decay = tl.zeros([], tl.float32)
                place *= 0
            k += k_t
            eta += eta_t
        tl.store(mass, total)
        tl.store(log_decay, decay)


STEP = Kernel(_step)
SUMS = Kernel(_sums)

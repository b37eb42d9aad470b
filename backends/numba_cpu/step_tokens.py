"""Decode: one to eight tokens of the gated delta rule on a state in memory, which is read once and written once a token (SPEC.md 9).

    S <- e^g S + k u^T,  u = beta (v - e^g S^T k);  o = scale S^T q

At one token a head's tile of S is read twice, from the nearest cache the second time. No token is copied: what normalises q and k is one factor
each, and stands outside the sums.
"""

from __future__ import annotations

import math

import numpy as np

from .call_row import FIELDS, TENSORS
from .jit import inlined, kernel
from .lanes import WIDTH, add, fma, integer, load, multiply, number, put, real, splat, spread, store
from .staging import read_tile, state_at, token_at, write_tile

__all__ = ["step_item"]

_F = np.float32
_ZERO, _ONE, _EPS = _F(0.0), _F(1.0), _F(1e-6)
_HEADS, _GROUP, _KEYS, _VALUES = (FIELDS[name] for name in ("heads", "group", "keys", "values"))
_TOKENS, _SLOTS, _L2NORM, _SCALE = (FIELDS[name] for name in ("tokens", "bounds", "l2norm", "scale"))
_Q, _K, _V, _BETA, _G, _START, _FINAL, _O = (TENSORS[name] for name in ("q", "k", "v", "beta", "g", "start", "final", "o"))


@kernel
def _rate(x, stride, keys):
    """rsqrt(sum of squares + 1e-6)."""
    square = _EPS
    for i in range(keys):
        square += number(x, i * stride) * number(x, i * stride)
    return _ONE / math.sqrt(square)


@kernel
def _token(source, step, to, to_step, keys, k, k_stride, q, q_stride, v, beta, decay, k_rate, q_factor):
    """One token on one tile: `to` gets the new state (it may be `source`); returns o. Four sums at a time, as one would wait for itself."""
    a0 = a1 = a2 = a3 = splat(_ZERO)
    whole = keys // 4 * 4
    for i in range(0, whole, 4):
        a0 = fma(spread(k, i * k_stride), load(source, i * step), a0)
        a1 = fma(spread(k, (i + 1) * k_stride), load(source, (i + 1) * step), a1)
        a2 = fma(spread(k, (i + 2) * k_stride), load(source, (i + 2) * step), a2)
        a3 = fma(spread(k, (i + 3) * k_stride), load(source, (i + 3) * step), a3)
    for i in range(whole, keys):
        a0 = fma(spread(k, i * k_stride), load(source, i * step), a0)
    seen = add(add(a0, a1), add(a2, a3))
    u = multiply(splat(beta * k_rate), fma(splat(-decay * k_rate), seen, v))
    d = splat(decay)
    a0 = a1 = a2 = a3 = splat(_ZERO)
    for i in range(0, whole, 4):
        s = fma(spread(k, i * k_stride), u, multiply(d, load(source, i * step)))
        store(to, i * to_step, s)
        a0 = fma(spread(q, i * q_stride), s, a0)
        s = fma(spread(k, (i + 1) * k_stride), u, multiply(d, load(source, (i + 1) * step)))
        store(to, (i + 1) * to_step, s)
        a1 = fma(spread(q, (i + 1) * q_stride), s, a1)
        s = fma(spread(k, (i + 2) * k_stride), u, multiply(d, load(source, (i + 2) * step)))
        store(to, (i + 2) * to_step, s)
        a2 = fma(spread(q, (i + 2) * q_stride), s, a2)
        s = fma(spread(k, (i + 3) * k_stride), u, multiply(d, load(source, (i + 3) * step)))
        store(to, (i + 3) * to_step, s)
        a3 = fma(spread(q, (i + 3) * q_stride), s, a3)
    for i in range(whole, keys):
        s = fma(spread(k, i * k_stride), u, multiply(d, load(source, i * step)))
        store(to, i * to_step, s)
        a0 = fma(spread(q, i * q_stride), s, a0)
    return multiply(splat(q_factor), add(add(a0, a1), add(a2, a3)))


@kernel
def _skipped(row, batch, head, tokens, values):
    for t in range(tokens):
        out = token_at(row, _O, batch, t, head)
        for j in range(values):
            put(out, j, _ZERO)


@inlined
def step_item(row, item, scratch):
    """All tokens of one head of one sequence. `scratch` holds a tile of the state and two rows."""
    heads, tokens, keys, values = integer(row, _HEADS), integer(row, _TOKENS), integer(row, _KEYS), integer(row, _VALUES)
    batch, head = item // heads, item % heads
    slots = integer(row, _SLOTS)
    slot = integer(slots, batch) if slots != 0 else batch
    if slot < 0:
        _skipped(row, batch, head, tokens, values)
        return
    shared, unit, scale = head // integer(row, _GROUP), integer(row, _L2NORM) != 0, _F(real(row, _SCALE))
    start, start_step, start_stride = state_at(row, _START, slot, head), integer(row, _START + 2), integer(row, _START + 3)
    final, final_step, final_stride = state_at(row, _FINAL, slot, head), integer(row, _FINAL + 2), integer(row, _FINAL + 3)
    k_stride, q_stride, v_stride = integer(row, _K + 3), integer(row, _Q + 3), integer(row, _V + 3)
    v_row = scratch + 4 * keys * WIDTH
    o_row = v_row + 4 * WIDTH
    for t in range(tokens):
        k, q = token_at(row, _K, batch, t, shared), token_at(row, _Q, batch, t, shared)
        v, o = token_at(row, _V, batch, t, head), token_at(row, _O, batch, t, head)
        beta, g = number(token_at(row, _BETA, batch, t, head), 0), token_at(row, _G, batch, t, head)
        decay = _F(math.exp(number(g, 0))) if g != 0 else _ONE
        k_rate = _rate(k, k_stride, keys) if unit else _ONE
        q_factor = scale * (_rate(q, q_stride, keys) if unit else _ONE)
        for column in range(0, values, WIDTH):
            valid = values - column
            source, step = start + 4 * column * start_stride, start_step
            to, to_step = final + 4 * column * final_stride, final_step
            if t > 0:
                source, step = to, to_step
            whole = valid >= WIDTH and final_stride == 1 and (t > 0 or start_stride == 1)
            read_tile(v_row, WIDTH, v + 4 * column * v_stride, 0, v_stride, 1, valid)
            if whole:
                out = _token(source, step, to, to_step, keys, k, k_stride, q, q_stride, load(v_row, 0), beta, decay, k_rate, q_factor)
            else:
                read_tile(scratch, WIDTH, source, step, final_stride if t > 0 else start_stride, keys, valid)
                out = _token(scratch, WIDTH, scratch, WIDTH, keys, k, k_stride, q, q_stride, load(v_row, 0), beta, decay, k_rate, q_factor)
                for i in range(keys):
                    for j in range(min(valid, WIDTH)):
                        put(to, i * to_step + j * final_stride, number(scratch, i * WIDTH + j))
            store(o_row, 0, out)
            write_tile(o_row, 0, o + 4 * column, 0, 1, valid)

"""dual_core's flat mode in one kernel: both cores of every chunk, each from an empty memory, and their merge (SPEC.md 3, 5).

A program owns a chunk of one v head and one tile of value columns; with x = beta v and L = tril(Gamma K K^T), rows scaled by beta = b:

    o = scale (alpha f tril(Q K^T) x + (1 - alpha) s (tril(Q K^T) Gamma) u)
    exact   u = (I + stril(b L))^-1 x         lam   u = x - b stril(L - L stril(b L)^T) x

A chunk of one or two blocks keeps everything on chip as products of blocks (flat_blocks: 23 BLOCK^2 (K + V) / 4 + 8 BLOCK^3 FLOP for two). A longer one
is walked with running matrices in registers, each block from the memory of those before it: W_f = sum k x^T, W_u = decayed sum k u^T, and for lam
R = decayed sum of z x^T with z_j = k_j - b_j P_j k_j, P_j = sum over m < j of k_m k_m^T, decayed twice (SPEC.md 3's token recurrence, on blocks).
q, k, v and o move once where one tile covers V; what binds is the latency of the chain of small products, hidden by many small programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decay import running_log
from .grid import locate
from .inverse import unit_lower_inverse
from .launch import Kernel
from .rounding import operand

__all__ = ["FLAT"]


@triton.jit
def _rows(base, first, step_t, row, column, inside, L2NORM: tl.constexpr):
    """A tile `[BLOCK, columns]`, its rows of unit norm where asked, in the operands' dtype."""
    tile = tl.load(base + first * step_t + row[:, None] * step_t + column[None, :], mask=inside, other=0.0)
    if L2NORM:
        wide = tile.to(tl.float32)
        tile = (wide * tl.rsqrt(tl.sum(wide * wide, 1) + 1e-6)[:, None]).to(tile.dtype)
    return tile


@triton.jit
def _numbers(base, first, step_t, row, here):
    """One number a row, float32."""
    return tl.load(base + first * step_t + row * step_t, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _logs(g, first, g_t, row, here, SPLIT: tl.constexpr):
    """G `[BLOCK]`, G_last - G, G_last and G_i - G_j, from the block's start."""
    coarse, fine, last, last_fine = running_log(_numbers(g, first, g_t, row, here), SPLIT)
    log = coarse
    after = last - coarse
    apart = coarse[:, None] - coarse[None, :]
    if SPLIT:
        log += fine
        after += last_fine - fine
        apart += fine[:, None] - fine[None, :]
        last += last_fine
    return log, after, last, apart


@triton.jit
def _shares(fast_gate, slow_gate, alpha, alpha_value, scale, first, fast_t, slow_t, alpha_t, row, here, BLOCK: tl.constexpr):
    """scale alpha f and scale (1 - alpha) s `[BLOCK]`."""
    fast = tl.zeros([BLOCK], tl.float32) + alpha_value
    if alpha is not None:
        fast = _numbers(alpha, first, alpha_t, row, here)
    slow = (1.0 - fast) * scale
    fast *= scale
    if fast_gate is not None:
        fast *= _numbers(fast_gate, first, fast_t, row, here)
    if slow_gate is not None:
        slow *= _numbers(slow_gate, first, slow_t, row, here)
    return fast, slow


@triton.jit
def _alone(gram, x, b, decay, apart, BLOCK: tl.constexpr, TRANSFORM: tl.constexpr, DTYPE: tl.constexpr, DOT: tl.constexpr):
    """u, without what earlier blocks add; then (exact) the inverse and (lam) stril(b L)^T, as operands. `decay` None: Gamma = 1."""
    row = tl.arange(0, BLOCK)
    below = row[:, None] > row[None, :]
    lower = tl.where(below, gram, 0.0)
    if decay is not None:
        lower *= decay
    if TRANSFORM == "exact":
        turned = operand(unit_lower_inverse(lower * b[:, None], BLOCK, DTYPE, DOT), DTYPE, DOT)
        u = tl.dot(turned, operand(x, DTYPE, DOT), input_precision=DOT)
    else:
        above = row[:, None] < row[None, :]
        common = gram * b[None, :]
        if decay is not None:
            common *= tl.exp(tl.where(above, -apart, float("-inf")))
        turned = operand(tl.where(above, common, 0.0), DTYPE, DOT)
        lower -= tl.where(below, tl.dot(operand(lower, DTYPE, DOT), turned, input_precision=DOT), 0.0)
        u = x - tl.dot(operand(lower * b[:, None], DTYPE, DOT), operand(x, DTYPE, DOT), input_precision=DOT)
    return u, turned


@triton.jit
def _one(
    q, k, v, beta, g, fast_gate, slow_gate, alpha, o, q_t, k_t, v_t, beta_t, g_t, fast_t, slow_t, alpha_t, o_t,
    first, low, high, column, alpha_value, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
    TRANSFORM: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A chunk that is one block, or only its first."""
    DTYPE: tl.constexpr = k.dtype.element_ty
    row = tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    here = (row >= low) & (row < high)
    keys = here[:, None] & (key[None, :] < K) if K != BLOCK_K else here[:, None]
    values = here[:, None] & (column[None, :] < V) if V % BLOCK_V else here[:, None]
    causal = row[:, None] >= row[None, :]
    k_tile = operand(_rows(k, first, k_t, row, key, keys, L2NORM), DTYPE, DOT)
    b = _numbers(beta, first, beta_t, row, here)
    x = _rows(v, first, v_t, row, column, values, False).to(tl.float32) * b[:, None]
    x_dot = operand(x, DTYPE, DOT)
    decay = None
    apart = None
    if g is not None:
        _, _, _, apart = _logs(g, first, g_t, row, here, tl.float32 == DTYPE)
        decay = tl.exp(tl.where(causal, apart, float("-inf")))
    u = x
    if TRANSFORM != "none":
        u, _ = _alone(tl.dot(k_tile, tl.trans(k_tile), input_precision=DOT), x, b, decay, apart, BLOCK, TRANSFORM, DTYPE, DOT)
    fast, slow = _shares(fast_gate, slow_gate, alpha, alpha_value, scale, first, fast_t, slow_t, alpha_t, row, here, BLOCK)
    scores = tl.where(causal, tl.dot(operand(_rows(q, first, q_t, row, key, keys, L2NORM), DTYPE, DOT), tl.trans(k_tile), input_precision=DOT), 0.0)
    y = tl.dot(operand(scores, DTYPE, DOT), x_dot, input_precision=DOT)
    if TRANSFORM == "none" and g is None:
        y *= (fast + slow)[:, None]
    else:
        if g is not None:
            scores *= decay
        y = y * fast[:, None] + tl.dot(operand(scores, DTYPE, DOT), operand(u, DTYPE, DOT), input_precision=DOT) * slow[:, None]
    tl.store(o + first * o_t + row[:, None] * o_t + column[None, :], y.to(DTYPE), mask=values)


@triton.jit
def _two(
    q, k, v, beta, g, fast_gate, slow_gate, alpha, o, q_t, k_t, v_t, beta_t, g_t, fast_t, slow_t, alpha_t, o_t,
    first, low, high, column, alpha_value, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
    TRANSFORM: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A chunk of two blocks, 0 and 1: products of blocks only, all of BLOCK rows, no running matrix."""
    DTYPE: tl.constexpr = k.dtype.element_ty
    SPLIT: tl.constexpr = tl.float32 == DTYPE
    row = tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    next_first = first + BLOCK
    here0 = (row >= low) & (row < high)
    here1 = (row >= low - BLOCK) & (row < high - BLOCK)
    keys0 = here0[:, None] & (key[None, :] < K) if K != BLOCK_K else here0[:, None]
    keys1 = here1[:, None] & (key[None, :] < K) if K != BLOCK_K else here1[:, None]
    values0 = here0[:, None] & (column[None, :] < V) if V % BLOCK_V else here0[:, None]
    values1 = here1[:, None] & (column[None, :] < V) if V % BLOCK_V else here1[:, None]
    causal = row[:, None] >= row[None, :]
    below = row[:, None] > row[None, :]
    k0 = operand(_rows(k, first, k_t, row, key, keys0, L2NORM), DTYPE, DOT)
    b0 = _numbers(beta, first, beta_t, row, here0)
    u0 = _rows(v, first, v_t, row, column, values0, False).to(tl.float32) * b0[:, None]
    x0 = operand(u0, DTYPE, DOT)
    decay = None
    apart = None
    if g is not None:
        _, after, _, apart = _logs(g, first, g_t, row, here0, SPLIT)
        behind = tl.exp(after)
        decay = tl.exp(tl.where(causal, apart, float("-inf")))
    if TRANSFORM != "none":
        u0, turned = _alone(tl.dot(k0, tl.trans(k0), input_precision=DOT), u0, b0, decay, apart, BLOCK, TRANSFORM, DTYPE, DOT)
    u0_dot = operand(u0, DTYPE, DOT)
    q0 = operand(_rows(q, first, q_t, row, key, keys0, L2NORM), DTYPE, DOT)
    fast, slow = _shares(fast_gate, slow_gate, alpha, alpha_value, scale, first, fast_t, slow_t, alpha_t, row, here0, BLOCK)
    scores = tl.where(causal, tl.dot(q0, tl.trans(k0), input_precision=DOT), 0.0)
    y = tl.dot(operand(scores, DTYPE, DOT), x0, input_precision=DOT)
    if TRANSFORM == "none" and g is None:
        y *= (fast + slow)[:, None]
    else:
        if g is not None:
            scores *= decay
        y = y * fast[:, None] + tl.dot(operand(scores, DTYPE, DOT), u0_dot, input_precision=DOT) * slow[:, None]
    tl.store(o + first * o_t + row[:, None] * o_t + column[None, :], y.to(DTYPE), mask=values0)
    # block 1
    k1 = operand(_rows(k, next_first, k_t, row, key, keys1, L2NORM), DTYPE, DOT)
    b1 = _numbers(beta, next_first, beta_t, row, here1)
    u1 = _rows(v, next_first, v_t, row, column, values1, False).to(tl.float32) * b1[:, None]
    x1 = operand(u1, DTYPE, DOT)
    if g is not None:
        log, _, _, apart = _logs(g, next_first, g_t, row, here1, SPLIT)
        ahead = tl.exp(log)
    if TRANSFORM != "none":
        cross = tl.dot(k1, tl.trans(k0), input_precision=DOT)
        if g is not None:
            cross *= ahead[:, None] * behind[None, :]
        if TRANSFORM == "exact":
            right = u1 - tl.dot(operand(cross * b1[:, None], DTYPE, DOT), u0_dot, input_precision=DOT)
            lower = tl.dot(k1, tl.trans(k1), input_precision=DOT) * b1[:, None]
            if g is not None:
                lower *= tl.exp(tl.where(below, apart, float("-inf")))
            inverse = operand(unit_lower_inverse(tl.where(below, lower, 0.0), BLOCK, DTYPE, DOT), DTYPE, DOT)
            u1 = tl.dot(inverse, operand(right, DTYPE, DOT), input_precision=DOT)
        else:
            cross_dot = operand(cross, DTYPE, DOT)
            seen = cross - tl.dot(cross_dot, turned, input_precision=DOT)
            u1 -= tl.dot(operand(seen * b1[:, None], DTYPE, DOT), x0, input_precision=DOT)
            weight = b1
            if g is not None:
                weight *= ahead
            upper = tl.dot(k0, tl.trans(k1), input_precision=DOT) * weight[None, :]
            if g is not None:
                upper *= behind[:, None]
            twice = tl.dot(cross_dot, operand(upper, DTYPE, DOT), input_precision=DOT)
            above = row[:, None] < row[None, :]
            gram = tl.dot(k1, tl.trans(k1), input_precision=DOT)
            common = gram * b1[None, :]
            if g is not None:
                common *= tl.exp(tl.where(above, -apart, float("-inf")))
                gram *= tl.exp(tl.where(below, apart, float("-inf")))
            lower = tl.where(below, gram, 0.0)
            twice = tl.dot(operand(lower, DTYPE, DOT), operand(tl.where(above, common, 0.0), DTYPE, DOT), twice, input_precision=DOT)
            lower = tl.where(below, (lower - twice) * b1[:, None], 0.0)
            u1 -= tl.dot(operand(lower, DTYPE, DOT), x1, input_precision=DOT)
    u1_dot = operand(u1, DTYPE, DOT)
    q1 = operand(_rows(q, next_first, q_t, row, key, keys1, L2NORM), DTYPE, DOT)
    fast, slow = _shares(fast_gate, slow_gate, alpha, alpha_value, scale, next_first, fast_t, slow_t, alpha_t, row, here1, BLOCK)
    far = tl.dot(q1, tl.trans(k0), input_precision=DOT)
    y = tl.dot(operand(far, DTYPE, DOT), x0, input_precision=DOT)
    if TRANSFORM == "none" and g is None:
        near = tl.where(causal, tl.dot(q1, tl.trans(k1), input_precision=DOT), 0.0)
        y = tl.dot(operand(near, DTYPE, DOT), x1, y, input_precision=DOT) * (fast + slow)[:, None]
    else:
        if g is not None:
            far *= ahead[:, None] * behind[None, :]
        held = tl.dot(operand(far, DTYPE, DOT), u0_dot, input_precision=DOT)
        near = tl.where(causal, tl.dot(q1, tl.trans(k1), input_precision=DOT), 0.0)
        y = tl.dot(operand(near, DTYPE, DOT), x1, y, input_precision=DOT)
        if g is not None:
            near *= tl.exp(tl.where(causal, apart, float("-inf")))
        held = tl.dot(operand(near, DTYPE, DOT), u1_dot, held, input_precision=DOT)
        y = y * fast[:, None] + held * slow[:, None]
    tl.store(o + next_first * o_t + row[:, None] * o_t + column[None, :], y.to(DTYPE), mask=values1)


@triton.jit
def _earlier_keys(
    k, g, first, low, index, k_t, g_t, k_turned, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr
):
    """P K^T without P: the chunk's earlier blocks once more, decayed to the start of block `index`."""
    DTYPE: tl.constexpr = k.dtype.element_ty
    row = tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    found = tl.zeros([BLOCK_K, BLOCK], tl.float32)
    gap = tl.sum(tl.zeros([BLOCK], tl.float32), 0)
    for back in range(1, index + 1):
        at = first - back * BLOCK
        here = row >= low + back * BLOCK
        keys = here[:, None] & (key[None, :] < K) if K != BLOCK_K else here[:, None]
        known = _rows(k, at, k_t, row, key, keys, L2NORM)
        gram = tl.dot(known, k_turned, input_precision=DOT)
        if g is not None:
            _, after, last, _ = _logs(g, at, g_t, row, here, tl.float32 == DTYPE)
            gram *= tl.exp(2.0 * (after + gap))[:, None]
            gap += last
        found = tl.dot(tl.trans(known), operand(gram, DTYPE, DOT), found, input_precision=DOT)
    return found


@triton.jit
def _block(
    q, k, v, beta, g, fast_gate, slow_gate, alpha, o, q_t, k_t, v_t, beta_t, g_t, fast_t, slow_t, alpha_t, o_t,
    first, low, high, index, column, alpha_value, scale, w_fast, w_slow, w_keys, gram_before,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
    TRANSFORM: tl.constexpr, L2NORM: tl.constexpr, PAIRS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Block `index` of a long chunk, rows `low <= row < high`: writes o, returns the running matrices behind it."""
    DTYPE: tl.constexpr = k.dtype.element_ty
    row = tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    here = (row >= low) & (row < high)
    keys = here[:, None] & (key[None, :] < K) if K != BLOCK_K else here[:, None]
    values = here[:, None] & (column[None, :] < V) if V % BLOCK_V else here[:, None]
    causal = row[:, None] >= row[None, :]
    below = row[:, None] > row[None, :]
    k_tile = operand(_rows(k, first, k_t, row, key, keys, L2NORM), DTYPE, DOT)
    q_tile = operand(_rows(q, first, q_t, row, key, keys, L2NORM), DTYPE, DOT)
    k_turned = tl.trans(k_tile)
    b = _numbers(beta, first, beta_t, row, here)
    u = _rows(v, first, v_t, row, column, values, False).to(tl.float32) * b[:, None]
    x = operand(u, DTYPE, DOT)
    if g is not None:
        log, after, last, apart = _logs(g, first, g_t, row, here, tl.float32 == DTYPE)
        decay = tl.exp(tl.where(causal, apart, float("-inf")))
        ahead = tl.exp(log)
        behind = tl.exp(after)
    if TRANSFORM != "none":
        gram = tl.dot(k_tile, k_turned, input_precision=DOT)
    if TRANSFORM == "exact":
        erased = gram * b[:, None]
        known = tl.dot(k_tile, operand(w_slow, DTYPE, DOT), input_precision=DOT) * b[:, None]
        if g is not None:
            erased *= decay
            known *= ahead[:, None]
        inverse = operand(unit_lower_inverse(tl.where(below, erased, 0.0), BLOCK, DTYPE, DOT), DTYPE, DOT)
        u = tl.dot(inverse, operand(u - known, DTYPE, DOT), input_precision=DOT)
    elif TRANSFORM == "lam":
        above = row[:, None] < row[None, :]
        common = gram * b[None, :]
        if PAIRS:
            earlier = _earlier_keys(k, g, first, low, index, k_t, g_t, k_turned, K, BLOCK_K, BLOCK, L2NORM, DOT) * b[None, :]
        else:
            earlier = tl.dot(operand(gram_before, DTYPE, DOT), k_turned, input_precision=DOT) * b[None, :]
        known = tl.dot(k_tile, operand(w_keys, DTYPE, DOT), input_precision=DOT) * b[:, None]
        if g is not None:
            common *= tl.exp(tl.where(above, -2.0 * apart, float("-inf")))  # Gamma_jm twice, turned
            earlier *= tl.exp(2.0 * log)[None, :]
            known *= ahead[:, None]
        z_turned = k_turned.to(tl.float32) - earlier
        z_turned -= tl.dot(k_turned, operand(tl.where(above, common, 0.0), DTYPE, DOT), input_precision=DOT)
        erased = tl.dot(k_tile, operand(z_turned, DTYPE, DOT), input_precision=DOT) * b[:, None]
        if g is not None:
            erased *= decay
        u -= known + tl.dot(operand(tl.where(below, erased, 0.0), DTYPE, DOT), x, input_precision=DOT)
    u_dot = operand(u, DTYPE, DOT)
    fast, slow = _shares(fast_gate, slow_gate, alpha, alpha_value, scale, first, fast_t, slow_t, alpha_t, row, here, BLOCK)
    scores = tl.where(causal, tl.dot(q_tile, k_turned, input_precision=DOT), 0.0)
    y = tl.dot(operand(scores, DTYPE, DOT), x, input_precision=DOT)
    y = tl.dot(q_tile, operand(w_fast, DTYPE, DOT), y, input_precision=DOT)
    if TRANSFORM == "none" and g is None:
        y *= (fast + slow)[:, None]
    else:
        held = tl.dot(q_tile, operand(w_slow, DTYPE, DOT), input_precision=DOT)
        if g is not None:
            scores *= decay
            held *= ahead[:, None]
        held = tl.dot(operand(scores, DTYPE, DOT), u_dot, held, input_precision=DOT)
        y = y * fast[:, None] + held * slow[:, None]
    tl.store(o + first * o_t + row[:, None] * o_t + column[None, :], y.to(DTYPE), mask=values)
    w_fast = tl.dot(k_turned, x, w_fast, input_precision=DOT)
    k_left = k_turned
    k_right = k_tile
    if g is not None:
        k_left = operand(k_turned.to(tl.float32) * behind[None, :], DTYPE, DOT)
        k_right = operand(k_tile.to(tl.float32) * behind[:, None], DTYPE, DOT)
        w_slow *= tl.exp(last)
    if TRANSFORM != "none" or g is not None:
        w_slow = tl.dot(k_left, u_dot, w_slow, input_precision=DOT)
    if TRANSFORM == "lam":
        if g is not None:
            z_turned *= behind[None, :]
            w_keys *= tl.exp(last)
            gram_before *= tl.exp(2.0 * last)
        w_keys = tl.dot(operand(z_turned, DTYPE, DOT), x, w_keys, input_precision=DOT)
        if not PAIRS:
            gram_before = tl.dot(k_left, k_right, gram_before, input_precision=DOT)
    return w_fast, w_slow, w_keys, gram_before


@triton.jit
def _flat(
    q, k, v, beta, g, fast_gate, slow_gate, alpha, cu_seqlens, o,
    alpha_value, scale, tokens, sequences, offset, heads, group,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h,
    fast_b, fast_t, fast_h, slow_b, slow_t, slow_h, alpha_b, alpha_t, alpha_h, o_b, o_t,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, TRANSFORM: tl.constexpr, L2NORM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One chunk of one v head and one value tile; heads run fastest, so that neighbours share the rows of memory."""
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    rest = program // heads
    column = (rest % TILES) * BLOCK_V + tl.arange(0, BLOCK_V)
    batch, _, _, start, begin, end = locate(cu_seqlens, rest // TILES, tokens, sequences, offset, CHUNK)
    stop = tl.minimum(end, start + CHUNK)
    if start >= stop:
        return
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    shared = head // group
    q += at * q_b + shared * q_h
    k += at * k_b + shared * k_h
    v += at * v_b + head * v_h
    o += at * o_b + head * V
    beta += at * beta_b + head * beta_h
    if g is not None:
        g += at * g_b + head * g_h
    if fast_gate is not None:
        fast_gate += at * fast_b + head * fast_h
    if slow_gate is not None:
        slow_gate += at * slow_b + head * slow_h
    if alpha is not None:
        alpha += at * alpha_b + head * alpha_h
    low = begin - start
    high = stop - start
    if CHUNK <= 2 * BLOCK:
        if CHUNK > BLOCK:
            if high > BLOCK:
                _two(
                    q, k, v, beta, g, fast_gate, slow_gate, alpha, o, q_t, k_t, v_t, beta_t, g_t, fast_t, slow_t, alpha_t, o_t,
                    first, low, high, column, alpha_value, scale, K, V, BLOCK_K, BLOCK_V, BLOCK, TRANSFORM, L2NORM, DOT,
                )  # fmt: skip
                return
        _one(
            q, k, v, beta, g, fast_gate, slow_gate, alpha, o, q_t, k_t, v_t, beta_t, g_t, fast_t, slow_t, alpha_t, o_t,
            first, low, high, column, alpha_value, scale, K, V, BLOCK_K, BLOCK_V, BLOCK, TRANSFORM, L2NORM, DOT,
        )  # fmt: skip
    else:
        LAM: tl.constexpr = TRANSFORM == "lam"
        w_fast = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        w_slow = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        w_keys = tl.zeros([BLOCK_K if LAM else 1, BLOCK_V], tl.float32)
        gram_before = tl.zeros([BLOCK_K, BLOCK_K] if LAM and not PAIRS else [1, 1], tl.float32)
        for index in range(tl.cdiv(high, BLOCK)):
            w_fast, w_slow, w_keys, gram_before = _block(
                q, k, v, beta, g, fast_gate, slow_gate, alpha, o, q_t, k_t, v_t, beta_t, g_t, fast_t, slow_t, alpha_t, o_t,
                first + index * BLOCK, low - index * BLOCK, high - index * BLOCK, index, column, alpha_value, scale,
                w_fast, w_slow, w_keys, gram_before, K, V, BLOCK_K, BLOCK_V, BLOCK, TRANSFORM, L2NORM, PAIRS, DOT,
            )  # fmt: skip


FLAT = Kernel(_flat)

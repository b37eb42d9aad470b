"""coupled_core's two walks over the chunks, forward and back: what depends on the states and nothing else (SPEC.md 5).

With A = K^T w and B = K^T u of every chunk, made in parallel (coupled_chunks), a chunk is X = S~ + B - A N(S~) for both states: one product of K x K by K x V a
state, whatever the chunk's length. The reverse walk is the same with A^T. Everything is kept transposed, `[V, K]`; a state is a number times a matrix Z, so that
dividing by the norm costs no pass, and the product does not wait for the norm, nor the norm for the product. A chunk of the reverse walk has one reduction:
<S, dS> of the next chunk follows from <S, dX> and <N(S~), dN> of this one, and more exactly so than from dS, which is nearly orthogonal to S.

One program per sequence and v head. A chunk moves, in float32, K^2 + V K numbers in and 2 V K out (back: K^2 + 4 V K in and 2 V K out), for 4 K^2 V FLOP each way:
at 1x8192, 12 heads of 32, chunks of 64, 25 MB and 0.2 GFLOP, 8 us of memory; the length of the chain is what counts.
Compiled for sm_90 by Triton 3.6.0, heads of 32, 4 warps: forward 159 registers a thread (tf32x3: 217), 20 KB of shared memory; back, 8 warps, 186 (254) and 24 KB; no
spills. Heads of 64, 8 warps: 206 and 64 KB (three stages 96), back 251 and 112 KB; float32 forward spills 176 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grid import chunks_before
from .launch import Kernel

__all__ = [
    "NUMBERS", "WALK", "WALK_BACK", "chunk_numbers", "decay_gradient", "keep_numbers", "numbers_of", "reading_of", "rounded", "sequence_of", "sum_of", "through",
    "unmixed",
]  # fmt: skip

NUMBERS = 8
"""Numbers that the walk leaves for a chunk and head: scale and norm of both states, both decays, what flows into the fast and into the slow state."""


@triton.jit
def sum_of(x):
    """The sum of a matrix."""
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def rounded(x, DOT: tl.constexpr):
    """`rounding.operand` of float32, which may lose a NaN: the walks carry every number of a state past its product, too."""
    if DOT == "tf32":
        return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def _matrix(base, cell, there, FULL: tl.constexpr):
    """A matrix; zero where it does not exist."""
    if FULL:
        return tl.load(base + cell)
    else:
        return tl.load(base + cell, mask=there, other=0.0)


@triton.jit
def _put(base, cell, there, x, FULL: tl.constexpr):
    """Writes what `_matrix` reads."""
    if FULL:
        tl.store(base + cell, x)
    else:
        tl.store(base + cell, x, mask=there)


@triton.jit
def reading_of(decay, scale, norm):
    """N(S~) = reading Z, for S = scale Z of that norm and S~ = decay S."""
    return decay * scale / (tl.abs(decay) * norm + 1e-8)


@triton.jit
def numbers_of(numbers, at):
    """The eight numbers of a chunk and head."""
    numbers += at * 8
    return (
        tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3),
        tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6), tl.load(numbers + 7),
    )  # fmt: skip


@triton.jit
def keep_numbers(numbers, at, fast_scale, slow_scale, fast_norm, slow_norm, by_fast, by_slow, to_fast, to_slow):
    """Writes what `numbers_of` reads."""
    numbers += at * 8
    tl.store(numbers, fast_scale)
    tl.store(numbers + 1, slow_scale)
    tl.store(numbers + 2, fast_norm)
    tl.store(numbers + 3, slow_norm)
    tl.store(numbers + 4, by_fast)
    tl.store(numbers + 5, by_slow)
    tl.store(numbers + 6, to_fast)
    tl.store(numbers + 7, to_slow)


@triton.jit
def chunk_numbers(psi, coupling, fast_decay, slow_decay, index, count, psi_t, coupling_t, fast_t, slow_t):
    """(both decays, what flows into the fast and into the slow state) of a chunk; zeros behind the last."""
    there = index < count
    at = tl.cast(index, tl.int64)
    share = tl.load(psi + at * psi_t, mask=there, other=0.0).to(tl.float32)
    if coupling is None:
        strength = 0.05 + 0.1 * share
    else:
        strength = tl.load(coupling + at * coupling_t, mask=there, other=0.0).to(tl.float32)
    fast = share * 0.0 + 1.0
    slow = fast
    if fast_decay is not None:
        fast = tl.load(fast_decay + at * fast_t, mask=there, other=0.0).to(tl.float32)
    if slow_decay is not None:
        slow = tl.load(slow_decay + at * slow_t, mask=there, other=0.0).to(tl.float32)
    return fast, slow, strength * share, strength * (1.0 - share)


@triton.jit
def sequence_of(cu_seqlens, sequence, tokens, CHUNK: tl.constexpr):
    """(batch row, first place of its states, chunks, chunks of the packed sequences before it). A sequence has a place more than it has chunks."""
    if cu_seqlens is None:
        count = tl.cdiv(tokens, CHUNK) + sequence * 0
        return sequence, sequence.to(tl.int64) * (count + 1), count, sequence * 0
    else:
        begin = tl.load(cu_seqlens + sequence).to(tl.int32)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int32)
        return sequence * 0, (begin // CHUNK + 2 * sequence).to(tl.int64), tl.cdiv(end - begin, CHUNK), chunks_before(cu_seqlens, sequence, CHUNK)


@triton.jit
def _norms(fast, slow):
    """Both Frobenius norms, in one reduction."""
    squares = tl.sum(tl.join(tl.sum(fast * fast, 1), tl.sum(slow * slow, 1)), 0)
    return tl.split(tl.sqrt(squares))


@triton.jit
def _walk(
    factor_a, turned_b, psi, coupling, fast_decay, slow_decay, initial_fast, initial, starts, numbers, final_fast, final, cu_seqlens, tokens,
    psi_b, psi_t, psi_h, coupling_b, coupling_t, coupling_h, fast_b, fast_t, fast_h, slow_b, slow_t, slow_h,
    HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DELTA: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """Both Z `[V, K]` at every chunk's start and behind the last, the numbers of each, the final states. Blocks: sequences * HEADS."""
    FULL: tl.constexpr = (KEYS == BLOCK_K) & (VALUES == BLOCK_V)
    head = tl.program_id(0) % HEADS
    sequence = tl.program_id(0) // HEADS
    row, place, count, chunks = sequence_of(cu_seqlens, sequence, tokens, CHUNK)
    row = row.to(tl.int64)
    chunks = chunks.to(tl.int64)
    psi += row * psi_b + chunks * psi_t + head * psi_h
    if coupling is not None:
        coupling += row * coupling_b + chunks * coupling_t + head * coupling_h
    if fast_decay is not None:
        fast_decay += row * fast_b + chunks * fast_t + head * fast_h
    if slow_decay is not None:
        slow_decay += row * slow_b + chunks * slow_t + head * slow_h
    value = tl.arange(0, BLOCK_V)[:, None]
    key = tl.arange(0, BLOCK_K)[None, :]
    inner = tl.arange(0, BLOCK_K)[:, None]
    there = (value < VALUES) & (key < KEYS)
    square = (inner < KEYS) & (key < KEYS)
    cell = value * KEYS + key
    own = (sequence.to(tl.int64) * HEADS + head) * (KEYS * VALUES) + key * VALUES + value
    fast = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
    slow = fast
    if initial_fast is not None:
        fast = tl.load(initial_fast + own, mask=there, other=0.0).to(tl.float32)
    if initial is not None:
        slow = tl.load(initial + own, mask=there, other=0.0).to(tl.float32)
    fast_norm, slow_norm = _norms(fast, slow)
    fast_scale = fast_norm * 0.0 + 1.0
    slow_scale = fast_scale
    by_fast, by_slow, to_fast, to_slow = chunk_numbers(psi, coupling, fast_decay, slow_decay, sequence * 0, count, psi_t, coupling_t, fast_t, slow_t)
    for index in tl.range(0, count, num_stages=STAGES):
        at = (place + index) * HEADS + head
        slot = (place - sequence + index) * HEADS + head
        b = _matrix(turned_b + slot * (KEYS * VALUES), cell, there, FULL)
        _put(starts + at * (2 * KEYS * VALUES), cell, there, fast, FULL)
        _put(starts + at * (2 * KEYS * VALUES) + KEYS * VALUES, cell, there, slow, FULL)
        keep_numbers(numbers, at, fast_scale, slow_scale, fast_norm, slow_norm, by_fast, by_slow, to_fast, to_slow)
        next_fast, next_slow, next_to_fast, next_to_slow = chunk_numbers(
            psi, coupling, fast_decay, slow_decay, index + 1, count, psi_t, coupling_t, fast_t, slow_t
        )
        wrote_fast = fast * (by_fast * fast_scale) + b
        wrote_slow = slow * (by_slow * slow_scale) + b
        if DELTA:
            a = _matrix(factor_a + slot * (KEYS * KEYS), key * KEYS + inner, square, FULL)  # A^T
            if PAIR:  # one product of both, which the tensor cores of Hopper take as it lies
                both = tl.reshape(tl.permute(tl.join(fast, slow), (2, 0, 1)), [2 * BLOCK_V, BLOCK_K])
                moved = tl.dot(rounded(both, DOT), a, input_precision=DOT)
                moved_fast, moved_slow = tl.split(tl.permute(tl.reshape(moved, [2, BLOCK_V, BLOCK_K]), (1, 2, 0)))
            else:
                moved_fast = tl.dot(rounded(fast, DOT), a, input_precision=DOT)
                moved_slow = tl.dot(rounded(slow, DOT), a, input_precision=DOT)
            wrote_fast -= reading_of(by_fast, fast_scale, fast_norm) * moved_fast
            wrote_slow -= reading_of(by_slow, slow_scale, slow_norm) * moved_slow
        fast = wrote_fast + to_fast * wrote_slow
        slow = wrote_slow + to_slow * wrote_fast
        fast_norm, slow_norm = _norms(fast, slow)
        fast_scale = 1.0 / (fast_norm + 1e-8)
        slow_scale = 1.0 / (slow_norm + 1e-8)
        fast_norm *= fast_scale
        slow_norm *= slow_scale
        by_fast, by_slow, to_fast, to_slow = next_fast, next_slow, next_to_fast, next_to_slow
    at = (place + count) * HEADS + head
    _put(starts + at * (2 * KEYS * VALUES), cell, there, fast, FULL)
    _put(starts + at * (2 * KEYS * VALUES) + KEYS * VALUES, cell, there, slow, FULL)
    keep_numbers(numbers, at, fast_scale, slow_scale, fast_norm, slow_norm, by_fast, by_slow, to_fast, to_slow)
    if final is not None:
        tl.store(final_fast + own, fast * fast_scale, mask=there)
        tl.store(final + own, slow * slow_scale, mask=there)


@triton.jit
def unmixed(d_state, state, scale, norm, along):
    """The gradient at Z, from that of S = Z / (||Z|| + eps) = scale Z of this norm, and <S, dS>; 0 where Z is 0."""
    size = norm / scale
    back = tl.where(norm > 0, scale, 0.0)
    return back * d_state - state * tl.where(norm > 0, back * along / tl.where(norm > 0, size, 1.0), 0.0)


@triton.jit
def through(d_wrote, d_read, state, decay, scale, norm, met):
    """The gradient at S: through S~ as it is kept, and through N(S~), which passes on nothing where S~ is 0; met: <N(S~), dN>."""
    kept = tl.abs(decay) * norm
    reading = reading_of(decay, scale, norm)
    by_state = tl.where(kept > 0, reading / scale, 0.0)
    along = tl.where(kept > 0, reading * met * (kept + 1e-8) / tl.where(kept > 0, kept, 1.0), 0.0)
    return decay * d_wrote + by_state * (d_read - along * state)


@triton.jit
def decay_gradient(kept, met, decay, norm):
    """<S, dS~>: `kept` is <S, dX>, and N(S~) passes on next to nothing along S~ itself."""
    size = tl.abs(decay) * norm
    return kept + tl.where(size > 0, met * 1e-8 / (tl.where(size > 0, decay, 1.0) * (size + 1e-8)), 0.0)


@triton.jit
def _walk_back(
    factor_a, starts, numbers, d_reads, d_final_fast, d_final, d_mixed, d_initial_fast, d_initial, d_fast_decay, d_slow_decay, cu_seqlens, tokens,
    HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DELTA: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dZ of every chunk's mixed states, the gradients of the decays and of the initial states. Blocks: sequences * HEADS.

    d_reads `[slots, H, 2, V, K]`: what the outputs pass to N(S~) (None: nothing).
    """
    FULL: tl.constexpr = (KEYS == BLOCK_K) & (VALUES == BLOCK_V)
    head = tl.program_id(0) % HEADS
    sequence = tl.program_id(0) // HEADS
    row, place, count, chunks = sequence_of(cu_seqlens, sequence, tokens, CHUNK)
    value = tl.arange(0, BLOCK_V)[:, None]
    key = tl.arange(0, BLOCK_K)[None, :]
    inner = tl.arange(0, BLOCK_K)[:, None]
    there = (value < VALUES) & (key < KEYS)
    square = (inner < KEYS) & (key < KEYS)
    cell = value * KEYS + key
    own = (sequence.to(tl.int64) * HEADS + head) * (KEYS * VALUES) + key * VALUES + value
    at = (place + count) * HEADS + head
    d_fast = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
    d_slow = d_fast
    if d_final_fast is not None:
        d_fast = tl.load(d_final_fast + own, mask=there, other=0.0).to(tl.float32)
    if d_final is not None:
        d_slow = tl.load(d_final + own, mask=there, other=0.0).to(tl.float32)
    fast = _matrix(starts + at * (2 * KEYS * VALUES), cell, there, FULL)
    slow = _matrix(starts + at * (2 * KEYS * VALUES) + KEYS * VALUES, cell, there, FULL)
    fast_scale = tl.load(numbers + at * 8)
    slow_scale = tl.load(numbers + at * 8 + 1)
    fast_norm = tl.load(numbers + at * 8 + 2)
    slow_norm = tl.load(numbers + at * 8 + 3)
    along_fast = sum_of(d_fast * fast) * fast_scale
    along_slow = sum_of(d_slow * slow) * slow_scale
    for step in tl.range(0, count, num_stages=STAGES):
        index = count - 1 - step
        at = (place + index) * HEADS + head
        slot = (place - sequence + index) * HEADS + head
        before_fast = _matrix(starts + at * (2 * KEYS * VALUES), cell, there, FULL)
        before_slow = _matrix(starts + at * (2 * KEYS * VALUES) + KEYS * VALUES, cell, there, FULL)
        fast_was, slow_was, fast_size, slow_size, by_fast, by_slow, to_fast, to_slow = numbers_of(numbers, at)
        mixed_fast = unmixed(d_fast, fast, fast_scale, fast_norm, along_fast)
        mixed_slow = unmixed(d_slow, slow, slow_scale, slow_norm, along_slow)
        if d_mixed is not None:
            _put(d_mixed + slot * (2 * KEYS * VALUES), cell, there, mixed_fast, FULL)
            _put(d_mixed + slot * (2 * KEYS * VALUES) + KEYS * VALUES, cell, there, mixed_slow, FULL)
        wrote_fast = mixed_fast + to_slow * mixed_slow
        wrote_slow = mixed_slow + to_fast * mixed_fast
        read_fast = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
        read_slow = read_fast
        if d_reads is not None:
            read_fast = _matrix(d_reads + slot * (2 * KEYS * VALUES), cell, there, FULL)
            read_slow = _matrix(d_reads + slot * (2 * KEYS * VALUES) + KEYS * VALUES, cell, there, FULL)
        if DELTA:
            a = _matrix(factor_a + slot * (KEYS * KEYS), inner * KEYS + key, square, FULL)
            read_fast -= tl.dot(rounded(wrote_fast, DOT), a, input_precision=DOT)
            read_slow -= tl.dot(rounded(wrote_slow, DOT), a, input_precision=DOT)
        kept = tl.join(tl.sum(before_fast * wrote_fast, 1), tl.sum(before_slow * wrote_slow, 1))
        met = tl.join(tl.sum(before_fast * read_fast, 1), tl.sum(before_slow * read_slow, 1))
        kept, met = tl.split(tl.sum(tl.join(kept, met), 0))
        kept_fast, kept_slow = tl.split(kept)
        met_fast, met_slow = tl.split(met)
        kept_fast *= fast_was
        kept_slow *= slow_was
        met_fast *= reading_of(by_fast, fast_was, fast_size)
        met_slow *= reading_of(by_slow, slow_was, slow_size)
        d_fast = through(wrote_fast, read_fast, before_fast, by_fast, fast_was, fast_size, met_fast)
        d_slow = through(wrote_slow, read_slow, before_slow, by_slow, slow_was, slow_size, met_slow)
        gain_fast = decay_gradient(kept_fast, met_fast, by_fast, fast_size)
        gain_slow = decay_gradient(kept_slow, met_slow, by_slow, slow_size)
        chunk = (row * tl.cdiv(tokens, CHUNK) + chunks + index).to(tl.int64) * HEADS + head
        if d_fast_decay is not None:
            tl.store(d_fast_decay + chunk, gain_fast.to(d_fast_decay.dtype.element_ty))
        if d_slow_decay is not None:
            tl.store(d_slow_decay + chunk, gain_slow.to(d_slow_decay.dtype.element_ty))
        along_fast = by_fast * gain_fast
        along_slow = by_slow * gain_slow
        fast, slow = before_fast, before_slow
        fast_scale, slow_scale, fast_norm, slow_norm = fast_was, slow_was, fast_size, slow_size
    if d_initial_fast is not None:
        tl.store(d_initial_fast + own, d_fast.to(d_initial_fast.dtype.element_ty), mask=there)
    if d_initial is not None:
        tl.store(d_initial + own, d_slow.to(d_initial.dtype.element_ty), mask=there)


WALK = Kernel(_walk)
WALK_BACK = Kernel(_walk_back)

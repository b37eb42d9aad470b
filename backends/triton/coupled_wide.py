"""coupled_walks' two walks for states too large for registers: a tile of values at a time, the states in memory, where the other kernels want them anyway.

A chunk passes the states once through the chip: 4 K V float32 numbers forward, 14 K V back besides the factors, from and to L2 for the most part, and reads the K x K
factor once a tile. The same formulas; a tile that one thread wrote and another reads again stands behind a barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .coupled_walks import chunk_numbers, decay_gradient, keep_numbers, numbers_of, reading_of, rounded, sequence_of, through, unmixed
from .launch import Kernel

__all__ = ["WALK_BACK_WIDE", "WALK_WIDE"]


@triton.jit
def _at(start, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """(places of a tile in a transposed state, in one as it is given, which of them exist)."""
    value = start + tl.arange(0, BLOCK_V)[:, None]
    key = tl.arange(0, BLOCK_K)[None, :]
    return value * KEYS + key, key * VALUES + value, (value < VALUES) & (key < KEYS)


@triton.jit
def _columns(start, part, KEYS: tl.constexpr, VALUES: tl.constexpr, STEP: tl.constexpr, BLOCK_V: tl.constexpr):
    """(places of STEP columns of a tile in a transposed state, which of them exist)."""
    value = start + tl.arange(0, BLOCK_V)[:, None]
    key = part + tl.arange(0, STEP)[None, :]
    return value * KEYS + key, (value < VALUES) & (key < KEYS)


@triton.jit
def _factor(factor_a, part, KEYS: tl.constexpr, STEP: tl.constexpr, BLOCK_K: tl.constexpr, TURNED: tl.constexpr):
    """STEP rows of A, or of A^T, as an operand."""
    inner = part + tl.arange(0, STEP)[:, None]
    key = tl.arange(0, BLOCK_K)[None, :]
    place = key * KEYS + inner if TURNED else inner * KEYS + key
    return tl.load(factor_a + place, mask=(inner < KEYS) & (key < KEYS), other=0.0)


@triton.jit
def _walk_wide(
    factor_a, turned_b, psi, coupling, fast_decay, slow_decay, initial_fast, initial, starts, numbers, final_fast, final, cu_seqlens, tokens,
    psi_b, psi_t, psi_h, coupling_b, coupling_t, coupling_h, fast_b, fast_t, fast_h, slow_b, slow_t, slow_h,
    HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DELTA: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """As `_walk`. Blocks: sequences * HEADS."""
    MATRIX: tl.constexpr = KEYS * VALUES
    STEP: tl.constexpr = 32 if BLOCK_K > 32 else BLOCK_K
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
    own = (sequence.to(tl.int64) * HEADS + head) * MATRIX
    here = starts + (place * HEADS + head) * (2 * MATRIX)
    fast_squares = tl.zeros([BLOCK_V], tl.float32)
    slow_squares = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, VALUES, BLOCK_V, num_stages=1):
        cell, turned, there = _at(start, KEYS, VALUES, BLOCK_K, BLOCK_V)
        fast = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
        slow = fast
        if initial_fast is not None:
            fast = tl.load(initial_fast + own + turned, mask=there, other=0.0).to(tl.float32)
        if initial is not None:
            slow = tl.load(initial + own + turned, mask=there, other=0.0).to(tl.float32)
        tl.store(here + cell, fast, mask=there)
        tl.store(here + MATRIX + cell, slow, mask=there)
        fast_squares += tl.sum(fast * fast, 1)
        slow_squares += tl.sum(slow * slow, 1)
    fast_norm = tl.sqrt(tl.sum(fast_squares, 0))
    slow_norm = tl.sqrt(tl.sum(slow_squares, 0))
    fast_scale = fast_norm * 0.0 + 1.0
    slow_scale = fast_scale
    for index in tl.range(0, count, num_stages=1):
        at = (place + index) * HEADS + head
        slot = (place - sequence + index) * HEADS + head
        here = starts + at * (2 * MATRIX)
        there_next = here + HEADS * (2 * MATRIX)
        by_fast, by_slow, to_fast, to_slow = chunk_numbers(psi, coupling, fast_decay, slow_decay, index, count, psi_t, coupling_t, fast_t, slow_t)
        keep_numbers(numbers, at, fast_scale, slow_scale, fast_norm, slow_norm, by_fast, by_slow, to_fast, to_slow)
        read_fast = reading_of(by_fast, fast_scale, fast_norm)
        read_slow = reading_of(by_slow, slow_scale, slow_norm)
        fast_squares = tl.zeros([BLOCK_V], tl.float32)
        slow_squares = tl.zeros([BLOCK_V], tl.float32)
        tl.debug_barrier()
        for start in tl.range(0, VALUES, BLOCK_V, num_stages=1, disable_licm=True):
            cell, _turned, there = _at(start, KEYS, VALUES, BLOCK_K, BLOCK_V)
            fast = tl.load(here + cell, mask=there, other=0.0)
            slow = tl.load(here + MATRIX + cell, mask=there, other=0.0)
            b = tl.load(turned_b + slot * MATRIX + cell, mask=there, other=0.0)
            wrote_fast = fast * (by_fast * fast_scale) + b
            wrote_slow = slow * (by_slow * slow_scale) + b
            if DELTA:
                moved_fast = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
                moved_slow = moved_fast
                for part in tl.range(0, KEYS, STEP, num_stages=1, disable_licm=True):  # a step of keys at a time, for registers' sake
                    a = _factor(factor_a + slot * (KEYS * KEYS), part, KEYS, STEP, BLOCK_K, True)
                    cell_part, there_part = _columns(start, part, KEYS, VALUES, STEP, BLOCK_V)
                    left = rounded(tl.load(here + cell_part, mask=there_part, other=0.0), DOT)
                    moved_fast = tl.dot(left, a, moved_fast, input_precision=DOT)
                    left = rounded(tl.load(here + MATRIX + cell_part, mask=there_part, other=0.0), DOT)
                    moved_slow = tl.dot(left, a, moved_slow, input_precision=DOT)
                wrote_fast -= read_fast * moved_fast
                wrote_slow -= read_slow * moved_slow
            fast = wrote_fast + to_fast * wrote_slow
            slow = wrote_slow + to_slow * wrote_fast
            tl.store(there_next + cell, fast, mask=there)
            tl.store(there_next + MATRIX + cell, slow, mask=there)
            fast_squares += tl.sum(fast * fast, 1)
            slow_squares += tl.sum(slow * slow, 1)
        fast_norm = tl.sqrt(tl.sum(fast_squares, 0))
        slow_norm = tl.sqrt(tl.sum(slow_squares, 0))
        fast_scale = 1.0 / (fast_norm + 1e-8)
        slow_scale = 1.0 / (slow_norm + 1e-8)
        fast_norm *= fast_scale
        slow_norm *= slow_scale
    at = (place + count) * HEADS + head
    keep_numbers(numbers, at, fast_scale, slow_scale, fast_norm, slow_norm, fast_scale, fast_scale, fast_scale, fast_scale)
    if final is not None:
        tl.debug_barrier()
        here = starts + at * (2 * MATRIX)
        for start in tl.range(0, VALUES, BLOCK_V, num_stages=1):
            cell, turned, there = _at(start, KEYS, VALUES, BLOCK_K, BLOCK_V)
            tl.store(final_fast + own + turned, tl.load(here + cell, mask=there, other=0.0) * fast_scale, mask=there)
            tl.store(final + own + turned, tl.load(here + MATRIX + cell, mask=there, other=0.0) * slow_scale, mask=there)


@triton.jit
def _walk_back_wide(
    factor_a, starts, numbers, d_reads, d_final_fast, d_final, d_mixed, d_initial_fast, d_initial, d_fast_decay, d_slow_decay, d_states, cu_seqlens, tokens,
    HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DELTA: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr, ARRIVED: tl.constexpr,
):  # fmt: skip
    """As `_walk_back`. ARRIVED: d_reads holds what the outputs pass; else it is scratch like d_states `[sequences, H, 2, V, K]`. Blocks: sequences * HEADS."""
    MATRIX: tl.constexpr = KEYS * VALUES
    head = tl.program_id(0) % HEADS
    sequence = tl.program_id(0) // HEADS
    row, place, count, chunks = sequence_of(cu_seqlens, sequence, tokens, CHUNK)
    own = (sequence.to(tl.int64) * HEADS + head) * MATRIX
    states = d_states + 2 * own
    at = (place + count) * HEADS + head
    after = starts + at * (2 * MATRIX)
    fast_scale = tl.load(numbers + at * 8)
    slow_scale = tl.load(numbers + at * 8 + 1)
    fast_norm = tl.load(numbers + at * 8 + 2)
    slow_norm = tl.load(numbers + at * 8 + 3)
    fast_sums = tl.zeros([BLOCK_V], tl.float32)
    slow_sums = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, VALUES, BLOCK_V, num_stages=1):
        cell, turned, there = _at(start, KEYS, VALUES, BLOCK_K, BLOCK_V)
        d_fast = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
        d_slow = d_fast
        if d_final_fast is not None:
            d_fast = tl.load(d_final_fast + own + turned, mask=there, other=0.0).to(tl.float32)
        if d_final is not None:
            d_slow = tl.load(d_final + own + turned, mask=there, other=0.0).to(tl.float32)
        tl.store(states + cell, d_fast, mask=there)
        tl.store(states + MATRIX + cell, d_slow, mask=there)
        fast_sums += tl.sum(d_fast * tl.load(after + cell, mask=there, other=0.0), 1)
        slow_sums += tl.sum(d_slow * tl.load(after + MATRIX + cell, mask=there, other=0.0), 1)
    along_fast = tl.sum(fast_sums, 0) * fast_scale
    along_slow = tl.sum(slow_sums, 0) * slow_scale
    for step in tl.range(0, count, num_stages=1):
        index = count - 1 - step
        at = (place + index) * HEADS + head
        slot = (place - sequence + index) * HEADS + head
        before = starts + at * (2 * MATRIX)
        after = before + HEADS * (2 * MATRIX)
        mixed = d_mixed + slot * (2 * MATRIX)
        reads = d_reads + slot * (2 * MATRIX)
        fast_was, slow_was, fast_size, slow_size, by_fast, by_slow, to_fast, to_slow = numbers_of(numbers, at)
        kept_fast = tl.zeros([BLOCK_V], tl.float32)
        kept_slow = tl.zeros([BLOCK_V], tl.float32)
        met_fast = tl.zeros([BLOCK_V], tl.float32)
        met_slow = tl.zeros([BLOCK_V], tl.float32)
        tl.debug_barrier()
        for start in tl.range(0, VALUES, BLOCK_V, num_stages=1, disable_licm=True):
            cell, _turned, there = _at(start, KEYS, VALUES, BLOCK_K, BLOCK_V)
            d_fast = tl.load(states + cell, mask=there, other=0.0)
            d_slow = tl.load(states + MATRIX + cell, mask=there, other=0.0)
            mixed_fast = unmixed(d_fast, tl.load(after + cell, mask=there, other=0.0), fast_scale, fast_norm, along_fast)
            mixed_slow = unmixed(d_slow, tl.load(after + MATRIX + cell, mask=there, other=0.0), slow_scale, slow_norm, along_slow)
            tl.store(mixed + cell, mixed_fast, mask=there)
            tl.store(mixed + MATRIX + cell, mixed_slow, mask=there)
            wrote_fast = mixed_fast + to_slow * mixed_slow
            wrote_slow = mixed_slow + to_fast * mixed_fast
            read_fast = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
            read_slow = read_fast
            if ARRIVED:
                read_fast = tl.load(reads + cell, mask=there, other=0.0)
                read_slow = tl.load(reads + MATRIX + cell, mask=there, other=0.0)
            if DELTA:
                a = _factor(factor_a + slot * (KEYS * KEYS), 0, KEYS, BLOCK_K, BLOCK_K, False)
                read_fast -= tl.dot(rounded(wrote_fast, DOT), a, input_precision=DOT)
                read_slow -= tl.dot(rounded(wrote_slow, DOT), a, input_precision=DOT)
            tl.store(reads + cell, read_fast, mask=there)
            tl.store(reads + MATRIX + cell, read_slow, mask=there)
            fast = tl.load(before + cell, mask=there, other=0.0)
            slow = tl.load(before + MATRIX + cell, mask=there, other=0.0)
            kept_fast += tl.sum(fast * wrote_fast, 1)
            kept_slow += tl.sum(slow * wrote_slow, 1)
            met_fast += tl.sum(fast * read_fast, 1)
            met_slow += tl.sum(slow * read_slow, 1)
        along_reads = tl.sum(met_fast, 0) * reading_of(by_fast, fast_was, fast_size)
        along_slow_reads = tl.sum(met_slow, 0) * reading_of(by_slow, slow_was, slow_size)
        gain_fast = decay_gradient(tl.sum(kept_fast, 0) * fast_was, along_reads, by_fast, fast_size)
        gain_slow = decay_gradient(tl.sum(kept_slow, 0) * slow_was, along_slow_reads, by_slow, slow_size)
        tl.debug_barrier()
        for start in tl.range(0, VALUES, BLOCK_V, num_stages=1):
            cell, _turned, there = _at(start, KEYS, VALUES, BLOCK_K, BLOCK_V)
            mixed_fast = tl.load(mixed + cell, mask=there, other=0.0)
            mixed_slow = tl.load(mixed + MATRIX + cell, mask=there, other=0.0)
            read_fast = tl.load(reads + cell, mask=there, other=0.0)
            read_slow = tl.load(reads + MATRIX + cell, mask=there, other=0.0)
            fast = tl.load(before + cell, mask=there, other=0.0)
            slow = tl.load(before + MATRIX + cell, mask=there, other=0.0)
            d_fast = through(mixed_fast + to_slow * mixed_slow, read_fast, fast, by_fast, fast_was, fast_size, along_reads)
            d_slow = through(mixed_slow + to_fast * mixed_fast, read_slow, slow, by_slow, slow_was, slow_size, along_slow_reads)
            tl.store(states + cell, d_fast, mask=there)
            tl.store(states + MATRIX + cell, d_slow, mask=there)
        chunk = (row * tl.cdiv(tokens, CHUNK) + chunks + index).to(tl.int64) * HEADS + head
        if d_fast_decay is not None:
            tl.store(d_fast_decay + chunk, gain_fast.to(d_fast_decay.dtype.element_ty))
        if d_slow_decay is not None:
            tl.store(d_slow_decay + chunk, gain_slow.to(d_slow_decay.dtype.element_ty))
        along_fast = by_fast * gain_fast
        along_slow = by_slow * gain_slow
        fast_scale, slow_scale, fast_norm, slow_norm = fast_was, slow_was, fast_size, slow_size
    if d_initial_fast is not None or d_initial is not None:
        tl.debug_barrier()
        for start in tl.range(0, VALUES, BLOCK_V, num_stages=1):
            cell, turned, there = _at(start, KEYS, VALUES, BLOCK_K, BLOCK_V)
            if d_initial_fast is not None:
                tl.store(d_initial_fast + own + turned, tl.load(states + cell, mask=there, other=0.0).to(d_initial_fast.dtype.element_ty), mask=there)
            if d_initial is not None:
                d_slow = tl.load(states + MATRIX + cell, mask=there, other=0.0)
                tl.store(d_initial + own + turned, d_slow.to(d_initial.dtype.element_ty), mask=there)


WALK_WIDE = Kernel(_walk_wide)
WALK_BACK_WIDE = Kernel(_walk_back_wide)

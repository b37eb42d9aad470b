"""Small heads: what every block does to the state is known, so the serial part is one small product a block, and everything else is parallel.

`delta_prepare` writes each block's M and N (S <- M S + N). FOLD composes those of a segment's blocks; `delta_scan`'s CHAIN runs over the segments;
READ walks from its segment's start to its own block and writes the outputs. A step costs 2 K^2 (K + V) FLOP and K (K + V) floats: for head_dim up to 64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .delta_output import block_output
from .grid import locate
from .launch import Kernel

__all__ = ["FOLD", "READ"]


@triton.jit
def _fold(
    maps, offsets, segment_maps, segment_offsets, initial, cu_seqlens, tokens, sequences, heads,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """M and N of a segment. A first segment's N starts from the initial state; a last segment is left out."""
    program = tl.program_id(0)
    of_map = program % 2
    head = (program // 2) % heads
    unit = program // 2 // heads
    _, sequence, segment, start, begin, end = locate(cu_seqlens, unit, tokens, sequences, 0, SEGMENT * BLOCK)
    if (start >= end) | (start + SEGMENT * BLOCK >= end) | ((of_map == 1) & (segment == 0)):
        return
    slot = _slot(cu_seqlens, sequence, begin, tokens, BLOCK) + segment * SEGMENT
    key = tl.arange(0, BLOCK_K)
    at_map = key[:, None] * K + key[None, :]
    in_map = (key[:, None] < K) & (key[None, :] < K)
    if of_map == 1:
        state = tl.where(key[:, None] == key[None, :], 1.0, 0.0)
        for i in tl.range(0, SEGMENT, num_stages=STAGES):
            kept = tl.load(maps + ((slot + i).to(tl.int64) * heads + head) * (K * K) + at_map, mask=in_map, other=0.0)
            state = tl.dot(kept, state, input_precision=DOT)
        tl.store(segment_maps + (unit.to(tl.int64) * heads + head) * (K * K) + at_map, state, mask=in_map)
    else:
        value = tl.arange(0, BLOCK_V)
        at = key[:, None] * V + value[None, :]
        inside = (key[:, None] < K) & (value[None, :] < V)
        state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        if initial is not None:
            state = tl.load(initial + (sequence.to(tl.int64) * heads + head) * (K * V) + at, mask=inside & (segment == 0), other=0.0)
        for i in tl.range(0, SEGMENT, num_stages=STAGES):
            place = (slot + i).to(tl.int64) * heads + head
            kept = tl.load(maps + place * (K * K) + at_map, mask=in_map, other=0.0)
            added = tl.load(offsets + place * (K * V) + at, mask=inside, other=0.0)
            state = tl.dot(kept, state, acc=added, input_precision=DOT)
        tl.store(segment_offsets + (unit.to(tl.int64) * heads + head) * (K * V) + at, state, mask=inside)


FOLD = Kernel(_fold)


@triton.jit
def _slot(cu_seqlens, sequence, begin, tokens, BLOCK: tl.constexpr):
    """A sequence's first block slot."""
    if cu_seqlens is None:
        return sequence * tl.cdiv(tokens, BLOCK)
    else:
        return begin // BLOCK + sequence


@triton.jit
def _read(
    q, k, v, o, starts, maps, offsets, inverses, scores, read, erase, final, cu_seqlens, tokens, sequences, heads, group,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program % heads
    slot = program // heads
    batch, sequence, index, start, begin, end = locate(cu_seqlens, slot, tokens, sequences, 0, BLOCK)
    if start >= end:
        return
    segment = index // SEGMENT
    if cu_seqlens is None:
        unit = sequence * tl.cdiv(tokens, SEGMENT * BLOCK) + segment
    else:
        unit = begin // (SEGMENT * BLOCK) + sequence + segment
    key = tl.arange(0, BLOCK_K)
    value = tl.arange(0, BLOCK_V)
    at_map = key[:, None] * K + key[None, :]
    in_map = (key[:, None] < K) & (key[None, :] < K)
    at = key[:, None] * V + value[None, :]
    inside = (key[:, None] < K) & (value[None, :] < V)
    state = tl.load(starts + (unit.to(tl.int64) * heads + head) * (K * V) + at, mask=inside, other=0.0)
    before = slot - (index - segment * SEGMENT)
    for i in tl.range(0, index - segment * SEGMENT, num_stages=STAGES):
        place = (before + i).to(tl.int64) * heads + head
        kept = tl.load(maps + place * (K * K) + at_map, mask=in_map, other=0.0)
        added = tl.load(offsets + place * (K * V) + at, mask=inside, other=0.0)
        state = tl.dot(kept, state, acc=added, input_precision=DOT)
    block_output(
        q, k, v, o, state.to(k.dtype.element_ty), inverses, scores, read, erase, batch, start, end, slot, head, tokens, heads, group, value,
        q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, K, V, BLOCK_K, BLOCK, DOT,
    )  # fmt: skip
    if final is not None:
        if start + BLOCK >= end:
            place = slot.to(tl.int64) * heads + head
            kept = tl.load(maps + place * (K * K) + at_map, mask=in_map, other=0.0)
            added = tl.load(offsets + place * (K * V) + at, mask=inside, other=0.0)
            state = tl.dot(kept, state, acc=added, input_precision=DOT)
            tl.store(final + (sequence.to(tl.int64) * heads + head) * (K * V) + at, state, mask=inside)


READ = Kernel(_read)

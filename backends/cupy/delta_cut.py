"""Few heads of a long sequence on Hopper: every sequence cut into segments of whole blocks, which the walks take side by side (kernel in cuda/delta_chain.cu).

What a segment does to a state is walked first, S_out = M S_in + N, then the states between segments follow one from the other in float32, then all segments are walked
from theirs; a walk back likewise, with the same M. H100, 1 x 32768, 2/8 heads: 8 segments of 64 blocks take 64 x (1.3 + 1.7) us, where all processors walk
and memory binds, and 6 steps of 2.7 between them, where one walk takes 512 x 1.4. A segment, v head and direction costs 64 KB for its state, and 64 KB for M, which
training hands on.

A candidate names the processors that it is cut for, not the segments: how many these are is found from a call's sizes, so that what a table knows of one length holds
for others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .delta_prepare import Rule
from .launch import Kernel

__all__ = ["CHAIN", "Cut", "chain", "cut_of", "processors_of", "room", "segments_of"]

CHAIN = Kernel("delta_chain.cu", "delta_chain", "2P2i")
_SIZE, _COLUMNS, _THREADS = 128, 8, 256
_BYTES = 4 * (2 * _SIZE * (_SIZE + 4) + 9 * _SIZE * _COLUMNS)
_SMS, _SIDE = 132, 64
_FEWEST, _SHORTEST, _EXAMINED = 3, 8, 8
"""Segments that pay for walking nearly all of them twice; blocks of one that pay for its step of the chain and the walks' beginnings; segments at most of an exam."""
_BALANCE = 1.8
"""A block's two walks, 2.7 us of few heads, over a step of the chain, 1.5 (8 heads: 3 over 2.7):
segments beyond the root of so many times the blocks cost more between them than they save."""


@dataclass(frozen=True, slots=True)
class Cut:
    """`segments` of every sequence, the `states` between them (back: their gradients) and the `maps`, both float32 `[sequences * segments, H, K, V]`.

    As the walks find them: forward at a segment's beginning, unused of the first; back at its end, unused of the last. Maps of the first and the last are unused.
    """

    segments: int
    states: Tensor
    maps: Tensor


def processors_of(signature: Signature, machine: Machine) -> int:
    """The processors to cut sequences for, 0 where whole ones are likely to be the fastest."""
    found, sequences = machine.sms or _SMS, signature.dim("N")
    tokens = signature.dim("T") // (max(sequences, 1) if signature.packed else 1)
    return 0 if signature.batch_invariant or _fitting(found, sequences * signature.dim("H"), tokens) < _FEWEST else found


def segments_of(x: Rule, processors: int) -> int:
    """Segments of each of a call's sequences. One that is too short to be worth it is examined alone: in up to eight then, so that the chain takes steps as it does where
    they are long."""
    tokens, heads = x.tokens // (max(x.slots.sequences, 1) if x.slots.cu_seqlens is not None else 1), x.slots.sequences * x.heads
    found = _fitting(processors, heads, tokens)
    return found if found >= _FEWEST else min(_EXAMINED, max(_FEWEST, processors // max(2 * heads, 1)))


def _fitting(processors: int, heads: int, tokens: int) -> int:
    """Segments of so many tokens that are likely to be the fastest: every half of a head of each finds a processor."""
    blocks = tokens // _SIDE
    return min(processors // max(2 * heads, 1), blocks // _SHORTEST, math.isqrt(int(_BALANCE * blocks)))


def room(x: Rule, segments: int) -> Tensor:
    """For a state, or a map, of every segment and head."""
    return torch.empty((x.slots.sequences * segments, x.heads, _SIZE, _SIZE), dtype=torch.float32, device=x.v.device)


def cut_of(x: Rule, processors: int, maps: Tensor | None = None) -> Cut | None:
    """Room for what a walk needs that is cut for so many processors, with `maps` that another one made; None for 0."""
    if not processors:
        return None
    segments = segments_of(x, processors)
    return Cut(segments, room(x, segments), room(x, segments) if maps is None else maps)


def chain(x: Rule, cut: Cut, *, back: bool) -> None:
    """The states at the segments' ends from what each segment makes of nothing, in its place."""
    if cut.segments > 2:
        blocks = x.slots.sequences * x.heads * (_SIZE // _COLUMNS)
        CHAIN((blocks, 1, 1), _THREADS, (("BACK", back),), (cut.maps, cut.states, x.heads, cut.segments), _BYTES)

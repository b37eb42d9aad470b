"""More than two cores: levels that learn one block of chunks at a time, by the ops `deep_core` and `deep_core_step` (SPEC 7). Experimental.

A level reads a memory that stands still during a block of `chunk_size * period` tokens, so it is strictly causal, and adds its share to the merge.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titans_backends.nn.level import Level
from titans_backends.nn.memory import Memory
from titans_backends.nn.streaming import DualCoreCache, stored
from titans_backends.op import get_op

__all__ = ["empty_carry", "with_levels"]


def empty_carry(like: Tensor) -> tuple[Tensor, ...]:
    """D and the open block's error, mass and log decay, of a sequence that has not begun; `like` `[B, H, K, V]`."""
    return torch.zeros_like(like), torch.zeros_like(like), like.new_zeros(like.shape[:2]), like.new_zeros(like.shape[:2])


def with_levels(o: Tensor, levels: Sequence[Level], x: Memory, eta: Tensor, gate: Tensor, cache: DualCoreCache | None) -> Tensor:
    """The cores' o `[B, T, H, V]` with every level's share; eta (step size) and gate `[B, T, H * levels]`, one group of H a level."""
    o = (1 - sum(level.weight for level in levels)) * o
    for index, level in enumerate(levels):
        part = (..., slice(index * o.shape[2], (index + 1) * o.shape[2]))
        state, error, mass, log_decay = (None,) * 4 if cache is None else cache.levels[index]
        found, *carry = get_op("deep_core")(
            x.q, x.k, x.v, eta[part], gate=gate[part],
            chunk_size=x.chunk_size, period=level.period, normalize=level.normalize, cu_seqlens=x.cu_seqlens,
            initial_state=state, initial_error=error, initial_mass=mass, initial_log_decay=log_decay,
            block_offset=0 if cache is None else cache.position % (x.chunk_size * level.period), output_final_state=cache is not None,
        )  # fmt: skip
        assert found is not None
        o = o + level.weight * found
        if cache is not None:
            new = [tensor for tensor in carry if tensor is not None]
            cache.levels[index] = tuple(stored(before, after) for before, after in zip(cache.levels[index], new, strict=True))
    return o

"""More than two cores: levels that learn one block of chunks at a time, by the ops `deep_core` and `deep_core_step`. Experimental.

A level reads a memory that stands still during a block of `chunk_size * period` tokens, so it is strictly causal, and adds its share to the merge.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titans_backends.contracts.gated_delta_step import MAX_TOKENS
from titans_backends.nn.level import Level
from titans_backends.nn.memory import Memory
from titans_backends.nn.streaming import DualCoreCache, stored

__all__ = ["empty_carry", "with_levels"]


def empty_carry(like: Tensor) -> tuple[Tensor, ...]:
    """D and the open block's error, mass and log decay, of a sequence that has not begun; `like` `[B, H, K, V]`."""
    return torch.zeros_like(like), torch.zeros_like(like), like.new_zeros(like.shape[:2]), like.new_zeros(like.shape[:2])


def with_levels(o: Tensor, levels: Sequence[Level], x: Memory, eta: Tensor, gate: Tensor) -> Tensor:
    """The cores' o `[B, T, H, V]` with every level's share; eta (step size) and gate `[B, T, H * levels]`, one group of H a level."""
    cache = x.continues
    o = (1 - sum(level.weight for level in levels)) * o
    for index, level in enumerate(levels):
        part = (..., slice(index * o.shape[2], (index + 1) * o.shape[2]))
        if cache is not None and 1 <= o.shape[1] <= MAX_TOKENS and not _differentiated(o, cache.levels[index]):
            found = _step(level, x, eta[part], gate[part], cache, cache.levels[index])
        else:
            found = _sequence(level, x, eta[part], gate[part], cache, index)
        o = o + level.weight * found
    return o


def _differentiated(o: Tensor, carry: tuple[Tensor, ...]) -> bool:
    """Whether a gradient may run through the step, or an earlier piece's graph holds the carry."""
    return (torch.is_grad_enabled() and o.requires_grad) or any(tensor.requires_grad for tensor in carry)


def _step(level: Level, x: Memory, eta: Tensor, gate: Tensor, cache: DualCoreCache, carry: tuple[Tensor, ...]) -> Tensor:
    """A few tokens, the carry written in place, the position asked of the device."""
    state, error, mass, log_decay = carry
    found, *_ = x.ops.op("deep_core_step")(
        x.q, x.k, x.v, eta, gate=gate, state=state, error=error, mass=mass, log_decay=log_decay,
        position=cache.positions % (x.chunk_size * level.period), chunk_size=x.chunk_size, period=level.period, normalize=level.normalize, inplace=True,
    )  # fmt: skip
    assert found is not None
    return found


def _sequence(level: Level, x: Memory, eta: Tensor, gate: Tensor, cache: DualCoreCache | None, index: int) -> Tensor:
    """Any number of tokens, from the cache's carry and into it."""
    state, error, mass, log_decay = (None,) * 4 if cache is None else cache.levels[index]
    found, *carry = x.ops.op("deep_core")(
        x.q, x.k, x.v, eta, gate=gate,
        chunk_size=x.chunk_size, period=level.period, normalize=level.normalize, cu_seqlens=x.cu_seqlens,
        initial_state=state, initial_error=error, initial_mass=mass, initial_log_decay=log_decay,
        block_offset=0 if cache is None else cache.position % (x.chunk_size * level.period), output_final_state=cache is not None,
    )  # fmt: skip
    assert found is not None
    if cache is not None:
        new = [tensor for tensor in carry if tensor is not None]
        cache.levels[index] = tuple(stored(list(cache.levels[index]), new))
    return found

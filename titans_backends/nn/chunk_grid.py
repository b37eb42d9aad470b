"""Means over chunks, and one value a chunk put on the chunk's first token; the grid restarts at every packed sequence.

Plain torch, differentiable, no atomics: the same bits twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_backends.nn.sequences import pad_tokens, sequence_of_token

__all__ = ["ChunkGrid"]


@dataclass(frozen=True, slots=True)
class ChunkGrid:
    """M chunks of up to `chunk_size` tokens. `lengths`, `opens` `[M]`: how many tokens; whether it is its sequence's first. `slot` `[T]`: packed only."""

    tokens: int
    chunk_size: int
    lengths: Tensor
    opens: Tensor
    slot: Tensor | None

    @staticmethod
    def of(tokens: int, chunk_size: int, cu_seqlens: Tensor | None, device: torch.device) -> ChunkGrid:
        """The grid of a call; a packed one waits for the device, which knows how many chunks there are."""
        if cu_seqlens is None:
            starts = torch.arange(0, tokens, chunk_size, device=device)
            return ChunkGrid(tokens, chunk_size, (tokens - starts).clamp_max(chunk_size), starts == 0, None)
        cu_seqlens = cu_seqlens.to(device, torch.int64)
        each = (cu_seqlens.diff() + chunk_size - 1) // chunk_size
        ends = each.cumsum(0)
        sequence = sequence_of_token(cu_seqlens, tokens, device)
        position = torch.arange(tokens, device=device) - cu_seqlens[sequence]
        slot = ((ends - each)[sequence] + position // chunk_size) * chunk_size + position % chunk_size
        chunks = int(ends[-1]) if len(ends) else 0
        held = torch.zeros(chunks * chunk_size, dtype=torch.int64, device=device).index_fill(0, slot, 1)
        opens = torch.zeros(chunks, dtype=torch.bool, device=device).index_fill(0, (ends - each)[each > 0], True)
        return ChunkGrid(tokens, chunk_size, held.unflatten(0, (chunks, chunk_size)).sum(1), opens, slot)

    def mean(self, x: Tensor) -> Tensor:
        """x `[B, T, ...]` as the mean of each chunk, `[B, M, ...]`."""
        chunks = len(self.lengths)
        if self.slot is None:
            held = pad_tokens(x, chunks * self.chunk_size)
        else:
            held = x.new_zeros(x.shape[0], chunks * self.chunk_size, *x.shape[2:]).index_copy(1, self.slot, x)
        lengths = self.lengths.to(x.dtype).reshape(-1, *(1,) * (x.dim() - 2))
        return held.reshape(x.shape[0], chunks, self.chunk_size, *x.shape[2:]).sum(2) / lengths

    def from_the_chunk_before(self, x: Tensor) -> Tensor:
        """x `[B, M, H]` as `[B, T, H]`: each chunk's first token has the chunk before's value, all others, and a sequence's first, zero."""
        before = F.pad(x, (0, 0, 1, 0))[:, :-1].masked_fill(self.opens[:, None], 0.0)
        spread = torch.cat([before[:, :, None], x.new_zeros(x.shape[0], x.shape[1], self.chunk_size - 1, x.shape[2])], 2).flatten(1, 2)
        return spread[:, : self.tokens] if self.slot is None else spread[:, self.slot]

"""Means over chunks, and one value a chunk put on the chunk's first token; the grid restarts at every packed sequence.

Plain torch, differentiable, no atomics: the same bits twice. A dense grid is known on the host; a packed one waits for the device once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_backends.nn.sequences import sequence_of_token

__all__ = ["ChunkGrid"]


@dataclass(frozen=True, slots=True)
class ChunkGrid:
    """Chunks of up to `chunk_size` of `tokens` tokens; `packing` None: one sequence a row."""

    tokens: int
    chunk_size: int
    packing: _PackedGrid | None

    @staticmethod
    def of(tokens: int, chunk_size: int, cu_seqlens: Tensor | None, device: torch.device) -> ChunkGrid:
        """The grid of a call; a packed one waits for the device, which knows how many chunks there are."""
        return ChunkGrid(tokens, chunk_size, None if cu_seqlens is None else _PackedGrid.of(tokens, chunk_size, cu_seqlens.to(device, torch.int64)))

    @property
    def count(self) -> int:
        """M."""
        return -(-self.tokens // self.chunk_size) if self.packing is None else len(self.packing.lengths)

    def mean(self, x: Tensor) -> Tensor:
        """x `[B, T, ...]` as the mean of each chunk, `[B, M, ...]`."""
        if self.packing is not None:
            return self.packing.mean(x)
        whole = self.tokens - self.tokens % self.chunk_size
        means = x[:, :whole].unflatten(1, (whole // self.chunk_size, self.chunk_size)).mean(2)
        return means if whole == self.tokens else torch.cat([means, x[:, whole:].mean(1, keepdim=True)], 1)

    def from_the_chunk_before(self, x: Tensor) -> Tensor:
        """x `[B, M, H]` as `[B, T, H]`: each chunk's first token has the chunk before's value, all others, and a sequence's first, zero."""
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return self.on_first_tokens(before if self.packing is None else before.masked_fill(self.packing.opens[:, None], 0.0))

    def on_first_tokens(self, x: Tensor) -> Tensor:
        """x `[B, M, H]` as `[B, T, H]`: each chunk's first token has its value, all others zero."""
        spread = F.pad(x[:, :, None], (0, 0, 0, self.chunk_size - 1)).flatten(1, 2)
        return spread[:, : self.tokens] if self.packing is None else spread[:, self.packing.slot]


@dataclass(frozen=True, slots=True)
class _PackedGrid:
    """M chunks. `lengths`, `opens` `[M]`: how many tokens; whether it is its sequence's first. `slot` `[T]`: a token's place, `chunk_size` places a chunk."""

    chunk_size: int
    lengths: Tensor
    opens: Tensor
    slot: Tensor

    @staticmethod
    def of(tokens: int, chunk_size: int, cu_seqlens: Tensor) -> _PackedGrid:
        device = cu_seqlens.device
        each = (cu_seqlens.diff() + chunk_size - 1) // chunk_size
        ends = each.cumsum(0)
        sequence = sequence_of_token(cu_seqlens, tokens, device)
        position = torch.arange(tokens, device=device) - cu_seqlens[sequence]
        slot = ((ends - each)[sequence] + position // chunk_size) * chunk_size + position % chunk_size
        chunks = int(ends[-1]) if len(ends) else 0
        held = torch.zeros(chunks * chunk_size, dtype=torch.int64, device=device).index_fill(0, slot, 1)
        opens = torch.zeros(chunks, dtype=torch.bool, device=device).index_fill(0, (ends - each)[each > 0], True)
        return _PackedGrid(chunk_size, held.unflatten(0, (chunks, chunk_size)).sum(1), opens, slot)

    def mean(self, x: Tensor) -> Tensor:
        """As the grid's."""
        chunks = len(self.lengths)
        held = x.new_zeros(x.shape[0], chunks * self.chunk_size, *x.shape[2:]).index_copy(1, self.slot, x)
        lengths = self.lengths.to(x.dtype).reshape(-1, *(1,) * (x.dim() - 2))
        return held.reshape(x.shape[0], chunks, self.chunk_size, *x.shape[2:]).sum(2) / lengths

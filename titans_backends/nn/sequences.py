"""Which tokens form a sequence: the padding mask as packed sequences, and the original's own padding and chunk rule.

Nothing here computes with the tokens' values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OriginalGroup", "Packing", "original_chunk_size", "original_groups", "original_length", "pad_tokens", "sequence_of_token"]


def sequence_of_token(cu_seqlens: Tensor, tokens: int, device: torch.device) -> Tensor:
    """`[T]`: the packed sequence of each token."""
    ends = cu_seqlens[1:].to(device)
    return torch.searchsorted(ends, torch.arange(tokens, dtype=ends.dtype, device=device), right=True)


def pad_tokens(x: Tensor, tokens: int) -> Tensor:
    """x `[B, T, ...]` with zeros behind it, up to `tokens` tokens."""
    missing = tokens - x.shape[1]
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else x


@dataclass(frozen=True, slots=True)
class Packing:
    """The tokens that a mask keeps. `kept`: their places in `[B * T]`; `shape`: B and T; a row of the batch is a packed sequence."""

    kept: Tensor
    cu_seqlens: Tensor
    shape: tuple[int, int]

    @staticmethod
    def of(mask: Tensor) -> Packing:
        """From a mask `[B, T]`, non-zero where a token counts; wherever the padding stands. Waits for the device, which knows how many there are."""
        keep = mask != 0
        return Packing(keep.flatten().nonzero().flatten(), F.pad(keep.sum(1).cumsum(0), (1, 0)).to(torch.int32), (mask.shape[0], mask.shape[1]))

    def pack(self, x: Tensor) -> Tensor:
        """`[B, T, D]` as `[1, kept, D]`."""
        return x.flatten(0, 1)[self.kept][None]

    def unpack(self, packed: Tensor) -> Tensor:
        """`[1, kept, D]` in `[B, T, D]`, zero where the mask is."""
        batch, tokens = self.shape
        return packed.new_zeros(batch * tokens, packed.shape[2]).index_copy(0, self.kept, packed[0]).reshape(batch, tokens, packed.shape[2])


def original_length(tokens: int) -> int:
    """The length that the original layer hands to its op: from 64 tokens on, the next multiple of 32."""
    return tokens if tokens < 64 else -(-tokens // 32) * 32


def original_chunk_size(length: int, chunk_size: int) -> int:
    """The original op's chunk for a length: all of it, where it is no multiple, or 32 at most. Where chunk_size is longer, that: it computes the same."""
    whole = length > chunk_size and (length <= 32 or length % chunk_size != 0)
    return length if whole else chunk_size


@dataclass(frozen=True, slots=True)
class OriginalGroup:
    """Packed sequences that one call serves. `source`: their tokens; `place`: where these stand once each sequence has its padding."""

    members: list[int]
    source: Tensor
    place: Tensor
    cu_seqlens: Tensor
    tokens: int
    chunk_size: int

    def gather(self, x: Tensor) -> Tensor:
        """`[1, T, D]` as the group's `[1, tokens, D]`, zero where the original pads."""
        return x.new_zeros(1, self.tokens, x.shape[2]).index_copy(1, self.place, x[:, self.source])


def original_groups(cu_seqlens: Tensor, chunk_size: int, tokens: int, device: torch.device) -> Iterator[OriginalGroup]:
    """At most two: sequences on a grid of chunk_size, and longer ones that are a single chunk, whatever their length. Waits for the device.

    ValueError where cu_seqlens does not go from 0 to `tokens` without a step back.
    """
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != tokens or any(stop < start for start, stop in pairwise(ends)):
        raise ValueError(
            f"TitansDualCore: cu_seqlens must begin with 0, never decrease and end with T = {tokens}, got {ends[:8]}{'...' if len(ends) > 8 else ''}"
        )
    lengths = [stop - start for start, stop in pairwise(ends)]
    padded = [original_length(length) for length in lengths]
    chunks = [original_chunk_size(length, chunk_size) for length in padded]
    for single in (False, True):
        members = [i for i, chunk in enumerate(chunks) if (chunk != chunk_size) == single]
        if not members:
            continue
        starts = torch.tensor([0, *(padded[i] for i in members)]).cumsum(0)
        source = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in members])
        place = torch.cat([int(start) + torch.arange(lengths[i]) for i, start in zip(members, starts, strict=False)])
        yield OriginalGroup(
            members,
            source.to(device),
            place.to(device),
            starts.to(device, torch.int32),
            int(starts[-1]),
            max(chunks[i] for i in members),
        )

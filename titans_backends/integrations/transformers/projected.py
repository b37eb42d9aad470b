"""What a gated delta layer's projections give, whichever form it has, and where one sequence ends and the next begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Projected", "boundaries"]


@dataclass(frozen=True, slots=True)
class Projected:
    """q, k `[B, T, G, K]`, v, z `[B, T, H, V]`, b, a `[B, T, H]` or `[B, T, G, H / G]`; `mixed`: q, k and v side by side `[B, T, D]`, where they lie so."""

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    b: Tensor
    a: Tensor
    mixed: Tensor | None = None

    def channels(self, start: int = 0) -> Tensor:
        """The convolution's inputs from a token on, `[B, D, T - start]`, as the cache stores them."""
        if self.mixed is not None:
            return self.mixed[:, start:].transpose(1, 2)
        return torch.cat([x[:, start:].flatten(2) for x in (self.q, self.k, self.v)], -1).transpose(1, 2)


def boundaries(kwargs: Mapping[str, object]) -> Tensor | None:
    """cu_seqlens of a packed batch, as transformers' collators name it.

    ValueError for `seq_idx` alone: the original would keep the convolution's sequences apart by it, and let the memory run from one into the next.
    """
    ends = kwargs.get("cu_seq_lens_q")
    if isinstance(ends, Tensor):
        return ends
    if ends is not None:
        raise TypeError(f"a swapped gated delta layer: cu_seq_lens_q must be a torch.Tensor or None, got {type(ends).__name__}")
    if kwargs.get("seq_idx") is not None:
        raise ValueError(
            "a swapped gated delta layer: seq_idx says which sequence a token belongs to, but cu_seq_lens_q, by which the memory is kept apart, is missing; "
            "pass both (DataCollatorWithFlattening: return_flash_attn_kwargs=True), or neither"
        )
    return None

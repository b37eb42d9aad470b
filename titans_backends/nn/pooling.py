"""One vector for a sequence from its tokens' states: their mean or maximum, the first or the last.

Sequences are rows, or packed along T; an empty one has a vector of zeros. No atomics: the same bits twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["POOLINGS", "pooled"]

POOLINGS = ("mean", "first", "last", "max")


def pooled(x: Tensor, pooling: str, cu_seqlens: Tensor | None) -> Tensor:
    """x `[B, T, D]` as `[B, D]`; with `cu_seqlens` `[N + 1]`, x `[1, T, D]` as `[N, D]`."""
    if cu_seqlens is not None:
        return _packed(x[0], pooling, cu_seqlens.to(x.device, torch.int64))
    if not x.shape[1]:
        return x.new_zeros(x.shape[0], x.shape[2])
    if pooling == "mean":
        return x.mean(1)
    if pooling == "max":
        return x.amax(1)
    return x[:, 0 if pooling == "first" else -1]


def _packed(x: Tensor, pooling: str, cu_seqlens: Tensor) -> Tensor:
    lengths = cu_seqlens.diff()
    if not len(x) or not len(lengths):
        return x.new_zeros(len(lengths), x.shape[1])
    if pooling in ("first", "last"):
        at = cu_seqlens[:-1] if pooling == "first" else cu_seqlens[1:] - 1
        found = x[at.clamp(0, len(x) - 1)]
    else:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        found = torch.segment_reduce(wide, pooling, offsets=cu_seqlens, axis=0, unsafe=True).to(x.dtype)
    return found.masked_fill((lengths == 0)[:, None], 0)

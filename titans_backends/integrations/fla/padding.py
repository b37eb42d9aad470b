"""Padded batches as FLA's layers take them: the tokens that a mask keeps, packed into one row, and put back where they stood.

A mask that keeps everything packs nothing, and the batch stays as it is. Whether it does is asked of the device once for each mask, not once a layer.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Packing", "packing_of"]


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the kept tokens stand in the flattened batch, `[tokens]`, and where each row begins among them, `[B + 1]`."""

    indices: Tensor
    cu_seqlens: Tensor

    def pack(self, x: Tensor) -> Tensor:
        """`[B, T, D]` as `[1, tokens, D]`."""
        return x.flatten(0, 1).index_select(0, self.indices)[None]

    def unpack(self, x: Tensor, batch: int, length: int) -> Tensor:
        """`[1, tokens, D]` as `[B, T, D]`, zeros where nothing was kept."""
        rows = x.new_zeros(batch * length, x.shape[-1]).index_copy(0, self.indices, x[0])
        return rows.view(batch, length, x.shape[-1])


_LATEST: tuple[weakref.ref[Tensor], int, int, Packing | None] | None = None


def packing_of(layer: str, mask: Tensor | None, batch: int, length: int) -> Packing | None:
    """The packing of the last `length` columns of a mask `[batch, >= length]`, ones or True to keep; None where they keep everything, or there is no mask."""
    global _LATEST
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
        raise ValueError(
            f"{layer}: attention_mask has shape {tuple(mask.shape)}; it must be [batch, tokens], 0 where a token is padding, with {batch} rows and at least "
            f"{length} tokens"
        )
    if torch.compiler.is_compiling() or mask.is_inference():  # neither has a version that says whether it was written to
        return _packing(mask, length)
    latest = _LATEST
    if latest is not None and latest[0]() is mask and latest[1:3] == (mask._version, length):
        return latest[3]
    found = _packing(mask, length)
    _LATEST = (weakref.ref(mask), mask._version, length, found)
    return found


def _packing(mask: Tensor, length: int) -> Packing | None:
    kept = mask[:, mask.shape[1] - length :] != 0
    if bool(kept.all()):
        return None
    ends = kept.sum(-1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Packing(kept.flatten().nonzero().flatten(), torch.nn.functional.pad(ends, (1, 0)))

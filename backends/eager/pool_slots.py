"""The rows of a pool that a decode call selects, of any number of tensors with one slot each; nothing here waits for the device (SPEC.md 9).

A skipped row (index -1) stands in for slot 0 on reading, and on writing repeats what a selected row writes, so that every index names a slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PoolSlots"]


class PoolSlots:
    """`indices` `[B]` into pools of at least one slot."""

    def __init__(self, indices: Tensor, device: torch.device) -> None:
        indices = indices.to(device=device, dtype=torch.int64)
        self.used = indices >= 0
        self._read = indices.clamp_min(0)
        self._donor = (self.used.to(torch.int8).argmax() if indices.numel() else self._read.new_zeros(())).view(1)

    def where_used(self, x: Tensor) -> Tensor:
        """`x [B, ...]` with zeros in the skipped rows."""
        return x.where(self._mask(x), 0.0)

    def take(self, pool: Tensor) -> Tensor:
        """The selected slots of a pool `[P, ...]`, a copy `[B, ...]`; zeros in the skipped rows, whatever slot 0 holds."""
        return self.where_used(pool.index_select(0, self._read))

    def put(self, pool: Tensor, rows: Tensor) -> None:
        """Writes the selected rows into `pool`; where none is selected, slot 0 is written with what it holds."""
        if not rows.shape[0]:
            return
        mask = self._mask(rows)
        rows = rows.where(mask, pool.index_select(0, self._read).to(rows.dtype))
        index = self._read.where(self.used, self._read.index_select(0, self._donor))
        pool.index_copy_(0, index, rows.where(mask, rows.index_select(0, self._donor)).to(pool.dtype))

    def _mask(self, x: Tensor) -> Tensor:
        return self.used.view(-1, *[1] * (x.dim() - 1))

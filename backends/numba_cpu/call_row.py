"""How a call reaches a kernel: one row of int64. First what changes from call to call (the addresses), then sizes, options and strides.

A kernel so takes one array whatever the op is, and one compilation serves every call. What does not change between calls of the same facts is
laid out once (`Prepared`); a call then writes its addresses. No tensor is copied: strides are read, a missing tensor has the address 0.
A small scratch for one worker stands behind the row itself, so that a call of few microseconds allocates nothing for it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["ADDRESSES", "FIELDS", "LENGTH", "STRIDES", "TENSORS", "Prepared", "contiguous_strides"]

_LAUNCH = ("workers", "scratch", "bounds")
_SIZES = (
    "sequences", "tokens", "heads", "group", "keys", "values", "chunk", "offset", "rows", "parts", "segments", "items", "scratch_size",
    "scale", "alpha", "l2norm", "delta", "transform", "normalize_read", "normalize_final", "reset", "accumulate", "mixing",
)  # fmt: skip
_TENSORS = ("q", "k", "v", "beta", "g", "gate", "mix", "chunk_decay", "w", "start", "final", "o", "u_out", "w_out")

ADDRESSES = len(_LAUNCH)
"""Where the tensors' addresses begin, in the order of `TENSORS`."""

STRIDES = ADDRESSES + len(_TENSORS) + len(_SIZES)
"""Where the tensors' strides begin, four in elements each: batch, token, head, element (a state: batch, head, key, value)."""

FIELDS: Mapping[str, int] = {name: slot for slot, name in enumerate(_LAUNCH)} | {
    name: ADDRESSES + len(_TENSORS) + index for index, name in enumerate(_SIZES)
}
"""Where a size or an option stands; `scale` and `alpha` hold the bits of a float64, `scratch` and `bounds` an address or 0."""

TENSORS: Mapping[str, int] = {name: STRIDES + 4 * index for index, name in enumerate(_TENSORS)}
"""Where a tensor's strides stand; its address is in the slot `ADDRESSES + (that - STRIDES) // 4`."""

LENGTH = STRIDES + 4 * len(_TENSORS)
"""Slots of a row; a small scratch follows."""

_SLOT = {name: ADDRESSES + index for index, name in enumerate(_TENSORS)}
_HEAD = struct.Struct(f"={ADDRESSES + len(_TENSORS)}q")
_ALIGNED = 16
_LARGEST_BEHIND = 4096


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Four strides: `[B, T, H, D]` and `[N, H, K, V]` as they are, `[B, T, H]` with a 0 behind, `[H]` and 0-d with zeros before."""
    given = tensor.stride()
    if len(given) == 1:
        return (0, 0, given[0], 0)
    return (*given, 0, 0, 0, 0)[:4]


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a fresh tensor with four axes."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(4))


class Prepared:
    """One kernel's row for calls of the same facts.

    `given` maps the row's tensors to the call's fields, `made` the outputs to their strides. `floats` is the scratch of one worker, `most` how many
    workers a call may have.
    """

    def __init__(
        self,
        call: object,
        given: Mapping[str, str],
        made: Mapping[str, Sequence[int]],
        floats: int,
        options: Mapping[str, int | float],
        most: int,
    ) -> None:
        floats = -(-floats // _ALIGNED) * _ALIGNED + _ALIGNED
        behind = most == 1 and floats <= _LARGEST_BEHIND
        self._floats = 0 if behind else floats
        self._row = np.zeros(LENGTH + (floats // 2 if behind else 0), dtype=np.int64)
        for name, value in {**options, "scratch_size": floats}.items():
            whole = name not in ("scale", "alpha")
            (self._row if whole else self._row.view(np.float64))[FIELDS[name]] = int(value) if whole else value
        self._given = [(name, field) for name, field in given.items() if isinstance(getattr(call, field), Tensor)]
        for name, field in self._given:
            self._row[TENSORS[name] : TENSORS[name] + 4] = _strides(getattr(call, field))
        for name, strides in made.items():
            self._row[TENSORS[name] : TENSORS[name] + 4] = strides
        self._given = [(_SLOT[name], field) for name, field in self._given]
        self._head = [0] * (ADDRESSES + len(_TENSORS))

    def row(self, call: object, outputs: Mapping[str, Tensor | None], bounds: Tensor | None, workers: int) -> tuple[np.ndarray, Tensor | None]:
        """The row of one call, and the scratch that must outlive the kernel."""
        head, scratch = self._head.copy(), None
        head[0] = workers
        if self._floats:
            scratch = torch.empty(self._floats * workers, dtype=torch.float32, device="cpu")
            head[1] = scratch.data_ptr()
        if bounds is not None:
            head[2] = bounds.data_ptr()
        for slot, field in self._given:
            head[slot] = getattr(call, field).data_ptr()
        for name, tensor in outputs.items():
            if tensor is not None:
                head[_SLOT[name]] = tensor.data_ptr()
        row = self._row.copy()
        _HEAD.pack_into(row, 0, *head)
        return row, scratch

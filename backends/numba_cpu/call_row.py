"""How a call reaches a kernel: one row of int64, a slot for each size and option, and five for each tensor (its address and four strides).

A kernel so takes one array whatever the op is, and one compilation serves every call. What does not change between calls of the same facts is
laid out once (`Prepared`); a call then writes addresses. No tensor is copied: strides are read, a missing tensor has the address 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

__all__ = ["FIELDS", "TENSORS", "Prepared"]

_SIZES = (
    "sequences", "tokens", "heads", "group", "keys", "values", "chunk", "offset", "rows", "parts", "segments", "items", "workers", "scratch", "scratch_size",
    "scale", "alpha", "bounds", "l2norm", "delta", "transform", "normalize_read", "normalize_final", "reset", "accumulate", "mixing",
)  # fmt: skip
FIELDS: Mapping[str, int] = dict(zip(_SIZES, count()))  # noqa: B905  (count has no end)
"""Where a size or an option stands; `scale` and `alpha` hold the bits of a float64, `scratch` and `bounds` an address."""

_TENSORS = ("q", "k", "v", "beta", "g", "gate", "mix", "chunk_decay", "w", "start", "final", "o", "u_out", "w_out")
TENSORS: Mapping[str, int] = {name: len(_SIZES) + 5 * index for index, name in enumerate(_TENSORS)}
"""Where a tensor's address stands; its strides, in elements, follow: batch, token, head, element (a state: batch, head, key, value)."""

_LENGTH = len(_SIZES) + 5 * len(_TENSORS)
_ALIGNED = 16


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Four strides: `[B, T, H, D]` and `[N, H, K, V]` as they are, `[B, T, H]` with a 0 behind, `[H]` and 0-d with zeros before."""
    given = tensor.stride()
    if len(given) == 1:
        return (0, 0, given[0], 0)
    return (*given, 0, 0, 0, 0)[:4]


class Prepared:
    """One kernel's row for calls of the same facts.

    `given` maps tensor slots to the call's fields; `made` maps them to the outputs' strides, by name. `floats` is the scratch of one worker.
    """

    def __init__(
        self, call: object, given: Mapping[str, str], made: Mapping[str, Sequence[int]], floats: int, options: Mapping[str, int | float]
    ) -> None:
        row = [0] * _LENGTH
        for name, value in options.items():
            row[FIELDS[name]] = int(value)
        row[FIELDS["scratch_size"]] = self._floats = -(-floats // _ALIGNED) * _ALIGNED + _ALIGNED
        self._given = []
        for name, field in given.items():
            tensor = getattr(call, field)
            if isinstance(tensor, Tensor):
                slot = TENSORS[name]
                row[slot + 1 : slot + 5] = _strides(tensor)
                self._given.append((slot, field))
        for name, strides in made.items():
            row[TENSORS[name] + 1 : TENSORS[name] + 5] = strides
        self._row = np.array(row, dtype=np.int64)
        numbers = self._row.view(np.float64)
        for name in ("scale", "alpha"):
            if name in options:
                numbers[FIELDS[name]] = options[name]

    def row(self, call: object, outputs: Mapping[str, Tensor | None], bounds: Tensor | None, workers: int) -> tuple[np.ndarray, Tensor]:
        """The row of one call, and the scratch that must outlive the kernel."""
        scratch = torch.empty(workers * self._floats, dtype=torch.float32, device="cpu")
        row = self._row.copy()
        row[_WORKERS], row[_SCRATCH] = workers, scratch.data_ptr()
        if bounds is not None:
            row[_BOUNDS] = bounds.data_ptr()
        for slot, field in self._given:
            row[slot] = getattr(call, field).data_ptr()
        for name, tensor in outputs.items():
            if tensor is not None:
                row[TENSORS[name]] = tensor.data_ptr()
        return row, scratch


_WORKERS, _SCRATCH, _BOUNDS = FIELDS["workers"], FIELDS["scratch"], FIELDS["bounds"]


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a fresh tensor with four axes."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(4))

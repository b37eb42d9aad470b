"""The work that a call cannot avoid, and so its floor: FLOP by the contract's formula, every input read and output written once."""

from __future__ import annotations

import math
from collections.abc import Mapping

from titans_backends.contracts.contract import Call, Contract, Work, state_dtype

__all__ = ["work_of"]


def work_of(contract: Contract, call: Call, dims: Mapping[str, int]) -> Work:
    """A validated call's work. A stride-0 view counts at its full size; a pool of states counts only the selected rows."""
    flop, extra = contract.work(dims, call)
    tensors = contract.tensors(call)
    moved = float(sum(t.numel() * t.element_size() for t in tensors.values()))
    for output, asked in zip(contract.outputs, contract.asked(call), strict=True):
        if asked:
            like = tensors[output.like or contract.operands[0]]
            dtype = like.dtype if output.like else state_dtype(like.dtype)
            moved += math.prod(dims[letter] for letter in output.dims.split()) * dtype.itemsize
    return Work(flop, moved + extra)

"""Whether a bound op's call has the facts that it was bound to, decided by one call into torch where torch can.

Dynamo's own guard compares type, dispatch keys (device, lazy negation, what is switched on for this thread), dtype, needs of gradient, sizes and
strides of all tensors at once. It is no public name of torch, so its absence costs time and nothing else: what is not known to be the same is
compared fact by fact by who asks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["never", "same_as"]

_ALIGNMENT = 16
Values = tuple[object, ...]


def same_as(values: Values) -> Callable[[Values], bool]:
    """What says of later values, in the same places, that they surely have these facts and needs of gradient. False: they may not."""
    at = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
    absent = [place for place, value in enumerate(values) if value is None]
    tensors = [cast(Tensor, values[place]) for place in at]
    check = _guard(tensors)
    if check is None or len(at) + len(absent) < len(values) or len(at) < 2:
        return never
    taken = cast(Callable[[Values], tuple[Tensor, ...]], operator.itemgetter(*at))
    offsets = [tensor.data_ptr() % _ALIGNMENT for tensor in tensors]

    def same(later: Values) -> bool:
        for place in absent:
            if later[place] is not None:
                return False
        if forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack():
            return False  # a dual tensor looks like any other, and so does one that is traced
        for place in at:
            value = later[place]
            if not isinstance(value, Tensor) or value.is_nested:  # torch's guard ends the process at nested ones
                return False
        given = taken(later)
        return check(*given) and [tensor.data_ptr() & (_ALIGNMENT - 1) for tensor in given] == offsets

    return same


def never(later: Values) -> bool:
    """Nothing is known to be the same."""
    return False


def _guard(tensors: list[Tensor]) -> Callable[..., bool] | None:
    """torch's guard for these tensors, or None where this torch has none of that kind."""
    try:
        from torch._C._dynamo.guards import TensorGuards
    except ImportError:
        return None
    try:
        return cast(Callable[..., bool], TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check)
    except TypeError:  # another torch's arguments
        return None

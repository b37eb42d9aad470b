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
_PLAIN = frozenset([Tensor, torch.nn.Parameter])
_ADDRESS = Tensor.data_ptr
Values = tuple[object, ...]


def same_as(values: Values) -> Callable[[Values], bool]:
    """What says of later values, in the same places, that they surely have these facts and needs of gradient. False: they may not.

    Of a tensor its facts count, of anything else its type and what it equals (1 is not True).
    """
    at = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
    others = [place for place, value in enumerate(values) if not isinstance(value, Tensor)]
    tensors = [cast(Tensor, values[place]) for place in at]
    if len(at) < 2:
        return never
    check = _guard(tensors)
    if check is None:
        return never
    taken, rest = cast(Callable[[Values], tuple[Tensor, ...]], _picking(at)), _picking(others)
    numbers = rest(values)
    kinds = tuple(map(type, numbers))
    offsets = [tensor.data_ptr() % _ALIGNMENT for tensor in tensors]

    def same(later: Values) -> bool:
        found = rest(later)
        if tuple(map(type, found)) != kinds or found != numbers:  # types first: what equals a tensor is a tensor
            return False
        if forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack():
            return False  # a dual tensor looks like any other, and so does one that is traced
        given = taken(later)
        for value in given:
            if value.__class__ not in _PLAIN or value.is_nested:  # torch's guard ends the process at nested ones
                return False
        return check(*given) and [address & (_ALIGNMENT - 1) for address in map(_ADDRESS, given)] == offsets

    return same


def _picking(places: list[int]) -> Callable[[Values], Values]:
    """What takes the values at some places, as a tuple also where there is one or none."""
    if len(places) > 1:
        return cast(Callable[[Values], Values], operator.itemgetter(*places))
    return lambda values: tuple(values[place] for place in places)


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

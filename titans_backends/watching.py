"""Whether torch's dispatcher must see a call: someone traces, transforms or intercepts it, or a tensor is not what its memory says."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["watched"]

_OTHERS = (type(None), float, int, bool, str)


def watched(values: Iterable[object]) -> bool:
    """Whether one of these holds.

    A dispatch mode, a functorch transform, `torch.jit.trace`, forward-mode differentiation, a tensor subclass, or a lazily negated view (of a
    conjugated tensor's imaginary part, say).
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return True
    if forward_ad._current_level >= 0:
        return True
    for value in values:  # a loop costs a third of any(), and this is in every call
        kind = value.__class__
        if kind is Tensor or kind is torch.nn.Parameter:
            if value.is_neg():  # type: ignore[attr-defined]
                return True
        elif kind not in _OTHERS and isinstance(value, Tensor):
            return True
    return False

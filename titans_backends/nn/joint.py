"""Several projections of one input as one product, while every parameter stays its own.

The weights stand one behind another in one storage, so that in inference the product reads them where they are: there is no copy that could grow old,
and an in-place update is seen by a captured graph too. In training, under a compiler, and wherever somebody moved a weight away, they are
concatenated at each call; where a projection is no plain Linear any more (an adapter, a hook), each is called by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["joint_projection", "stand_together"]

_ROWS = 8
"""The product's width is rounded up to so many, where the storage allows: rows of 16 bytes in 16 bits."""

_is_compiling = torch.compiler.is_compiling
_transformed = torch._C._are_functorch_transforms_active


def stand_together(projections: list[nn.Linear]) -> None:
    """Moves the weights into one storage, each a view of it, with zeros behind the last; their values and identities stay.

    Does nothing where they stand so already, or cannot: on meta, sharded, of two dtypes or devices.
    """
    weights: list[Tensor] = [projection.weight for projection in projections]
    first = weights[0]
    movable = all(type(w.data) is Tensor and w.dtype == first.dtype and w.device == first.device and not w.is_inference() for w in weights)
    if not movable or first.is_meta or _standing(weights) is not None:
        return
    with torch.no_grad():
        rows = sum(len(w) for w in weights)
        joint = torch.zeros(_rounded(rows), first.shape[1], dtype=first.dtype, device=first.device)
        for weight, part in zip(weights, joint[:rows].split([len(w) for w in weights]), strict=True):
            part.copy_(weight)
            weight.data = part


def joint_projection(x: Tensor, projections: list[nn.Linear]) -> Tensor:
    """The projections' products without their biases, side by side: `[..., at least their widths' sum]`."""
    for projection in projections:  # an adapter, a parametrization or a hook must have its say
        if type(projection) is not nn.Linear or projection._forward_hooks or projection._forward_pre_hooks or "forward" in projection.__dict__:
            return torch.cat([each(x) if each.bias is None else each(x) - each.bias for each in projections], -1)
    if _is_compiling():
        return F.linear(x, torch.cat([projection.weight for projection in projections]))
    weights: list[Tensor] = [projection._parameters["weight"] for projection in projections]  # type: ignore[misc]  # a Linear has one
    if not (torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)):
        standing = _standing(weights)
        if standing is not None:
            return F.linear(x, standing)
    return F.linear(x, torch.cat(weights))


def _rounded(rows: int) -> int:
    return -(-rows // _ROWS) * _ROWS


def _standing(weights: list[Tensor]) -> Tensor | None:
    """The weights as one tensor, where each begins where the one before ends; None otherwise."""
    if _transformed():  # a tensor of functorch's has no address
        return None
    first = weights[0]
    if type(first) is not nn.Parameter:
        return None
    at = start = first.data_ptr()
    dtype, columns, size = first.dtype, first.shape[1], first.element_size()
    for weight in weights:
        if type(weight) is not nn.Parameter or weight.data_ptr() != at or weight.dtype is not dtype:
            return None
        at += weight.numel() * size
    held = first.untyped_storage().nbytes() // size - first.storage_offset()
    rows = (at - start) // (columns * size)
    if not start or held < rows * columns or not first.is_contiguous():
        return None
    return first.as_strided((min(_rounded(rows), held // columns), columns), (columns, 1))

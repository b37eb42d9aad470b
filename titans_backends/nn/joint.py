"""Several projections of one input as one product, while every parameter stays its own.

The weights stand one behind another in memory, each in a storage of its own, as whatever saves and shares tensors wants them; so in inference the product
reads them where they are: there is no copy that could grow old, and an in-place update is seen by a captured graph too. In training, under a compiler or a
functorch transform, and wherever somebody moved a weight away, they are concatenated at each call; where a projection is no plain Linear any more (an
adapter, a hook, a weight of another class), each is called by itself.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Standing", "joint_projection", "takes"]

_ROWS = 8
"""The product's width is rounded up to so many, where the memory allows: rows of 16 bytes in 16 bits."""
_PLAIN = (nn.Parameter, Tensor)

_is_compiling = torch.compiler.is_compiling
_is_transformed = torch._C._are_functorch_transforms_active


class Standing:
    """The memory that projections' weights stand in, `[rows, columns]`; the next call lets it go where they have other memory by now, as after sharding.

    A copy and a file have none: what they make stands anew. Nothing refers to a parameter, not even weakly: torch could not swap it.
    """

    __slots__ = ("joint",)

    def __init__(self) -> None:
        self.joint: Tensor | None = None

    def __reduce__(self) -> tuple[type[Standing], tuple[()]]:
        return Standing, ()

    def move(self, projections: list[nn.Linear]) -> None:
        """Moves the weights in, zeros behind the last; their values and identities stay.

        Does nothing where they stand here already, or must not be moved: on meta, sharded, shared with other processes, views of a larger memory (an
        optimizer's or FSDP's flat one), of two dtypes or devices.
        """
        weights: list[Tensor] = [projection.weight for projection in projections]
        first = weights[0]
        alike = all(type(w.data) is Tensor and w.dtype == first.dtype and w.device == first.device and not w.is_inference() for w in weights)
        if not alike or first.is_meta or (first.is_cpu and any(w.is_shared() for w in weights)):
            self.joint = None
            return
        if self.of(weights) is not None:
            return
        if any(w.untyped_storage().nbytes() != w.nbytes for w in weights):
            self.joint = None
            return
        with torch.inference_mode(False), torch.no_grad():  # in inference mode the parameters would get memory that no later training could write
            rows, columns = sum(len(w) for w in weights), first.shape[1]
            self.joint = torch.zeros(_rounded(rows), columns, dtype=first.dtype, device=first.device)
            held, begin = self.joint.untyped_storage(), 0
            for weight in weights:
                end = begin + weight.numel() * weight.element_size()
                place = torch.empty(0, dtype=weight.dtype, device=weight.device).set_(held[begin:end], 0, weight.shape, (columns, 1))
                weight.data = place.copy_(weight)
                begin = end

    def recall(self, weight: Tensor | None) -> None:
        """Lets the memory go if this parameter, which stood in it, has other memory by now, or is of another class."""
        joint, kind = self.joint, type(weight)
        if joint is None or weight is None or kind is Tensor:  # no weight of its own, or one that stands in for a call
            return
        if kind is not nn.Parameter or not 0 <= weight.data_ptr() - joint.data_ptr() < joint.nbytes:
            self.joint = None

    def of(self, weights: list[Tensor]) -> Tensor | None:
        """The weights as one tensor, where they stand here one behind another; None otherwise."""
        joint = self.joint
        if joint is None:
            return None
        begin, dtype, (rows, columns), size = joint.data_ptr(), joint.dtype, joint.shape, joint.element_size()
        at = start = weights[0].data_ptr()
        for weight in weights:
            if weight.data_ptr() != at or weight.dtype is not dtype or not weight.is_contiguous():
                return None
            at += weight.numel() * size
        first, last = (start - begin) // (columns * size), (at - begin) // (columns * size)
        if not begin or first < 0 or last > rows:
            return None
        return joint.narrow(0, first, min(_rounded(last - first), rows - first))


def joint_projection(x: Tensor, projections: list[nn.Linear], standing: Standing) -> Tensor:
    """The projections' products without their biases, side by side: `[..., at least their widths' sum]`."""
    weights: list[Tensor] = []
    tracing = _is_compiling() or _is_transformed()
    for projection in projections:  # an adapter, a parametrization, a hook or a weight with a product of its own must have its say
        weight = projection._parameters.get("weight") if type(projection) is nn.Linear else None
        if type(weight) not in _PLAIN or _is_hooked(projection):
            if not tracing:
                standing.recall(weight)
            return torch.cat([_without_bias(each, x) for each in projections], -1)
        weights.append(weight)  # type: ignore[arg-type]  # no None: it is of a plain class
    if tracing:
        return F.linear(x, _concatenated(weights))
    if not (
        torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in weights))
    ):  # what a backward keeps must see changes
        found = standing.of(weights)
        if found is not None:
            return F.linear(x, found)
    standing.recall(weights[0])
    return F.linear(x, _concatenated(weights))


def takes(projection: nn.Module, x: Tensor) -> bool:
    """Whether the product can multiply x's dtype with the weight's, by autocast too; what has a product of its own is not asked."""
    weight = projection._parameters.get("weight") if type(projection) is nn.Linear else None
    if weight is None or x.dtype == weight.dtype or type(weight) not in _PLAIN or _is_hooked(projection):  # type: ignore[arg-type]
        return True
    return x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype) and torch.is_autocast_enabled(x.device.type)


def _without_bias(projection: nn.Module, x: Tensor) -> Tensor:
    """A projection of any class, without the bias that its caller adds."""
    bias, product = getattr(projection, "bias", None), projection(x)
    return cast(Tensor, product - bias if isinstance(bias, Tensor) else product)


def _concatenated(weights: list[Tensor]) -> Tensor:
    """One under another, and zeros up to a width that 16-bit products run well at."""
    rows = sum(weight.shape[0] for weight in weights)
    missing = _rounded(rows) - rows
    return torch.cat([*weights, weights[0].new_zeros(missing, weights[0].shape[1])] if missing else weights)


def _rounded(rows: int) -> int:
    return -(-rows // _ROWS) * _ROWS


def _is_hooked(projection: nn.Linear) -> bool:
    return bool(
        projection._forward_hooks
        or projection._forward_pre_hooks
        or projection._backward_hooks
        or projection._backward_pre_hooks
        or "forward" in projection.__dict__
    )

"""Many matrices behind one stride: what a kernel that walks `[..., rows, columns]` needs of a tensor. It copies only where no one stride says it."""

from __future__ import annotations

from torch import Tensor

from .grid import unit_stride

__all__ = ["flat"]


def flat(x: Tensor) -> tuple[Tensor, int]:
    """A tensor whose rows are contiguous and whose leading dimensions have one stride, with that stride."""
    x = unit_stride(x)
    stride, reach = 0, None
    for size, step in zip(reversed(x.shape[:-2]), reversed(x.stride()[:-2]), strict=True):
        if size == 1:
            continue
        if reach is None:
            stride = step  # 0 where it is expanded
        elif step != reach:
            x = x.contiguous()
            return x, x.shape[-2] * x.shape[-1]
        reach = step * size
    return x, stride

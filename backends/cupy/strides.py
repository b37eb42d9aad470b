"""What kernels ask of a tensor's memory: its last dimension contiguous, and rows that 16-byte loads may read."""

from __future__ import annotations

from torch import Tensor

__all__ = ["aligned_rows", "unit_stride"]


def unit_stride(x: Tensor) -> Tensor:
    """The tensor, or a copy where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def aligned_rows(x: Tensor, *, whole: bool = False) -> bool:
    """Whether every row, the last dimension's run, is contiguous and starts on a 16-byte boundary; `whole`: and ends on one. On "meta" addresses count as
    aligned."""
    size = x.element_size()
    if whole and x.shape[-1] * size % 16:
        return False
    if x.stride(-1) != 1 or (x.device.type != "meta" and x.data_ptr() % 16):
        return False
    return all(step * size % 16 == 0 for step, count in zip(x.stride()[:-1], x.shape[:-1], strict=True) if count > 1)

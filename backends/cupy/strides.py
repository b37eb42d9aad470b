"""What kernels ask of a tensor's memory: its last dimension contiguous, and rows that 16-byte loads may read."""

from __future__ import annotations

from torch import Tensor

from titans_backends.launching.rows import unit_stride

__all__ = ["aligned_rows", "flat", "unit_stride"]


def aligned_rows(x: Tensor, *, whole: bool = False) -> bool:
    """Whether every row, the last dimension's run, is contiguous and starts on a 16-byte boundary; `whole`: and ends on one. On "meta" addresses count as
    aligned."""
    size = x.element_size()
    if whole and x.shape[-1] * size % 16:
        return False
    if x.stride(-1) != 1 or (x.device.type != "meta" and x.data_ptr() % 16):
        return False
    return all(step * size % 16 == 0 for step, count in zip(x.stride()[:-1], x.shape[:-1], strict=True) if count > 1)


def flat(x: Tensor) -> tuple[Tensor, int]:
    """A tensor whose rows are contiguous and whose leading dimensions, all but the last two, have one stride, with that stride; a copy only where not."""
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

"""cu_seqlens where a kernel can read it: on the device of the call, whatever its integers are."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bounds_on"]


def bounds_on(cu_seqlens: Tensor | None, like: Tensor) -> Tensor | None:
    """`cu_seqlens`, contiguous, on the device of `like`. A copy from the host cannot be captured in a graph: RuntimeError says so."""
    if cu_seqlens is None:
        return None
    if cu_seqlens.device != like.device and like.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("cu_seqlens lies on the CPU, and a graph is being captured: move it to the device before the capture")
    return cu_seqlens.to(like.device).contiguous()

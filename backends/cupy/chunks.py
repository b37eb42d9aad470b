"""Chunks as the kernels take them: their tiles, their transforms by number, and their slots, as cuda/chunks.cuh finds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_backends.signature import Signature

from .serving import padded

__all__ = ["TRANSFORMS", "Slots", "side_of", "slots_of", "three_strides"]

TRANSFORMS = {"none": 0, "exact": 1, "lam": 2}
"""What the kernels call the transforms."""


@dataclass(frozen=True, slots=True)
class Slots:
    """`count` slots, `each` of a dense sequence; `sequences` with a state of their own."""

    cu_seqlens: Tensor | None
    count: int
    each: int
    sequences: int

    @property
    def wide(self) -> bool:
        """Whether `cu_seqlens` is int64."""
        return self.cu_seqlens is not None and self.cu_seqlens.dtype == torch.int64


def slots_of(like: Tensor, chunk_size: int, cu_seqlens: Tensor | None, offset: int = 0) -> Slots:
    """The slots of `like`, `[B, T, ...]`: at least one a sequence, packed an upper bound that needs no look at `cu_seqlens`.

    RuntimeError for `cu_seqlens` on the host while a graph is captured.
    """
    batch, tokens = like.shape[:2]
    if cu_seqlens is None:
        each = max(1, -(-(tokens + offset) // chunk_size))
        return Slots(None, batch * each, each, batch)
    sequences = cu_seqlens.numel() - 1
    if cu_seqlens.device != like.device and like.device.type != "meta":
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("cu_seqlens lies on the CPU, and a graph is being captured: move it to the device before the capture")
        cu_seqlens = cu_seqlens.to(like.device)
    return Slots(cu_seqlens.contiguous(), (tokens + sequences * offset) // chunk_size + sequences if sequences else 0, 1, sequences)


def side_of(signature: Signature) -> int:
    """Tokens of the tile that holds the longest chunk, a power of two: of a batch-invariant call, whatever its length."""
    chunk = signature.option("chunk_size")
    assert isinstance(chunk, int)
    return padded(chunk if signature.batch_invariant else min(chunk, max(signature.dim("T"), 1)))


def three_strides(x: Tensor | None) -> tuple[int, int, int]:
    """Batch, token and head strides; zeros for an absent tensor."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))

"""Where a program's tokens lie: slots of a fixed number of tokens, dense or packed, found on the device and never on the host.

Packed, sequence n owns the slots from `cu_seqlens[n] // unit + n` on: at least as many as it needs, never overlapping, and no prefix sum
is needed to say where they begin. A slot behind a sequence's end is empty.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_backends.launching.rows import unit_stride

__all__ = ["chunks_before", "find_sequence", "first_slot", "in_rows", "locate", "on_device", "slot_count", "strides", "unit_stride"]


def slot_count(batch: int, tokens: int, unit: int, cu_seqlens: Tensor | None, offset: int = 0) -> int:
    """How many slots a call has: ceil((offset + T) / unit) a sequence, or packed an upper bound that needs no look at `cu_seqlens`.

    `offset`: every sequence begins that many absent tokens earlier.
    """
    if cu_seqlens is None:
        return batch * -(-(tokens + offset) // unit) if tokens else 0
    sequences = cu_seqlens.numel() - 1
    return (tokens + sequences * offset) // unit + sequences


def on_device(cu_seqlens: Tensor | None, like: Tensor) -> Tensor | None:
    """`cu_seqlens` where the kernels can read it. A copy from the host cannot be captured in a graph: RuntimeError says so."""
    if cu_seqlens is None or cu_seqlens.device == like.device:
        return cu_seqlens if cu_seqlens is None else cu_seqlens.contiguous()
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("cu_seqlens lies on the CPU, and a graph is being captured: move it to the device before the capture")
    return cu_seqlens.to(like.device).contiguous()


def in_rows(x: Tensor) -> Tensor:
    """The tensor itself, or a copy: where its last dimension is not contiguous, and where only a copy has 16-bit rows that asynchronous copies take."""
    x = unit_stride(x)
    if x.dtype.itemsize != 2 or x.shape[-1] % 16 or not (x.data_ptr() & 15 or any(step & 15 for step in x.stride()[:-1])):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Batch, token and head strides; zeros for an absent tensor."""
    if x is None:
        return (0, 0, 0)
    found = x.stride()
    return (found[0], found[1], found[2])


@triton.jit
def first_slot(begin, sequence, offset, UNIT: tl.constexpr):
    """The first slot of a packed sequence."""
    return (begin + sequence * offset) // UNIT + sequence


@triton.jit
def find_sequence(cu_seqlens, slot, sequences, offset, UNIT: tl.constexpr):
    """The sequence that owns a packed slot: the last one whose first slot is not behind it, by bisection."""
    low = slot * 0
    high = low + sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = first_slot(tl.load(cu_seqlens + middle).to(tl.int32), middle, offset, UNIT) <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def locate(cu_seqlens, slot, tokens, sequences, offset, UNIT: tl.constexpr):
    """(batch row, sequence, index of the slot in it, first token of the slot, first token, end of the sequence); tokens count inside the row.

    With an offset the first slot begins before the first token. An empty slot begins at or behind the end.
    """
    if cu_seqlens is None:
        per_row = tl.cdiv(tokens + offset, UNIT)
        row = slot // per_row
        index = slot % per_row
        return row, row, index, index * UNIT - offset, slot * 0, tokens + slot * 0
    else:
        sequence = find_sequence(cu_seqlens, slot, sequences, offset, UNIT)
        begin = tl.load(cu_seqlens + sequence).to(tl.int32)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int32)
        index = slot - first_slot(begin, sequence, offset, UNIT)
        return slot * 0, sequence, index, begin - offset + index * UNIT, begin, end


@triton.jit
def chunks_before(cu_seqlens, sequence, CHUNK: tl.constexpr):
    """How many chunks the earlier packed sequences have."""
    count = sequence * 0
    for start in range(0, sequence, 128):
        n = start + tl.arange(0, 128)
        begin = tl.load(cu_seqlens + n, mask=n < sequence, other=0).to(tl.int32)
        end = tl.load(cu_seqlens + n + 1, mask=n < sequence, other=0).to(tl.int32)
        count += tl.sum((end - begin) // CHUNK + ((end - begin) % CHUNK > 0).to(tl.int32), 0)
    return count

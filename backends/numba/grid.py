"""Where a block's tokens lie: one slot for each chunk, dense or packed, found on the device and never on the host.

Packed, sequence n owns the slots from `(bounds[n] + n * offset) // chunk + n` on: at least as many as it has chunks, and none of another. So no prefix
sum is needed to say where they begin, and a slot behind a sequence's end is empty. `offset`: a sequence's grid begins that many tokens before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .target import device, int64

__all__ = ["Grid", "chunks_before", "locate", "sequence_span"]


class Grid:
    """The chunks of a call; `args` is what every kernel on the grid takes first: bounds, packed, tokens, chunk, offset."""

    def __init__(self, like: Tensor, chunk: int, cu_seqlens: Tensor | None, offset: int = 0) -> None:
        batch, tokens = like.shape[:2]
        self.chunk = max(1, min(chunk, tokens + offset))
        self.offset = offset
        self.bounds = like.new_zeros(1, dtype=torch.int32) if cu_seqlens is None else _on_device(cu_seqlens, like)
        self.sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        if cu_seqlens is None:
            self.slots = batch * -(-(tokens + offset) // self.chunk) if tokens else 0
        else:
            self.slots = (tokens + self.sequences * offset) // self.chunk + self.sequences if tokens else 0
        self.args = (self.bounds, int(cu_seqlens is not None), tokens, self.chunk, offset)


def _on_device(cu_seqlens: Tensor, like: Tensor) -> Tensor:
    if cu_seqlens.device != like.device and like.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("cu_seqlens lies on the CPU, and a graph is being captured: move it to the device before the capture")
    return cu_seqlens.to(like.device, torch.int32)


@device
def sequence_span(bounds, packed, tokens, chunk, offset, sequence):
    """(batch row, first token, end, number of chunks, first slot) of a sequence."""
    if packed:
        begin = int64(bounds[sequence])
        end = int64(bounds[sequence + 1])
        slot = (begin + sequence * offset) // chunk + sequence
        row = 0
    else:
        begin = 0
        end = tokens
        slot = sequence * ((tokens + offset + chunk - 1) // chunk)
        row = sequence
    chunks = (end - begin + offset + chunk - 1) // chunk if end > begin else 0
    return row, begin, end, chunks, slot


@device
def locate(bounds, packed, tokens, chunk, offset, slot):
    """(batch row, sequence, number of the chunk in it, first token, end, end of the sequence) of a slot; an empty one ends where it begins, or before."""
    if packed:
        sequence = 0
        after = len(bounds) - 1
        while after - sequence > 1:
            middle = (sequence + after) // 2
            if (int64(bounds[middle]) + middle * offset) // chunk + middle <= slot:
                sequence = middle
            else:
                after = middle
        begin = int64(bounds[sequence])
        end = int64(bounds[sequence + 1])
        row = 0
        index = slot - ((begin + sequence * offset) // chunk + sequence)
    else:
        chunks = (tokens + offset + chunk - 1) // chunk
        sequence = slot // chunks
        row = sequence
        index = slot % chunks
        begin = 0
        end = tokens
    first = begin - offset + index * chunk
    stop = min(end, first + chunk)
    return row, sequence, index, max(begin, first), stop, end


@device
def chunks_before(bounds, packed, chunk, sequence):
    """How many chunks the earlier packed sequences have; a dense sequence has a row of its own."""
    count = 0
    if packed:
        for earlier in range(sequence):
            count += (int64(bounds[earlier + 1]) - int64(bounds[earlier]) + chunk - 1) // chunk
    return count

"""What a layer says about its memory when asked: the flat mode's tracked state, and the orthogonality loss. Never part of the output."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.nn.forced import Forced

__all__ = ["orthogonality_loss", "tracked_state"]


def tracked_state(q: Tensor, k: Tensor, u: Tensor, w: Tensor, decay: Tensor, chunk_size: int, cu_seqlens: Tensor | None, ops: Forced) -> Tensor:
    """The flat mode's S_slow `[N, H, K, V]`: S <- d S + K^T u chunk by chunk, without delta correction, divided by its norm at the end.

    q, k `[B, T, H, K]`, u `[B, T, H, V]`, w `[B, T, H, K]`, decay `[B, M, H]`. S_slow does not influence that mode's output.
    """
    _, state = ops.op("slow_core")(
        q, k, u, w,
        chunk_decay=decay, chunk_size=chunk_size, output_final_state=True, cu_seqlens=cu_seqlens, delta=False, normalize_final=True,
    )  # fmt: skip
    assert state is not None
    return state


def orthogonality_loss(*states: Tensor) -> Tensor:
    """The sum over the states `[N, H, K, V]` of mean((S S^T - I)^2), 0-d: the original's, which a state of norm 1 cannot bring to 0."""
    loss = states[0].new_zeros(())
    for state in states:
        loss = loss + (state @ state.transpose(-1, -2) - torch.eye(state.shape[-2], dtype=state.dtype, device=state.device)).square().mean()
    return loss

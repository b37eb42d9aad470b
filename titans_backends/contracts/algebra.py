"""Small formulas that several references use: decay masks, grouped heads, the two normalisations.

Letters as in the contracts: G is the inclusive sum of g inside a chunk, Gamma_ij = exp(G_i - G_j) for i >= j, else 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.contracts.contract import arithmetic_dtype

__all__ = ["decay_mask", "expand_heads", "heads_first", "l2_normalize", "normalize_state", "zeros_state"]


def heads_first(x: Tensor, start: int, stop: int) -> Tensor:
    """Tokens start to stop as `[B, H, c, ...]`, in the arithmetic's dtype."""
    return x[:, start:stop].transpose(1, 2).to(arithmetic_dtype(x.dtype))


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, T, G, K]` as `[B, T, H, K]`: head h reads group h // (H / G)."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def decay_mask(log_decay: Tensor) -> Tensor:
    """Gamma `[..., c, c]` from G `[..., c]`; masked before the exponential, so that nothing overflows."""
    difference = log_decay[..., :, None] - log_decay[..., None, :]
    keep = torch.ones(difference.shape[-2:], dtype=torch.bool, device=difference.device).tril()
    return difference.masked_fill(~keep, float("-inf")).exp()


def l2_normalize(x: Tensor) -> Tensor:
    """x * rsqrt(sum(x^2) + 1e-6) over the last dimension, as FLA and transformers have it."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def normalize_state(state: Tensor) -> Tensor:
    """S / (||S||_F + 1e-8) per head; the gradient at S = 0 is taken as 0."""
    square = (state * state).sum((-2, -1), keepdim=True)
    norm = torch.where(square > 0, square, 1.0).sqrt()  # a norm's derivative at 0 would be NaN
    return torch.where(square > 0, state / (norm + 1e-8), torch.zeros_like(state))


def zeros_state(like: Tensor, sequences: int, heads: int, keys: int, values: int) -> Tensor:
    """An empty state `[N, H, K, V]` in the arithmetic's dtype."""
    return torch.zeros(sequences, heads, keys, values, dtype=arithmetic_dtype(like.dtype), device=like.device)

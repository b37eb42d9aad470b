"""The weight of S_fast in o = alpha o_fast + (1 - alpha) o_slow: fixed, learned, or from the token flux."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["LearnedMerge", "flux_merge"]


def flux_merge(token_flux: Tensor) -> Tensor:
    """alpha `[B, T, H]` from the token flux: 0.5 + 0.3 flux, as the original's earlier version blends; one launch."""
    return torch.rsub(token_flux, 0.5, alpha=-0.3)


class LearnedMerge(nn.Module):
    """alpha = sigmoid(logit), one for the layer (0-d) or one a head `[H]`; the original has no such parameter."""

    def __init__(self, heads: int | None, alpha: float, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        shape = () if heads is None else (heads,)
        self.logit = nn.Parameter(torch.full(shape, math.log(alpha / (1 - alpha)), device=device, dtype=dtype))

    def forward(self) -> Tensor:
        """alpha in (0, 1)."""
        return self.logit.sigmoid()

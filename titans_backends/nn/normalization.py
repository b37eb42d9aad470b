"""The gated RMS norm after the memory, by the op `gated_rms_norm`; the norm of q and k is part of `qkv_prepare`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titans_backends.op import get_op

__all__ = ["GatedRMSNorm"]


class GatedRMSNorm(nn.Module):
    """Holds `weight` `[V]`, and `gate` `[V]`, which the original stores and does not use where a gate is passed: neither do we."""

    def __init__(self, width: int, eps: float, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.gate = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight * sigmoid(gate) for x, gate `[B, T, H, V]`; x's dtype."""
        (y,) = get_op("gated_rms_norm")(x, gate, self.weight, eps=self.eps)
        assert y is not None
        return y

"""The two normalisations around the memory: unit keys and queries before it, a gated RMS norm after it (SPEC 1, 13).

Both compute in float32 at least. Plain functions, so that ops can take their place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GatedRMSNorm", "gated_rms_norm", "unit_norm"]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def unit_norm(x: Tensor) -> Tensor:
    """x / max(||x||, 1e-12) over the last dimension, as LAM has it; x's dtype."""
    return F.normalize(_wide(x), dim=-1, eps=1e-12).to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight * sigmoid(gate), over the last dimension; x's dtype."""
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * _wide(weight) * _wide(gate).sigmoid()).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """Holds `weight` `[V]`, and `gate` `[V]`, which the original stores and does not use where a gate is passed: neither do we."""

    def __init__(self, width: int, eps: float, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.gate = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate `[B, T, H, V]`."""
        return gated_rms_norm(x, gate, self.weight, self.eps)

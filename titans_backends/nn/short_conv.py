"""The parameters of the short convolution before the memory: depthwise, 4 taps, bias, SiLU (SPEC 13). The op `qkv_prepare` runs three of them at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["TAPS", "ShortConv"]

TAPS = 4


class ShortConv(nn.Module):
    """Holds `conv.weight` `[D, 1, 4]` and `conv.bias` `[D]` under the original's names."""

    def __init__(self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, TAPS, groups=channels, device=device, dtype=dtype)

    def by_head(self, heads: int) -> tuple[Tensor, Tensor]:
        """weight `[H, D / H, 4]` and bias `[H, D / H]`, views."""
        weight, bias = self.conv._parameters["weight"], self.conv._parameters["bias"]
        assert weight is not None
        assert bias is not None
        return weight.view(heads, -1, TAPS), bias.view(heads, -1)

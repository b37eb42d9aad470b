"""The parameters of the short convolution before the memory: depthwise, 4 taps, bias, SiLU. The op `qkv_prepare` runs three of them at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["TAPS", "ShortConv", "by_head"]

TAPS = 4


class ShortConv(nn.Module):
    """Holds `conv.weight` `[D, 1, 4]` and `conv.bias` `[D]` under the original's names."""

    def __init__(self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, TAPS, groups=channels, device=device, dtype=dtype)


def by_head(conv: nn.Conv1d, heads: int) -> tuple[Tensor, Tensor]:
    """weight `[H, D / H, 4]` and bias `[H, D / H]`, views of a depthwise convolution's."""
    held = conv._parameters
    weight: Tensor | None = held.get("weight")  # torch's own lookup costs more; a parametrization has it elsewhere
    bias: Tensor | None = held.get("bias")
    weight, bias = conv.weight if weight is None else weight, conv.bias if bias is None else bias
    if bias is None:
        raise ValueError("TitansDualCore: a short convolution has no bias any more; the original's has one, zeros if it must do nothing")
    return weight.view(heads, -1, TAPS), bias.view(heads, -1)

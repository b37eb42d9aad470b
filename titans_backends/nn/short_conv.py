"""The short convolution before the memory: depthwise, 4 taps, bias, SiLU (SPEC 13).

`short_conv` is the whole computation in plain torch, so that an op of the same name can take its place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_backends.nn.sequences import sequence_of_token

__all__ = ["ShortConv", "short_conv"]

TAPS = 4


def short_conv(x: Tensor, weight: Tensor, bias: Tensor, *, look_ahead: int = 0, cu_seqlens: Tensor | None = None) -> Tensor:
    """SiLU(sum_i weight[:, i] x[t - 3 + look_ahead + i] + bias), zero beyond the ends of a sequence.

    x `[B, T, D]`, weight `[D, 1, 4]`, bias `[D]`; the original has look_ahead = 1: it is not causal.
    """
    tokens, taps = x.shape[1], weight.shape[2]
    sequence = None if cu_seqlens is None else sequence_of_token(cu_seqlens, tokens, x.device)
    y = bias.expand_as(x)
    padded = F.pad(x, (0, 0, taps - 1 - look_ahead, look_ahead))
    for tap in range(taps):
        part = padded[:, tap : tap + tokens]
        if sequence is not None:
            part = part * _same_sequence(sequence, tap - (taps - 1 - look_ahead)).to(x.dtype)
        y = y + part * weight[:, 0, tap]
    return F.silu(y)


def _same_sequence(sequence: Tensor, shift: int) -> Tensor:
    """`[T, 1]`: whether token t + shift belongs to t's sequence; beyond the ends the caller has zeros."""
    return (sequence == torch.roll(sequence, -shift))[:, None]


class ShortConv(nn.Module):
    """Holds `conv.weight` `[D, 1, 4]` and `conv.bias` `[D]` under the original's names."""

    def __init__(self, channels: int, look_ahead: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.look_ahead = look_ahead
        self.conv = nn.Conv1d(channels, channels, TAPS, groups=channels, device=device, dtype=dtype)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """x `[B, T, D]`; packed, no tap reaches into another sequence."""
        bias = self.conv.bias
        assert bias is not None
        return short_conv(x, self.conv.weight, bias, look_ahead=self.look_ahead, cu_seqlens=cu_seqlens)

"""The decay inside a chunk (SPEC.md 1): G, e^G, e^(G_C - G), e^(G_C) and Gamma, from g.

Sums run in float64 where the device has it: a few tokens of g = -20 push |G| to where float32 cannot hold the differences that matter.
exp(-G) is never formed, and the mask comes before the exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Decay", "log_decay_gradient"]


@dataclass(frozen=True, slots=True)
class Decay:
    """`head` e^G and `tail` e^(G_C - G) `[n, H, C, 1]`, `total` e^(G_C) `[n, H, 1, 1]`, `pair` Gamma `[n, H, C, C]` with zeros above the diagonal."""

    head: Tensor
    tail: Tensor
    total: Tensor
    pair: Tensor

    @classmethod
    def of(cls, g: Tensor, pair: Tensor | None = None) -> Decay:
        """From `g [n, H, C, 1]` of one slab; `pair` is memory that may hold Gamma."""
        dtype = g.dtype
        wide = g.to(torch.float64) if g.device.type != "mps" else g
        log = wide.cumsum(2)
        last = log[:, :, -1:]
        if pair is None:
            pair = torch.empty(*g.shape[:3], g.shape[2], dtype=dtype, device=g.device)
        torch.sub(log, log.transpose(2, 3), out=pair)
        pair.add_(_above_diagonal(pair)).exp_()
        return cls(log.to(dtype).exp(), (last - log).to(dtype).exp_(), last.to(dtype).exp(), pair)


def _above_diagonal(square: Tensor) -> Tensor:
    """-inf above the diagonal, 0 elsewhere, `[C, C]`: added, it is a cheaper mask than a boolean one."""
    size = square.shape[-1]
    return torch.full((size, size), float("-inf"), dtype=square.dtype, device=square.device).triu_(1)


def log_decay_gradient(d_log: Tensor, left: Tensor | None = None) -> Tensor:
    """dg from dG `[n, H, C, 1]`: the reversed cumulative sum inside the chunk, and of `left`, what tokens leave in the state, the sum before the token.

    In dG each token's `left` would be taken off, and all of it added at the chunk's end: from a token on it cancels, but not its rounding.
    """
    dg = d_log.flip(2).cumsum(2).flip(2)
    return dg if left is None else dg.add_(torch.nn.functional.pad(left[:, :, :-1], (0, 0, 1, 0)).cumsum(2))

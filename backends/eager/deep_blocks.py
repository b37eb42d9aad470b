"""What deep_core does with a block's sums: the carry of a sequence, closing a block, and both of their gradients (SPEC.md 7).

Carries are D, E `[R, H, K, V]` and mass, summed g `[R, H]`, one row a sequence. Which rows close is a mask on the device, so that nothing waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_backends.contracts.deep_core import Carry, normalizer

__all__ = ["Closing", "TokenGradients", "Tokens", "close", "close_backward", "masses", "token_gradients"]


@dataclass(frozen=True, slots=True)
class Closing:
    """How a block ends: its Z, by name, and its tokens."""

    normalize: str
    block: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """k `[n, H, C, K]`, v `[n, H, C, V]`, eta `[n, H, C, 1]` and `written` = eta k: C tokens of one block in each of n rows."""

    k: Tensor
    v: Tensor
    eta: Tensor
    written: Tensor


@dataclass(frozen=True, slots=True)
class TokenGradients:
    """Gradients of `Tokens`' k, v and eta."""

    k: Tensor
    v: Tensor
    eta: Tensor


def masses(x: Tokens) -> Tensor:
    """What the tokens add to the mass, `[n, H]`."""
    return (x.written * x.k).sum((-2, -1))


def _masks(closes: Tensor) -> tuple[Tensor, Tensor]:
    return closes[:, None], closes[:, None, None, None]


def close(x: Carry, closes: Tensor, how: Closing) -> Carry:
    """The carry after a block's last tokens where `closes [R]`, the open block's as it is elsewhere."""
    few, many = _masks(closes)
    z = normalizer(x.mass, how.normalize, how.block)[..., None, None]
    state = torch.addcdiv(x.log_decay.exp()[..., None, None] * x.state, x.error, z).where(many, x.state)
    return Carry(state, x.error.masked_fill(many, 0), x.mass.masked_fill(few, 0), x.log_decay.masked_fill(few, 0))


def close_backward(d: Carry, x: Carry, closes: Tensor, how: Closing) -> Carry:
    """Gradients of the carry `x` that `close` was given, from those of what it returned."""
    few, many = _masks(closes)
    z = normalizer(x.mass, how.normalize, how.block)
    decay = x.log_decay.exp()
    d_log = decay * (x.state * d.state).sum((-2, -1))
    d_mass = torch.zeros_like(x.mass)
    if how.normalize == "safe":
        d_mass = ((x.error * d.state).sum((-2, -1)) / -(z * z)).where(x.mass >= 1, d_mass)
    return Carry(
        (decay[..., None, None] * d.state).where(many, d.state),
        (d.state / z[..., None, None]).where(many, d.error),
        d_mass.where(few, d.mass),
        d_log.where(few, d.log_decay),
    )


def token_gradients(x: Tokens, state: Tensor, missed: Tensor, d_missed: Tensor, d: Carry) -> TokenGradients:
    """From the gradients `d` of the sums that the tokens were added to; `state` is the D they met, `missed` their v - k D, `d_missed` = written d.error.

    What they give to D itself is -k^T d_missed.
    """
    d_written = missed @ d.error.transpose(-1, -2)
    d_mass = d.mass[..., None, None]
    d_k = x.eta * d_written - d_missed @ state.transpose(-1, -2) + 2 * d_mass * x.written
    d_eta = (x.k * d_written).sum(-1, keepdim=True) + d_mass * (x.k * x.k).sum(-1, keepdim=True)
    return TokenGradients(d_k, d_missed, d_eta)

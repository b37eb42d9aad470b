"""The option `qk_l2norm`: x * rsqrt(sum(x^2) + 1e-6) over the last axis, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["unit", "unit_backward"]

_EPS = 1e-6


def _rate(x: Tensor) -> Tensor:
    return torch.rsqrt((x * x).sum(-1, keepdim=True) + _EPS)


def unit(x: Tensor) -> Tensor:
    """`x` times `rsqrt(sum(x^2) + 1e-6)`."""
    return x * _rate(x)


def unit_backward(x: Tensor, grad: Tensor) -> Tensor:
    """dx from the gradient of `unit(x)`."""
    rate = _rate(x)
    y = x * rate
    return rate * (grad - y * (y * grad).sum(-1, keepdim=True))

"""States divided by their Frobenius norm (SPEC.md 4): S / (|S| + 1e-8), and its gradient, which is 0 at S = 0."""

from __future__ import annotations

from torch import Tensor

__all__ = ["normalized", "normalized_backward"]

_EPS = 1e-8


def _norm(state: Tensor) -> Tensor:
    return state.square().sum((-2, -1), keepdim=True).sqrt()


def normalized(state: Tensor) -> Tensor:
    """`state [..., K, V]` over its norm plus 1e-8."""
    return state / (_norm(state) + _EPS)


def normalized_backward(state: Tensor, grad: Tensor) -> Tensor:
    """The gradient at `state` from that of `normalized(state)`; 0 where the state is 0."""
    norm = _norm(state)
    inner = (state * grad).sum((-2, -1), keepdim=True)
    total = norm + _EPS
    return (grad / total - state * (inner / (norm * total.square()))).where(norm > 0, 0.0)

"""FLA's gates as its kernels compute them, in torch: the decay from A_log and dt_bias, beta from its logits. Gradients reach every argument."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decay_of", "rate_of", "wide"]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and computed gates: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def decay_of(function: str, g: Tensor, A_log: Tensor, dt_bias: Tensor | None) -> Tensor:
    """The log decay -exp(A_log) * softplus(g + dt_bias) `[B, T, H]` in float32, or float64 where g is; A_log and dt_bias hold H numbers each."""
    dtype = wide(g.dtype)
    heads = g.shape[-1]
    for name, value in (("A_log", A_log), ("dt_bias", dt_bias)):
        if value is not None and value.numel() != heads:
            raise ValueError(
                f"{function}: {name} has shape {tuple(value.shape)}, but g has {heads} heads in shape {tuple(g.shape)}; it must be [{heads}]"
            )
    x = g.to(dtype) if dt_bias is None else g + dt_bias.to(dtype).reshape(heads)  # a sum of two dtypes is of the wider one, in one launch
    return torch.nn.functional.softplus(x) * -A_log.to(dtype).reshape(heads).exp()


def rate_of(beta: Tensor, sigmoid: bool, doubled: bool) -> Tensor:
    """beta as it is, or the sigmoid of its logits in float32, twice that for eigenvalues down to -1."""
    if not sigmoid:
        return beta
    rate = beta.to(wide(beta.dtype)).sigmoid()
    return 2 * rate if doubled else rate

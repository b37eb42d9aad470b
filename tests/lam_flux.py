"""LAM's two flux networks from their formulas, as the golden files' parameters drive them: token flux and chunk resonance."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["resonance", "token_flux"]


def _network(x: Tensor, parameters: Mapping[str, Tensor], name: str) -> Tensor:
    """clamp(sigmoid(w2 . silu(W1 x + b1) + b2), 0.01, 0.99), one number for each row."""
    first, first_bias, last, last_bias = (parameters[f"flux.{name}.{part}"] for part in ("0.weight", "0.bias", "2.weight", "2.bias"))
    hidden = torch.nn.functional.silu(x @ first.T + first_bias)
    return torch.sigmoid(hidden @ last.T + last_bias)[..., 0].clamp(0.01, 0.99)


def token_flux(parameters: Mapping[str, Tensor], k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """`[B, T, H]` from unit keys `k [B, T, H, K]`, `v` and `beta`."""
    return _network(torch.cat([k, v], -1) * beta[..., None], parameters, "token_flux_proj")


def resonance(parameters: Mapping[str, Tensor], k: Tensor, u: Tensor, chunk: int) -> Tensor:
    """psi `[B, M, H]` from unit keys and the transformed values of chunks that divide T."""
    k, u = k.unflatten(1, (-1, chunk)), u.unflatten(1, (-1, chunk))
    energy = torch.einsum("bmchk,hkv,bmchv->bmch", k, parameters["flux.W_bilinear"], u) / parameters["flux.temp"]
    return _network(torch.cat([k.mean(2), u.mean(2), energy.mean(2)[..., None]], -1), parameters, "flux_net")

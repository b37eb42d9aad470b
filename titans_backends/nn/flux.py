"""The flux networks: how much a token, or a chunk, matters, as a number between 0.01 and 0.99.

Their parameters are held here, the numbers are the ops'. Called only where the number is used: the token flux by the merge, the resonance by the decays.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from titans_backends.nn.forced import Forced

__all__ = ["ResonanceFlux", "resonance", "token_flux"]


def _two_layers(inputs: int, hidden: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Sequential:
    """W2 silu(W1 x + b1) + b2, one number; small weights, so that a fresh flux is about 0.5."""
    layers = nn.Sequential(nn.Linear(inputs, hidden, device=device, dtype=dtype), nn.SiLU(), nn.Linear(hidden, 1, device=device, dtype=dtype))
    for layer in (layers[0], layers[2]):
        assert isinstance(layer, nn.Linear)
        nn.init.xavier_uniform_(layer.weight, gain=0.1)
        nn.init.zeros_(layer.bias)
    return layers


class ResonanceFlux(nn.Module):
    """Holds `W_bilinear`, `temp`, `flux_net.*` and `token_flux_proj.*`; both networks are shared by all heads."""

    def __init__(self, heads: int, keys: int, values: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.W_bilinear = nn.Parameter(torch.empty(heads, keys, values, device=device, dtype=dtype))
        self.temp = nn.Parameter(torch.full((heads,), math.sqrt(keys), device=device, dtype=dtype))
        self.flux_net = _two_layers(keys + values + 1, max(1, keys // 2), device, dtype)
        self.token_flux_proj = _two_layers(keys + values, max(1, keys // 2), device, dtype)
        nn.init.xavier_uniform_(self.W_bilinear, gain=0.1)


def token_flux(flux: nn.Module, k: Tensor, v: Tensor, beta: Tensor, ops: Forced) -> Tensor:
    """The token flux `[B, T, H]` from unit keys `[B, T, H, K]`, v `[B, T, H, V]` and beta `[B, T, H]`; `flux` holds what `ResonanceFlux` does."""
    (found,) = ops.op("token_flux")(k, v, beta, *_parameters(flux.token_flux_proj))
    assert found is not None
    return found


def resonance(flux: nn.Module, k: Tensor, u: Tensor, chunk_size: int, cu_seqlens: Tensor | None, count: int, ops: Forced) -> Tensor:
    """The resonance psi `[B, M, H]` of the call's `count` chunks, from unit keys and transformed values u `[B, T, H, V]`; float32 at least."""
    (psi,) = ops.op("chunk_flux")(k, u, flux.W_bilinear, flux.temp, *_parameters(flux.flux_net), chunk_size=chunk_size, cu_seqlens=cu_seqlens)
    assert psi is not None
    return psi if psi.shape[1] == count else psi[:, :count]


def _parameters(network: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w1, b1, w2, b2."""
    assert isinstance(network, nn.Sequential)
    first, last = network[0], network[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    return first.weight, first.bias, last.weight, last.bias

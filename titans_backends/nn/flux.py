"""The flux networks: how much a token, or a chunk, matters, as a number between 0.01 and 0.99 (SPEC 6).

Called only where the number is used: the token flux by the merge, the resonance by the decay of S_slow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from titans_backends.nn.chunk_grid import ChunkGrid

__all__ = ["ResonanceFlux", "chunk_resonance", "token_flux"]


def _two_layers(inputs: int, hidden: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Sequential:
    """W2 silu(W1 x + b1) + b2, one number; small weights, so that a fresh flux is about 0.5."""
    layers = nn.Sequential(nn.Linear(inputs, hidden, device=device, dtype=dtype), nn.SiLU(), nn.Linear(hidden, 1, device=device, dtype=dtype))
    for layer in (layers[0], layers[2]):
        assert isinstance(layer, nn.Linear)
        nn.init.xavier_uniform_(layer.weight, gain=0.1)
        nn.init.zeros_(layer.bias)
    return layers


def _squashed(x: Tensor) -> Tensor:
    """Zero gradient outside of [0.01, 0.99], as the original's clamp has it."""
    return x[..., 0].sigmoid().clamp(0.01, 0.99)


def token_flux(network: nn.Module, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """`[B, T, H]` from unit keys `[B, T, H, K]`, v `[B, T, H, V]` and beta `[B, T, H]`."""
    return _squashed(network(torch.cat([beta[..., None] * k, beta[..., None] * v], -1)))


def chunk_resonance(network: nn.Module, bilinear: Tensor, temperature: Tensor, k: Tensor, u: Tensor, grid: ChunkGrid) -> Tensor:
    """psi `[B, M, H]` from unit keys and transformed values; `bilinear` `[H, K, V]`, `temperature` `[H]`."""
    energy = (torch.einsum("bthk,hkv->bthv", k, bilinear) * u).sum(-1) / temperature
    return _squashed(network(torch.cat([grid.mean(k), grid.mean(u), grid.mean(energy)[..., None]], -1)))


class ResonanceFlux(nn.Module):
    """Holds `W_bilinear`, `temp`, `flux_net.*` and `token_flux_proj.*`; both networks are shared by all heads."""

    def __init__(self, heads: int, keys: int, values: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.W_bilinear = nn.Parameter(torch.empty(heads, keys, values, device=device, dtype=dtype))
        self.temp = nn.Parameter(torch.full((heads,), math.sqrt(keys), device=device, dtype=dtype))
        self.flux_net = _two_layers(keys + values + 1, max(1, keys // 2), device, dtype)
        self.token_flux_proj = _two_layers(keys + values, max(1, keys // 2), device, dtype)
        nn.init.xavier_uniform_(self.W_bilinear, gain=0.1)

    def tokens(self, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        """The token flux `[B, T, H]`."""
        return token_flux(self.token_flux_proj, k, v, beta)

    def chunks(self, k: Tensor, u: Tensor, grid: ChunkGrid) -> Tensor:
        """The resonance psi `[B, M, H]`."""
        return chunk_resonance(self.flux_net, self.W_bilinear, self.temp, k, u, grid)

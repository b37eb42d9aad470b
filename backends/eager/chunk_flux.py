"""chunk_flux: sums over a chunk as one reduction of a padded copy, the bilinear form as one product a head; the network over all chunks at once.

Where packed sequences begin and end stays on the device: nothing here waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.chunk_flux import ChunkFlux
from titans_backends.contracts.chunks import chunk_rows
from titans_backends.contracts.token_flux import LEAST, MOST
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .chunk_grid import compute_dtype
from .short_conv import supports

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]

_INPUTS = ("k", "u", "bilinear", "temp", "w1", "b1", "w2", "b2")


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("eager", "products")]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("eager", "products", direction="backward")]


class _Chunks:
    """The chunks of a call: means over their tokens, and a row's value spread to its tokens. `lengths` `[Z]`, 0 behind the last chunk."""

    def __init__(self, call: ChunkFlux) -> None:
        tokens, chunk, packed = call.k.shape[1], call.chunk_size, call.cu_seqlens
        self.tokens, self.rows = tokens, chunk_rows(tokens, chunk, None if packed is None else packed.numel() - 1)
        place = torch.arange(tokens, device=call.k.device)
        if packed is None:
            self.row = place // chunk
        else:
            ends = packed.to(device=call.k.device, dtype=torch.int64)
            each = (ends.diff() + chunk - 1) // chunk
            sequence = torch.searchsorted(ends[1:].contiguous(), place, right=True)
            self.row = (each.cumsum(0) - each)[sequence] + (place - ends[sequence]) // chunk
        starts = torch.searchsorted(self.row, torch.arange(self.rows + 1, device=place.device))
        self.lengths = starts.diff()
        self.chunk = min(chunk, max(tokens, 1))
        self.slot = self.row * self.chunk + place - starts[self.row]

    def mean(self, x: Tensor) -> Tensor:
        """x `[B, T, ...]` as `[B, Z, ...]`."""
        held = x.new_zeros(x.shape[0], self.rows * self.chunk, *x.shape[2:]).index_copy_(1, self.slot, x)
        return held.unflatten(1, (self.rows, self.chunk)).sum(2) / self._sizes(x)

    def spread(self, x: Tensor) -> Tensor:
        """The gradient of `mean`: x `[B, Z, ...]` as `[B, T, ...]`."""
        return (x / self._sizes(x)).index_select(1, self.row)

    def _sizes(self, x: Tensor) -> Tensor:
        return self.lengths.clamp_min(1).to(x.dtype).reshape(-1, *[1] * (x.dim() - 2))


class _Network:
    """A call in the arithmetic's dtype, with what psi and its gradients share."""

    def __init__(self, call: ChunkFlux) -> None:
        dtype, heads = compute_dtype(call.k), call.u.shape[2]
        self.k, self.u, self.bilinear, self.temp, w1, b1, w2, self.b2 = (getattr(call, name).to(dtype) for name in _INPUTS)
        self.group = heads // self.k.shape[2] if self.k.shape[2] else 1
        self.w1_k, self.w1_u, self.w1_e = w1.split([self.k.shape[-1], self.u.shape[-1], 1], -1)
        self.b1, self.w2 = b1, w2[0]
        self.chunks = _Chunks(call)
        self.from_k = torch.einsum("bthk,hkv->bthv", self.heads(self.k), self.bilinear)
        self.mean_k, self.mean_u = self.chunks.mean(self.k), self.chunks.mean(self.u)
        self.mean_e = self.chunks.mean((self.from_k * self.u).sum(-1)) / self.temp

    def heads(self, x: Tensor) -> Tensor:
        """What is `[B, T, G, ...]`, for each head."""
        return x if self.group == 1 else x.repeat_interleave(self.group, 2)

    def groups(self, x: Tensor) -> Tensor:
        """The gradient of `heads`."""
        return x if self.group == 1 else x.unflatten(2, (-1, self.group)).sum(3)

    def before(self) -> Tensor:
        """What the hidden layer's activation sees, `[B, Z, H, F]`."""
        return self.heads(self.mean_k @ self.w1_k.mT) + self.mean_u @ self.w1_u.mT + self.mean_e[..., None] * self.w1_e[:, 0] + self.b1

    def logit(self, before: Tensor) -> Tensor:
        """What the sigmoid sees, `[B, Z, H]`."""
        return (torch.nn.functional.silu(before) @ self.w2).add_(self.b2)

    def absent(self) -> Tensor:
        """Which rows have no chunk, `[Z, 1]`."""
        return (self.chunks.lengths == 0)[:, None]


def run(call: ChunkFlux, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """psi, in float32 or float64."""
    network = _Network(call)
    return (torch.sigmoid(network.logit(network.before())).clamp_(LEAST, MOST).masked_fill_(network.absent(), 0),)


def run_backward(
    call: ChunkFlux, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of k, u, bilinear, temp, w1, b1, w2 and b2, in that order."""
    net, (given,) = _Network(call), grads
    assert given is not None  # the only output
    before = net.before()
    psi, open_ = torch.sigmoid(net.logit(before)), torch.sigmoid(before)
    d_logit = (given.to(psi.dtype) * psi * (1 - psi)).masked_fill((psi < LEAST) | (psi > MOST) | net.absent(), 0)[..., None]
    d_before = d_logit * net.w2 * open_ * (1 + before * (1 - open_))
    d_keys = net.groups(d_before)
    d_mean_e = d_before @ net.w1_e[:, 0]
    d_energy = net.chunks.spread(d_mean_e / net.temp)[..., None]
    found: dict[str, Tensor] = {}
    if "k" in needs:
        from_u = torch.einsum("bthv,hkv->bthk", d_energy * net.u, net.bilinear)
        found["k"] = net.groups(from_u) + net.chunks.spread(d_keys @ net.w1_k)
    if "u" in needs:
        found["u"] = d_energy * net.from_k + net.chunks.spread(d_before @ net.w1_u)
    if "bilinear" in needs:
        found["bilinear"] = torch.einsum("bthk,bthv->hkv", net.heads(net.k), d_energy * net.u)
    if "temp" in needs:
        found["temp"] = -(d_mean_e * net.mean_e).sum((0, 1)) / net.temp
    if "w1" in needs:
        parts = [d_keys.flatten(0, 2).mT @ net.mean_k.flatten(0, 2), d_before.flatten(0, 2).mT @ net.mean_u.flatten(0, 2)]
        found["w1"] = torch.cat([*parts, (d_before * net.mean_e[..., None]).sum((0, 1, 2))[:, None]], -1)
    if "b1" in needs:
        found["b1"] = d_before.sum((0, 1, 2))
    if "w2" in needs:
        found["w2"] = (d_logit * before * open_).sum((0, 1, 2))[None]
    if "b2" in needs:
        found["b2"] = d_logit.sum((0, 1, 2))
    return tuple(found[name].to(getattr(call, name).dtype).contiguous() if name in needs else None for name in _INPUTS)

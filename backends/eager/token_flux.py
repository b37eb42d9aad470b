"""token_flux: one product over all tokens and heads for each layer of the network; a key that heads share is multiplied once."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.token_flux import LEAST, MOST, TokenFlux
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict

from .chunk_grid import compute_dtype

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]

_INPUTS = ("k", "v", "beta", "w1", "b1", "w2", "b2")


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Everything."""
    return ACCEPTED


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("eager", "products")]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("eager", "products", direction="backward")]


class _Network:
    """A call in the arithmetic's dtype. Beta is taken out of the first product: w1 [beta k ; beta v] = beta (w1_k k + w1_v v)."""

    def __init__(self, call: TokenFlux) -> None:
        dtype = compute_dtype(call.v)
        self.k, self.v, self.beta = call.k.to(dtype), call.v.to(dtype), call.beta.to(dtype)[..., None]
        self.w1_k, self.w1_v = call.w1.to(dtype).split([call.k.shape[-1], call.v.shape[-1]], -1)
        self.b1, self.w2, self.b2 = (x.to(dtype) for x in (call.b1, call.w2, call.b2))

    def inner(self) -> Tensor:
        """w1 [k ; v], `[B, T, H, F]`."""
        groups, heads = self.k.shape[2], self.v.shape[2]
        of_keys, found = self.k @ self.w1_k.mT, self.v @ self.w1_v.mT
        return found.add_(of_keys if groups == heads else of_keys.repeat_interleave(heads // groups, 2))

    def logit(self, before: Tensor) -> Tensor:
        """What the sigmoid sees, `[B, T, H]`, from what the hidden layer's activation sees."""
        return (torch.nn.functional.silu(before) @ self.w2[0]).add_(self.b2)


def run(call: TokenFlux, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """The flux in v's dtype."""
    network = _Network(call)
    before = network.inner().mul_(network.beta).add_(network.b1)
    return (torch.sigmoid(network.logit(before)).clamp_(LEAST, MOST).to(call.v.dtype),)


def run_backward(
    call: TokenFlux, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of k, v, beta, w1, b1, w2 and b2, in that order."""
    network, (given,) = _Network(call), grads
    assert given is not None  # the only output
    inner = network.inner()
    before = inner * network.beta + network.b1
    flux = torch.sigmoid(network.logit(before))
    open_ = torch.sigmoid(before)
    d_logit = (given.to(flux.dtype) * flux * (1 - flux)).masked_fill((flux < LEAST) | (flux > MOST), 0)[..., None]
    d_before = d_logit * network.w2[0] * open_ * (1 + before * (1 - open_))
    d_inner = d_before * network.beta
    d_keys = d_inner if call.k.shape[2] == call.v.shape[2] else d_inner.unflatten(2, (call.k.shape[2], -1)).sum(3)
    found: dict[str, Tensor] = {}
    if "k" in needs:
        found["k"] = d_keys @ network.w1_k
    if "v" in needs:
        found["v"] = d_inner @ network.w1_v
    if "beta" in needs:
        found["beta"] = (d_before * inner).sum(-1)
    if "w1" in needs:
        found["w1"] = torch.cat([d_keys.flatten(0, 2).mT @ network.k.flatten(0, 2), d_inner.flatten(0, 2).mT @ network.v.flatten(0, 2)], -1)
    if "b1" in needs:
        found["b1"] = d_before.sum((0, 1, 2))
    if "w2" in needs:
        found["w2"] = (d_logit * before * open_).sum((0, 1, 2))[None]
    if "b2" in needs:
        found["b2"] = d_logit.sum((0, 1, 2))
    return tuple(found[name].to(getattr(call, name).dtype).contiguous() if name in needs else None for name in _INPUTS)

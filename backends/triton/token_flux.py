"""token_flux in one launch, and its backward in four at most: `flux_network.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.token_flux import TokenFlux
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .ahead import ahead_of
from .flux_calls import Network, forward_ways, gradient_ways, network, network_gradients, serves_network
from .program import remembering, remembering_backward

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]

_INPUTS = ("k", "v", "beta", "w1", "b1", "w2", "b2")


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `flux_calls.serves_network` says."""
    return serves_network(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Blocks of tokens."""
    return forward_ways(signature)


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Blocks of tokens."""
    return gradient_ways(signature)


def _network(call: TokenFlux) -> Network:
    return Network(call.k, call.v, call.beta, None, call.w1, call.b1, call.w2, call.b2)


def run(call: TokenFlux, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """The flux in v's dtype."""
    flux = torch.empty(call.v.shape[:3], dtype=call.v.dtype, device=call.v.device)
    network(_network(call), flux, int(candidate.param("rows")), str(candidate.param("dot")))
    return (flux,)


def run_backward(
    call: TokenFlux, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of k, v, beta, w1, b1, w2 and b2, in that order."""
    (d_flux,) = grads
    assert d_flux is not None  # the only output
    given = {name: getattr(call, name) for name in _INPUTS if name in needs}
    outs = {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in given.items()}
    network_gradients(_network(call), d_flux, outs, int(candidate.param("rows")), int(candidate.param("blocks")), str(candidate.param("dot")))
    return tuple(outs.get(name) for name in _INPUTS)


compile_ahead = ahead_of(run, "token_flux", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)

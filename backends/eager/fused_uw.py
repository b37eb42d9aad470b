"""fused_uw: u and w from a given attn_const as one product with [v_beta | k_beta] (SPEC.md 3's last line)."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.fused_uw import FusedUW
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict

from .chunk_grid import compute_dtype

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Everything."""
    return ACCEPTED


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One joined product, or two."""
    return [Candidate("eager", "two_products"), Candidate("eager", "joined")]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("eager", "two_products", direction="backward")]


def run(call: FusedUW, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """u and w, contiguous, in v_beta's dtype."""
    dtype, out_dtype = compute_dtype(call.v_beta), call.v_beta.dtype
    t, v, k = (x.to(dtype) for x in (call.attn_const, call.v_beta, call.k_beta))
    if candidate.variant == "joined":
        uw = t @ torch.cat([v, k], -1)
        parts = uw.split([v.shape[-1], k.shape[-1]], -1)
    else:
        parts = (t @ v, t @ k)
    u, w = (x.to(out_dtype).contiguous() for x in parts)
    return u, w


def run_backward(
    call: FusedUW, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of attn_const, v_beta and k_beta, in that order."""
    dtype = compute_dtype(call.v_beta)
    sides = {"v_beta": (grads[0], call.v_beta), "k_beta": (grads[1], call.k_beta)}
    found: dict[str, Tensor] = {}
    for name, (grad, _) in sides.items():
        if name in needs and grad is not None:
            found[name] = call.attn_const.to(dtype).mT @ grad.to(dtype)
    if "attn_const" in needs:
        given = [grad.to(dtype) @ side.to(dtype).mT for grad, side in sides.values() if grad is not None]
        if given:
            found["attn_const"] = given[0] if len(given) == 1 else given[0].add_(given[1])
    return tuple(_like(getattr(call, name), found.get(name)) if name in needs else None for name in ("attn_const", "v_beta", "k_beta"))


def _like(x: Tensor, grad: Tensor | None) -> Tensor:
    return torch.zeros_like(x, memory_format=torch.contiguous_format) if grad is None else grad.to(x.dtype).contiguous()

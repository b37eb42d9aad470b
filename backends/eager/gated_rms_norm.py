"""gated_rms_norm: the formula as a few elementwise products and one mean, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_rms_norm import GatedRMSNorm
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict

from .chunk_grid import compute_dtype

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Everything."""
    return ACCEPTED


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("eager", "products")]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("eager", "products", direction="backward")]


def _rate(x: Tensor, eps: float) -> Tensor:
    """1 over the root mean square, `[B, T, H, 1]`."""
    return torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)


def _opened(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gate's activation and its derivative."""
    open_ = torch.sigmoid(gate)
    closing = open_ * (1 - open_)
    return (open_, closing) if activation == "sigmoid" else (open_ * gate, open_ + gate * closing)


def run(call: GatedRMSNorm, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """y, contiguous, in x's dtype."""
    dtype = compute_dtype(call.x)
    x, gate = call.x.to(dtype), call.gate.to(dtype)
    opened = torch.sigmoid(gate) if call.activation == "sigmoid" else torch.nn.functional.silu(gate)
    return ((x * _rate(x, call.eps) * call.weight.to(dtype) * opened).to(call.x.dtype).contiguous(),)


def run_backward(
    call: GatedRMSNorm, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of x, gate and weight, in that order."""
    dtype, (given,) = compute_dtype(call.x), grads
    assert given is not None  # the only output
    x, weight, d_y = call.x.to(dtype), call.weight.to(dtype), given.to(dtype)
    opened, slope = _opened(call.gate.to(dtype), call.activation)
    rate = _rate(x, call.eps)
    unit = x * rate
    found: dict[str, Tensor] = {}
    if "x" in needs:
        d_unit = d_y * weight * opened
        found["x"] = rate * (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True))
    if "gate" in needs:
        found["gate"] = d_y * unit * weight * slope
    if "weight" in needs:
        found["weight"] = (d_y * unit * opened).sum((0, 1, 2))
    return tuple(found[name].to(getattr(call, name).dtype).contiguous() if name in needs else None for name in ("x", "gate", "weight"))

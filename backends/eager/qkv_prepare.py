"""qkv_prepare: the three convolutions one after another, then the norm of q and k."""

from __future__ import annotations

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.qkv_prepare import QKVPrepare, parts
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from . import short_conv
from .short_conv import convolved, convolved_backward, supports
from .unit_norm import unit, unit_backward

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]

_LEAST = 1e-12
_INPUTS = {"x": "", "weight": "_weight", "bias": "_bias", "initial_state": "_state"}
"""What `short_conv` calls an input, and what follows the tensor's letter here."""


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return short_conv.candidates(signature, machine)


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return short_conv.backward_candidates(signature, machine)


def _normed(x: Tensor, norm: str) -> Tensor:
    if norm == "none":
        return x
    return unit(x) if norm == "l2_eps" else x / x.norm(dim=-1, keepdim=True).clamp_min(_LEAST)


def _normed_backward(x: Tensor, grad: Tensor, norm: str) -> Tensor:
    """dx from the gradient of `_normed(x)`; where the least norm stands in for |x|, it is a constant."""
    if norm == "none":
        return grad
    if norm == "l2_eps":
        return unit_backward(x, grad)
    size = x.norm(dim=-1, keepdim=True)
    kept = size.clamp_min(_LEAST)
    y = x / kept
    along = (y * grad).sum(-1, keepdim=True).masked_fill(size < _LEAST, 0)
    return (grad - y * along) / kept


def run(call: QKVPrepare, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """q, k and v in their dtype, then the last four inputs of each."""
    dtype = call.q.dtype
    (q, q_state), (k, k_state), (v, v_state) = (convolved(part) for part in parts(call))
    q, k = _normed(q, call.qk_norm).to(dtype), _normed(k, call.qk_norm).to(dtype)
    return q, k, v.to(dtype), q_state, k_state, v_state


def run_backward(
    call: QKVPrepare, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, the three weights, the three biases and the three states, in that order."""
    found: dict[str, Tensor | None] = {}
    for letter, part, d_y, d_final in zip("qkv", parts(call), grads[:3], grads[3:], strict=True):
        wanted = frozenset(name for name, tail in _INPUTS.items() if letter + tail in needs)
        if not wanted:
            continue
        if d_y is not None and letter != "v" and call.qk_norm != "none":
            y, _ = convolved(part)
            d_y = _normed_backward(y, d_y.to(y.dtype), call.qk_norm)
        for (name, tail), grad in zip(_INPUTS.items(), convolved_backward(part, d_y, d_final, wanted), strict=True):
            found[letter + tail] = grad if name in wanted else None
    return tuple(found.get(letter + tail) for tail in ("", "_weight", "_bias", "_state") for letter in "qkv")

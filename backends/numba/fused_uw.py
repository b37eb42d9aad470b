"""fused_uw: two products with the same given matrix (SPEC.md 3's last line), and three for the gradients."""

from __future__ import annotations

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.fused_uw import FusedUW
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .product import product
from .serving import serves, wide

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Everything."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("numba", "tiles")]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("numba", "tiles", direction="backward")]


def _flat(x: Tensor) -> Tensor:
    """The matrices `[n, *, *]` in float32; a copy only where leading dimensions cannot be viewed as one."""
    return wide(x).reshape(-1, *x.shape[-2:]) if x.numel() else x.new_zeros(0, *x.shape[-2:]).float()


def run(call: FusedUW, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """u `[..., C, V]` and w `[..., C, K]`."""
    attn = _flat(call.attn_const)
    return tuple(product(attn, _flat(x)).view(x.shape).to(call.v_beta.dtype) for x in (call.v_beta, call.k_beta))


def run_backward(
    call: FusedUW, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """d attn_const = du v_beta^T + dw k_beta^T, d v_beta = attn_const^T du, d k_beta = attn_const^T dw."""
    attn = _flat(call.attn_const)
    arrived = [(_flat(grad), _flat(x)) for grad, x in zip(grads, (call.v_beta, call.k_beta), strict=True) if grad is not None]
    found: dict[str, Tensor] = {}
    if "attn_const" in needs:
        pairs = [side for grad, x in arrived for side in (grad, x.mT)]
        found["attn_const"] = product(*pairs) if pairs else attn.new_zeros(attn.shape)
    for name, grad in zip(("v_beta", "k_beta"), grads, strict=True):
        if name in needs:
            found[name] = getattr(call, name).new_zeros(getattr(call, name).shape) if grad is None else product(attn.mT, _flat(grad))
    given = {name: getattr(call, name) for name in ("attn_const", "v_beta", "k_beta")}
    return tuple(found[name].view(x.shape).to(x.dtype) if name in found else None for name, x in given.items())

"""dual_core composed of this backend's fast_core and gated_delta_rule, with alpha folded into their gates: for the exact rule (SPEC.md 5).

Costs a copy of q, k and b⊙v in the arithmetic's dtype; in return each core has its own chunk size.
"""

from __future__ import annotations

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.dual_core import DualCore
from titans_backends.contracts.fast_core import FastCore
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule

from . import fast_core, gated_delta_rule
from .chunk_grid import compute_dtype
from .frobenius import normalized, normalized_backward
from .unit_norm import unit, unit_backward

__all__ = ["WHOLE", "composed_backward", "composed_forward"]

_FAST = ("q", "k", "v", "gate", "g", "initial_state")
_SLOW = ("q", "k", "v", "beta", "g", "gate", "initial_state")
WHOLE = 128
"""Tokens of the largest chunk that S_fast runs as one product."""
_BLOCK = 64


class _Parts:
    """The two inner calls: q, k normalised where asked, everything in the dtype of the arithmetic."""

    def __init__(self, call: DualCore, slow_chunk: int) -> None:
        v, dtype = call.v, compute_dtype(call.v)
        q, k = call.q.to(dtype), call.k.to(dtype)
        if call.qk_l2norm:
            q, k = unit(q), unit(k)
        alpha = call.alpha.to(dtype) if isinstance(call.alpha, Tensor) else v.new_full((), call.alpha, dtype=dtype)
        self.alpha = alpha.expand(v.shape[:3])
        gates = [None if gate is None else gate.to(dtype) for gate in (call.fast_gate, call.slow_gate)]
        shares = (self.alpha, 1 - self.alpha)
        self.gates = tuple(gates)
        fast_gate, slow_gate = (share if gate is None else gate * share for gate, share in zip(gates, shares, strict=True))
        values, beta = v.to(dtype), call.beta.to(dtype)
        self.fast = FastCore(
            q,
            k,
            values * beta[..., None],
            gate=fast_gate,
            chunk_size=call.chunk_size,
            scale=call.scale,
            initial_state=call.initial_fast_state,
            chunk_offset=call.chunk_offset,
            output_final_state=call.output_final_state,
            cu_seqlens=call.cu_seqlens,
        )
        self.slow = GatedDeltaRule(
            q,
            k,
            values,
            beta,
            call.g,
            gate=slow_gate,
            scale=call.scale,
            initial_state=call.initial_state,
            output_final_state=call.output_final_state,
            cu_seqlens=call.cu_seqlens,
        )
        whole = min(call.chunk_size, max(v.shape[1], 1)) <= WHOLE
        self.fast_candidate = Candidate("eager", "chunked") if whole else Candidate("eager", "blocked", (("block", _BLOCK),))
        self.slow_candidate = Candidate("eager", "chunked", (("chunk_size", slow_chunk), ("inverse", "blocks")))


def composed_forward(call: DualCore, slow_chunk: int) -> tuple[Tensor | None, ...]:
    """o and both final states."""
    parts = _Parts(call, slow_chunk)
    fast, fast_state = fast_core.run(parts.fast, parts.fast_candidate)
    slow, state = gated_delta_rule.run(parts.slow, parts.slow_candidate)
    assert fast is not None
    assert slow is not None
    if state is not None and call.normalize_final:
        state = normalized(state)
    return fast.add_(slow).to(call.v.dtype), state, fast_state


def composed_backward(call: DualCore, grads: tuple[Tensor | None, ...], needs: frozenset[str], slow_chunk: int) -> dict[str, Tensor]:
    """Gradients by argument name."""
    parts, dtype = _Parts(call, slow_chunk), compute_dtype(call.v)
    d_o = None if grads[0] is None else grads[0].to(dtype)
    d_final = grads[1]
    if d_final is not None and call.normalize_final:
        raw = gated_delta_rule.run(parts.slow, parts.slow_candidate)[1]
        assert raw is not None
        d_final = normalized_backward(raw, d_final)
    shared = {name for name in ("q", "k", "v", "beta") if name in needs}
    gate_fast, gate_slow = bool(needs & {"fast_gate", "alpha"}), bool(needs & {"slow_gate", "alpha"})
    fast_needs = (shared - {"beta"}) | ({"v"} if "beta" in shared else set()) | ({"gate"} if gate_fast else set())
    fast_needs |= {"initial_state"} if "initial_fast_state" in needs else set()
    slow_needs = shared | ({"g"} & needs) | ({"gate"} if gate_slow else set()) | ({"initial_state"} & needs)
    fast = _named(_FAST, fast_core.run_backward(parts.fast, (d_o, grads[2]), None, frozenset(fast_needs), parts.fast_candidate))
    slow = _named(_SLOW, gated_delta_rule.run_backward(parts.slow, (d_o, d_final), None, frozenset(slow_needs), parts.slow_candidate))
    return _joined(call, parts, fast, slow, needs)


Named = dict[str, Tensor | None]


def _named(names: tuple[str, ...], grads: tuple[Tensor | None, ...]) -> Named:
    return dict(zip(names, grads, strict=True))


def _joined(call: DualCore, parts: _Parts, fast: Named, slow: Named, needs: frozenset[str]) -> dict[str, Tensor]:
    """Both calls' gradients in the terms of the one."""
    out: dict[str, Tensor] = {}
    for name in ("q", "k"):
        if name in needs:
            grad = _both(fast[name], slow[name])
            x = getattr(call, name)
            out[name] = unit_backward(x.to(grad.dtype), grad) if call.qk_l2norm else grad
    d_scaled = fast["v"]  # of b⊙v
    if "v" in needs:
        assert d_scaled is not None
        out["v"] = _both(d_scaled * parts.slow.beta[..., None], slow["v"])
    if "beta" in needs:
        assert d_scaled is not None
        out["beta"] = _both((d_scaled * parts.slow.v).sum(-1), slow["beta"])
    for name, part, share in (("fast_gate", fast, parts.alpha), ("slow_gate", slow, 1 - parts.alpha)):
        if name in needs:
            out[name] = _given(part["gate"]) * share
    if "alpha" in needs:
        by_gate = (_given(fast["gate"]), _given(slow["gate"]))
        d_fast, d_slow = (grad if gate is None else grad * gate for grad, gate in zip(by_gate, parts.gates, strict=True))
        grad, alpha = d_fast - d_slow, call.alpha
        assert isinstance(alpha, Tensor)
        out["alpha"] = grad.sum_to_size(alpha.shape) if alpha.dim() else grad.sum()
    for name, found in (("g", slow["g"]), ("initial_state", slow["initial_state"]), ("initial_fast_state", fast["initial_state"])):
        if name in needs:
            out[name] = _given(found)
    return {name: grad.to(getattr(call, name).dtype).contiguous() for name, grad in out.items()}


def _given(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad


def _both(a: Tensor | None, b: Tensor | None) -> Tensor:
    return _given(a) + _given(b)

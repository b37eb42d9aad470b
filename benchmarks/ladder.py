"""The memory of a plain layer's plan by the registry's ops: the second document's steps, each with and without kernels. Imported by layer_times.py.

Everything around the memory stays plain torch, so that a step's gain is the step's own. Where one op has the whole plan, that op; else the lower ops.
"""

from __future__ import annotations

import torch
from plain_layer import Flux, Inputs, Plan, in_chunks, mean
from torch import Tensor

import titans_backends as tb

__all__ = ["op_core"]


def op_core(plan: Plan, x: Inputs, flux: Flux) -> Tensor:
    """o `[B, T, H, V]` of a plan of memory "states"."""
    chunk = x.chunk_size
    u, w = tb.get_op("uw_transform")(x.k, x.v, x.beta, chunk_size=chunk, transform=plan.transform)
    assert u is not None
    assert w is not None
    psi = wide(flux.chunks(in_chunks(x.k, chunk), in_chunks(u, chunk), counts(x)).transpose(1, 2))
    slow_decay, fast_decay = factor(x.slow_decay, x) * (1 - 0.05 * psi), factor(x.fast_decay, x) * (1 - 0.1 * psi)
    alpha: Tensor | float = 0.5 + 0.3 * flux.tokens(x.k, x.v, x.beta) if plan.flux_merge else plan.alpha
    if plan.normalize == "chunk":
        mixing = psi.mean((0, 2), keepdim=True) if plan.coupling == "batch" else psi
        coupling = torch.zeros_like(psi) if plan.coupling == "none" else (0.05 + 0.1 * mixing).expand_as(psi)
        o = tb.get_op("coupled_core")(
            x.q, x.k, x.v, x.beta, psi,
            coupling=coupling, fast_decay=fast_decay, slow_decay=slow_decay, fast_gate=x.fast_gate, slow_gate=x.slow_gate, alpha=alpha,
            transform=plan.transform, chunk_size=chunk,
        )[0]  # fmt: skip
        assert o is not None
        return o
    slow_core = tb.get_op("slow_core")
    if plan.fast == "state":
        fast, _ = slow_core(x.q, x.k, u, w, chunk_decay=fast_decay, gate=x.fast_gate, chunk_size=chunk, scale=1.0)
        slow, _ = slow_core(x.q, x.k, u, w, chunk_decay=slow_decay, gate=x.slow_gate, chunk_size=chunk, scale=1.0)
        assert fast is not None
        assert slow is not None
        weight = alpha[..., None] if isinstance(alpha, Tensor) else alpha
        return weight * fast + (1 - weight) * slow
    if plan.fast_state:  # nobody reads it: what the step keeps is its cost
        slow_core(x.q, x.k, u, w, chunk_decay=fast_decay, chunk_size=chunk, scale=1.0, output_final_state=True)
    o = tb.get_op("dual_core")(
        x.q, x.k, x.v, x.beta,
        fast_gate=x.fast_gate, slow_gate=x.slow_gate, alpha=alpha, chunk_decay=slow_decay, transform=plan.transform, chunk_size=chunk,
    )[0]  # fmt: skip
    assert o is not None
    return o


def factor(decay: Tensor, x: Inputs) -> Tensor:
    """The mean of each chunk, `[B, M, H]`, float32 at least."""
    return mean(in_chunks(wide(decay), x.chunk_size)[..., None], counts(x))[..., 0].transpose(1, 2)


def wide(x: Tensor) -> Tensor:
    """float32, or float64."""
    return x if x.dtype == torch.float64 else x.float()


def counts(x: Inputs) -> Tensor | None:
    """`[M]`: the tokens of each chunk where the last is shorter; None where all are full."""
    tokens, chunk = x.q.shape[1], x.chunk_size
    missing = -tokens % chunk
    if not missing:
        return None
    full = torch.full((-(-tokens // chunk),), float(chunk), dtype=x.q.dtype, device=x.q.device)
    full[-1] = chunk - missing
    return full

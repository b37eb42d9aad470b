"""gated_delta_rule: the exact gated delta rule from q, k, v, beta and g (Yang et al. 2024, "Gated Delta Networks").

    S <- e^g S;  u = beta (v - S^T k);  S <- S + k u^T;  o = gate * scale * S^T q

Decay, then correct against the decayed state, then read after the write. The chunk size changes nothing but rounding and time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from titans_backends.contracts import arguments as a
from titans_backends.contracts.algebra import expand_heads, l2_normalize, zeros_state
from titans_backends.contracts.case import Variant
from titans_backends.contracts.chunks import sequence_bounds
from titans_backends.contracts.contract import Contract, Output, arithmetic_dtype
from titans_backends.contracts.slow_core import recurrence_flop
from titans_backends.contracts.uw_transform import transform_flop

__all__ = ["CONTRACT", "GRID", "GatedDeltaRule", "delta_rule"]

GRID = 64
"""The chunk size of saved states where the call leaves the chunk size free."""


@dataclass(slots=True, eq=False)
class GatedDeltaRule:
    """Arguments: q, k `[B, T, G, K]`, v `[B, T, H, V]`, beta, g (log decay <= 0), gate `[B, T, H]`; scale None is K ** -0.5."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None = None
    _: KW_ONLY
    gate: Tensor | None = None
    scale: float | None = None
    chunk_size: int | None = None
    initial_state: Tensor | None = None
    output_final_state: bool = False
    qk_l2norm: bool = False
    cu_seqlens: Tensor | None = None


def check(call: GatedDeltaRule, dims: Mapping[str, int]) -> None:
    """The tables say everything."""


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """The token recurrence over `[B, T, H, *]` tensors of the arithmetic's dtype: o without its gate, and the state."""
    outputs = []
    for t in range(q.shape[1]):
        if g is not None:
            state = g[:, t].exp()[..., None, None] * state
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t, :, :, None] * u[:, :, None, :]
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), state


def reference(call: GatedDeltaRule) -> tuple[Tensor | None, ...]:
    """The token recurrence, sequence after sequence."""
    heads, dtype = call.v.shape[2], arithmetic_dtype(call.v.dtype)
    q, k = (expand_heads(x, heads).to(dtype) for x in (call.q, call.k))
    if call.qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    v, beta = call.v.to(dtype), call.beta.to(dtype)
    g = None if call.g is None else call.g.to(dtype)
    scale = k.shape[-1] ** -0.5 if call.scale is None else call.scale
    bounds = sequence_bounds(q.shape[1], call.cu_seqlens)
    start = call.initial_state
    if start is None:
        start = zeros_state(v, q.shape[0] if call.cu_seqlens is None else len(bounds), heads, k.shape[-1], v.shape[-1])
    states = [start] if call.cu_seqlens is None else list(start.split(1))
    outputs = []
    for index, (begin, end) in enumerate(bounds):
        part = slice(begin, end)
        decay = None if g is None else g[:, part]
        o, states[index] = delta_rule(q[:, part], k[:, part], v[:, part], beta[:, part], decay, scale, states[index].to(dtype))
        outputs.append(o)
    o = torch.cat(outputs, 1) if outputs else torch.zeros_like(v)
    if call.gate is not None:
        o = call.gate.to(dtype)[..., None] * o
    return o.to(call.v.dtype), (torch.cat(states) if states else start) if call.output_final_state else None


def work(dims: Mapping[str, int], call: GatedDeltaRule) -> tuple[float, float]:
    """FLOP of the chunk form at 64 tokens a chunk, or of the token rule where that is less."""
    keys, values = dims["K"], dims["V"]
    chunk = min(call.chunk_size or GRID, max(dims["T"], 1))
    chunked = transform_flop(keys, values, chunk, "exact") - chunk * keys + recurrence_flop(keys, values, chunk, delta=True)
    return dims["B"] * dims["T"] * dims["H"] * min(chunked, 7.0 * keys * values), 0.0


CONTRACT = Contract(
    name="gated_delta_rule",
    summary="the exact gated delta rule from q, k, v, beta, g, as one op",
    make_call=GatedDeltaRule,
    arguments=(a.Q, a.K, a.V, a.BETA, a.LOG_DECAY, a.GATE, a.INITIAL_STATE, a.CU_SEQLENS),
    options=(a.SCALE_OR_ROOT, a.chunk_size(None), a.OUTPUT_FINAL_STATE, a.QK_L2NORM),
    outputs=(Output("o", "B T H V", like="v"), Output("final_state", "N H K V", when="output_final_state")),
    check=check,
    reference=reference,
    work=work,
    grid=lambda call: int(getattr(call, "chunk_size") or GRID),  # noqa: B009
    variants=(
        Variant("gated", {"output_final_state": True}, given=("g", "gate", "initial_state")),
        Variant("plain"),
        Variant("normalized keys", {"output_final_state": True, "qk_l2norm": True}, given=("g",)),
        Variant("given chunk", {"output_final_state": True, "chunk_size": 48, "scale": 1.0}, given=("g", "initial_state")),
    ),
)

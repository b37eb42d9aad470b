"""slow_core: S_slow, the chunk recurrence over a state S from given u and w.

    S~ = d_n S                           one factor per chunk, where chunk_decay is given
    U' = u - w S~                        delta=False: U' = u
    o  = gate * (scale (exp(G) * Q) S~ + (tril(scale Q K^T) * Gamma) U')
    S' = exp(G_C) S~ + (exp(G_C - G) * K)^T U'

`normalize_read` puts S~ / (||S~||_F + 1e-8) into U' and o, not into S'; `normalize_final` divides the final state likewise.
With g, w must already carry exp(G), as `uw_transform` makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from titans_backends.contracts import arguments as a
from titans_backends.contracts.algebra import decay_mask, expand_heads, heads_first, normalize_state, zeros_state
from titans_backends.contracts.case import Variant
from titans_backends.contracts.chunks import chunk_spans, sequence_bounds
from titans_backends.contracts.contract import Argument, Contract, Output, arithmetic_dtype

__all__ = ["CONTRACT", "SlowCore", "recurrence_flop"]


@dataclass(slots=True, eq=False)
class SlowCore:
    """Arguments: q, k `[B, T, G, K]`, u `[B, T, H, V]`, w `[B, T, H, K]`, g, gate `[B, T, H]`, chunk_decay `[B, M, H]`, initial_state."""

    q: Tensor
    k: Tensor
    u: Tensor
    w: Tensor
    _: KW_ONLY
    g: Tensor | None = None
    chunk_decay: Tensor | None = None
    gate: Tensor | None = None
    chunk_size: int = 64
    scale: float = 1.0
    initial_state: Tensor | None = None
    output_final_state: bool = False
    cu_seqlens: Tensor | None = None
    delta: bool = True
    normalize_read: bool = False
    normalize_final: bool = False


def check(call: SlowCore, dims: Mapping[str, int]) -> None:
    """One kind of decay at a time."""
    if call.g is not None and call.chunk_decay is not None:
        raise ValueError(
            "slow_core: g and chunk_decay are both given; pass one (log chunk_decay on each chunk's first token, 0 elsewhere, is the same as g)"
        )


def reference(call: SlowCore) -> tuple[Tensor | None, ...]:
    """The recurrence, one chunk at a time."""
    heads, dtype = call.u.shape[2], arithmetic_dtype(call.u.dtype)
    q, k = expand_heads(call.q, heads), expand_heads(call.k, heads)
    sequences = len(sequence_bounds(q.shape[1], call.cu_seqlens)) if call.cu_seqlens is not None else q.shape[0]
    start = call.initial_state
    if start is None:
        start = zeros_state(call.u, sequences, heads, k.shape[-1], call.u.shape[-1])
    start = start.to(dtype)
    states = [start] if call.cu_seqlens is None else list(start.split(1))
    outputs = []
    for span in chunk_spans(q.shape[1], call.chunk_size, call.cu_seqlens):
        qc, kc, uc, wc = (heads_first(x, span.start, span.stop) for x in (q, k, call.u, call.w))
        log_decay = qc.new_zeros(qc.shape[:-1]) if call.g is None else heads_first(call.g, span.start, span.stop).to(dtype).cumsum(-1)
        state = states[span.sequence]
        if call.chunk_decay is not None:
            state = call.chunk_decay[:, span.index].to(dtype)[..., None, None] * state
        read = normalize_state(state) if call.normalize_read else state
        scores = call.scale * (qc @ kc.transpose(-1, -2)) * decay_mask(log_decay)
        update = uc - wc @ read if call.delta else uc
        outputs.append((call.scale * (log_decay.exp()[..., None] * qc) @ read + scores @ update).transpose(1, 2))
        last = log_decay[..., -1:]
        states[span.sequence] = last.exp()[..., None] * state + ((last - log_decay).exp()[..., None] * kc).transpose(-1, -2) @ update
    o = torch.cat(outputs, 1) if outputs else call.u.new_zeros(call.u.shape, dtype=dtype)
    if call.gate is not None:
        o = call.gate.to(dtype)[..., None] * o
    if not call.output_final_state:
        return o.to(call.u.dtype), None
    final = torch.cat(states) if states else start
    return o.to(call.u.dtype), normalize_state(final) if call.normalize_final else final


def recurrence_flop(keys: int, values: int, chunk: int, *, delta: bool) -> float:
    """Multiply-adds, counted as two, per token and head: half of QK^T and of its product with U', the read, the update, w S."""
    return chunk * (keys + values) + (6.0 if delta else 4.0) * keys * values


def work(dims: Mapping[str, int], call: SlowCore) -> tuple[float, float]:
    """FLOP by `recurrence_flop`."""
    chunk = min(call.chunk_size, max(dims["T"], 1))
    return dims["B"] * dims["T"] * dims["H"] * recurrence_flop(dims["K"], dims["V"], chunk, delta=call.delta), 0.0


CONTRACT = Contract(
    name="slow_core",
    summary="S_slow: the gated delta rule's chunk recurrence from u and w, with its state",
    make_call=SlowCore,
    arguments=(
        a.Q,
        a.K,
        Argument("u", ("B T H V",), "operand", "transformed_value"),
        Argument("w", ("B T H K",), "operand", "transformed_key"),
        a.LOG_DECAY,
        a.CHUNK_DECAY,
        a.GATE,
        a.INITIAL_STATE,
        a.CU_SEQLENS,
    ),
    options=(a.chunk_size(64), a.SCALE, a.OUTPUT_FINAL_STATE, a.DELTA, a.NORMALIZE_READ, a.NORMALIZE_FINAL),
    outputs=(Output("o", "B T H V", like="u"), Output("final_state", "N H K V", when="output_final_state")),
    check=check,
    reference=reference,
    work=work,
    grid=lambda call: int(getattr(call, "chunk_size")),  # noqa: B009  (a Call has no static fields)
    variants=(
        Variant("gated", {"output_final_state": True}, given=("g", "gate", "initial_state")),
        Variant("plain"),
        Variant("chunk decay", {"output_final_state": True, "normalize_final": True}, given=("chunk_decay", "gate")),
        Variant("normalized read", {"output_final_state": True, "normalize_read": True}, given=("chunk_decay", "initial_state")),
        Variant("no delta", {"output_final_state": True, "delta": False, "scale": 0.5}, given=("g", "initial_state")),
    ),
)

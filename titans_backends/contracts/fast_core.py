"""fast_core: S_fast, causal linear attention inside each chunk (LAM's fast core, whose v is beta * v).

    o_t = gate_t * scale * sum over j <= t in t's chunk of  Gamma_tj (q_t . k_j) v_j

Token form, which a carried state continues: `W <- 0 if pos % C == 0; W <- e^g W + k v^T; o = gate * scale * W^T q`, where
pos starts at `chunk_offset`. So `final_state` is W after the last token, and with `chunk_offset=0` the first token
clears an initial state: a sequence split at a chunk's end goes on exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from titans_backends.contracts import arguments as a
from titans_backends.contracts.algebra import decay_mask, expand_heads, heads_first, zeros_state
from titans_backends.contracts.case import Variant
from titans_backends.contracts.chunks import chunk_spans, sequence_bounds
from titans_backends.contracts.contract import Contract, Output, arithmetic_dtype

__all__ = ["CONTRACT", "FastCore", "check_offset"]


@dataclass(slots=True, eq=False)
class FastCore:
    """Arguments: q, k `[B, T, G, K]`, v `[B, T, H, V]`, gate, g (log decay <= 0) `[B, T, H]`, initial_state W `[N, H, K, V]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    _: KW_ONLY
    gate: Tensor | None = None
    g: Tensor | None = None
    chunk_size: int = 128
    scale: float = 1.0
    initial_state: Tensor | None = None
    chunk_offset: int = 0
    output_final_state: bool = False
    cu_seqlens: Tensor | None = None


def check_offset(op: str, chunk_offset: int, chunk_size: int) -> None:
    """An offset lies inside a chunk."""
    if not 0 <= chunk_offset < chunk_size:
        raise ValueError(f"{op}: chunk_offset must be in [0, chunk_size) = [0, {chunk_size}), got {chunk_offset}; pass position % chunk_size")


def check(call: FastCore, dims: Mapping[str, int]) -> None:
    """The offset lies inside a chunk."""
    check_offset("fast_core", call.chunk_offset, call.chunk_size)


def reference(call: FastCore) -> tuple[Tensor | None, ...]:
    """The chunk form, one chunk at a time."""
    heads = call.v.shape[2]
    q, k = expand_heads(call.q, heads), expand_heads(call.k, heads)
    sequences = len(sequence_bounds(q.shape[1], call.cu_seqlens)) if call.cu_seqlens is not None else q.shape[0]
    start = call.initial_state
    if start is None:
        start = zeros_state(call.v, sequences, heads, k.shape[-1], call.v.shape[-1])
    states = [start.to(arithmetic_dtype(call.v.dtype))] if call.cu_seqlens is None else list(start.split(1))
    outputs = []
    for span in chunk_spans(q.shape[1], call.chunk_size, call.cu_seqlens, call.chunk_offset):
        qc, kc, vc = (heads_first(x, span.start, span.stop) for x in (q, k, call.v))
        log_decay = qc.new_zeros(qc.shape[:-1]) if call.g is None else heads_first(call.g, span.start, span.stop).to(qc.dtype).cumsum(-1)
        carried = states[span.sequence] if span.first and call.chunk_offset else torch.zeros_like(states[span.sequence])
        scores = call.scale * (qc @ kc.transpose(-1, -2)) * decay_mask(log_decay)
        outputs.append((scores @ vc + call.scale * (log_decay.exp()[..., None] * qc) @ carried).transpose(1, 2))
        last = log_decay[..., -1:]
        states[span.sequence] = last.exp()[..., None] * carried + ((last - log_decay).exp()[..., None] * kc).transpose(-1, -2) @ vc
    o = torch.cat(outputs, 1) if outputs else torch.zeros_like(call.v, dtype=arithmetic_dtype(call.v.dtype))
    if call.gate is not None:
        o = call.gate.to(o.dtype)[..., None] * o
    return o.to(call.v.dtype), (torch.cat(states) if states else start) if call.output_final_state else None


def work(dims: Mapping[str, int], call: FastCore) -> tuple[float, float]:
    """FLOP: half of QK^T and of its product with V, or a running state where that is less. Tensor elements are added by the core."""
    tokens, chunk = dims["B"] * dims["T"] * dims["H"], min(call.chunk_size, max(dims["T"], 1))
    keys, values = dims["K"], dims["V"]
    return tokens * min(chunk * (keys + values), 4.0 * keys * values), 0.0


CONTRACT = Contract(
    name="fast_core",
    summary="S_fast: causal linear attention inside each chunk, gated",
    make_call=FastCore,
    arguments=(a.Q, a.K, a.V, a.GATE, a.LOG_DECAY, a.INITIAL_STATE, a.CU_SEQLENS),
    options=(a.chunk_size(128), a.SCALE, a.CHUNK_OFFSET, a.OUTPUT_FINAL_STATE),
    outputs=(Output("o", "B T H V", like="v"), Output("final_state", "N H K V", when="output_final_state")),
    check=check,
    reference=reference,
    work=work,
    variants=(
        Variant("plain", given=("gate",)),
        Variant("decayed", {"chunk_size": 64, "scale": 0.5, "output_final_state": True}, given=("gate", "g")),
        Variant(
            "continued",
            {"chunk_size": 64, "chunk_offset": 17, "output_final_state": True},
            given=("g", "initial_state"),
        ),
    ),
)

"""coupled_core: two normalised states that read apart, write apart and mix after every chunk (LAM's earlier version, "LAM Before").

For both cores x in (fast, slow), chunk n, with u and w of uw_transform, N(S) = S / (||S||_F + 1e-8), M = tril(scale Q K^T):

    S~_x = decay_x,n S_x
    U'_x = u - w N(S~_x)                      delta=False: U'_x = u
    o    = alpha * fast_gate * (scale Q N(S~_f) + M U'_f)  +  (1 - alpha) * slow_gate * (scale Q N(S~_s) + M U'_s)
    X_x  = S~_x + K^T U'_x
    S_f  = N(X_f + c_n psi_n X_s),   S_s = N(X_s + c_n (1 - psi_n) X_f)

`coupling` is c_n; None takes 0.05 + 0.1 psi_n, each head for itself. LAM averages psi over the batch and the heads there, so that a row depends on its
neighbours; its numbers come from `coupling=(0.05 + 0.1 * psi.mean((0, 2), keepdim=True)).expand_as(psi)`. LAM's blend is alpha = 0.5 + 0.3 token flux, its
decays are mean(fast_decay) (1 - 0.1 psi) and mean(slow_decay) (1 - 0.05 psi) over each chunk. Its dropout on K^T U' in training is not part of the op.
`chunk_size` is part of the function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from titans_backends.contracts import arguments as a
from titans_backends.contracts.algebra import expand_heads, heads_first, l2_normalize, normalize_state, zeros_state
from titans_backends.contracts.case import Variant
from titans_backends.contracts.chunks import Span, chunk_spans, sequence_bounds
from titans_backends.contracts.contract import Argument, Contract, Output, arithmetic_dtype
from titans_backends.contracts.slow_core import recurrence_flop
from titans_backends.contracts.uw_transform import UWTransform, transform_flop
from titans_backends.contracts.uw_transform import reference as transform_reference

__all__ = ["CONTRACT", "COUPLING_BASE", "COUPLING_SLOPE", "CoupledCore"]

COUPLING_BASE, COUPLING_SLOPE = 0.05, 0.1
"""c_n = COUPLING_BASE + COUPLING_SLOPE psi_n where `coupling` is not given."""


@dataclass(slots=True, eq=False)
class CoupledCore:
    """Arguments: q, k `[B, T, G, K]`, v `[B, T, H, V]`, beta, gates `[B, T, H]`, psi, coupling and decays `[B, M, H]`, alpha as in dual_core, states."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    psi: Tensor
    _: KW_ONLY
    coupling: Tensor | None = None
    fast_decay: Tensor | None = None
    slow_decay: Tensor | None = None
    fast_gate: Tensor | None = None
    slow_gate: Tensor | None = None
    alpha: float | Tensor = 0.5
    transform: str = "exact"
    chunk_size: int = 64
    scale: float = 1.0
    initial_state: Tensor | None = None
    initial_fast_state: Tensor | None = None
    output_final_state: bool = False
    qk_l2norm: bool = False
    cu_seqlens: Tensor | None = None
    delta: bool = True


def check(call: CoupledCore, dims: Mapping[str, int]) -> None:
    """The tables say everything."""


States = tuple[Tensor, Tensor]


def initial_states(call: CoupledCore, dtype: torch.dtype) -> list[States]:
    """(fast, slow) of every packed sequence, `[1, H, K, V]` each; one entry `[B, H, K, V]` for a dense call."""
    heads, values = call.v.shape[2:]
    sequences = call.v.shape[0] if call.cu_seqlens is None else len(sequence_bounds(call.v.shape[1], call.cu_seqlens))
    empty = zeros_state(call.v, sequences, heads, call.k.shape[-1], values)
    fast, slow = (empty if given is None else given.to(dtype) for given in (call.initial_fast_state, call.initial_state))
    return [(fast, slow)] if call.cu_seqlens is None else list(zip(fast.split(1), slow.split(1), strict=True))


def coupled(states: States, call: CoupledCore, span: Span) -> States:
    """Both states mixed, the old values on the right, and normalised."""
    fast, slow = states
    psi = call.psi[:, span.index].to(fast.dtype)[..., None, None]
    given = call.coupling
    coupling = COUPLING_BASE + COUPLING_SLOPE * psi if given is None else given[:, span.index].to(fast.dtype)[..., None, None]
    return normalize_state(fast + coupling * psi * slow), normalize_state(slow + coupling * (1 - psi) * fast)


def reference(call: CoupledCore) -> tuple[Tensor | None, ...]:
    """The recurrence, one chunk at a time."""
    heads, dtype = call.v.shape[2], arithmetic_dtype(call.v.dtype)
    q, k = call.q.to(dtype), call.k.to(dtype)
    if call.qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    u, w = transform_reference(
        UWTransform(k, call.v.to(dtype), call.beta.to(dtype), chunk_size=call.chunk_size, transform=call.transform, cu_seqlens=call.cu_seqlens)
    )
    assert u is not None
    assert w is not None
    q, k = expand_heads(q, heads), expand_heads(k, heads)
    states = initial_states(call, dtype)
    by_core: tuple[list[Tensor], list[Tensor]] = ([], [])
    for span in chunk_spans(q.shape[1], call.chunk_size, call.cu_seqlens):
        qc, kc, uc, wc = (heads_first(x, span.start, span.stop) for x in (q, k, u, w))
        scores = call.scale * (qc @ kc.transpose(-1, -2)).tril()
        written = []
        for state, decay, parts in zip(states[span.sequence], (call.fast_decay, call.slow_decay), by_core, strict=True):
            kept = state if decay is None else decay[:, span.index].to(dtype)[..., None, None] * state
            read = normalize_state(kept)
            update = uc - wc @ read if call.delta else uc
            parts.append((call.scale * qc @ read + scores @ update).transpose(1, 2))
            written.append(kept + kc.transpose(-1, -2) @ update)
        states[span.sequence] = coupled((written[0], written[1]), call, span)
    fast, slow = (torch.cat(parts, 1) if parts else torch.zeros_like(call.v, dtype=dtype) for parts in by_core)
    fast = fast if call.fast_gate is None else call.fast_gate.to(dtype)[..., None] * fast
    slow = slow if call.slow_gate is None else call.slow_gate.to(dtype)[..., None] * slow
    alpha = call.alpha
    if isinstance(alpha, Tensor):
        alpha = alpha.to(dtype)[..., None] if alpha.dim() else alpha.to(dtype)
    o = (alpha * fast + (1 - alpha) * slow).to(call.v.dtype)
    if not call.output_final_state:
        return o, None, None
    if not states:  # packed, without a sequence
        return o, *(zeros_state(call.v, 0, heads, k.shape[-1], call.v.shape[-1]) for _ in range(2))
    return o, torch.cat([slow_state for _, slow_state in states]), torch.cat([fast_state for fast_state, _ in states])


def work(dims: Mapping[str, int], call: CoupledCore) -> tuple[float, float]:
    """FLOP: one transform and one QK^T for both cores, and two recurrences."""
    keys, values = dims["K"], dims["V"]
    chunk = min(call.chunk_size, max(dims["T"], 1))
    cores = 2 * recurrence_flop(keys, values, chunk, delta=call.delta) - chunk * keys
    return dims["B"] * dims["T"] * dims["H"] * (transform_flop(keys, values, chunk, call.transform) + cores), 0.0


CONTRACT = Contract(
    name="coupled_core",
    summary="two normalised states with cross-coupling after every chunk: LAM's earlier loop",
    make_call=CoupledCore,
    arguments=(
        a.Q,
        a.K,
        a.V,
        a.BETA,
        Argument("psi", ("B M H",), "gate", "gate"),
        Argument("coupling", ("B M H",), "gate", "gate", optional=True),
        Argument("fast_decay", ("B M H",), "gate", "decay_factor", optional=True),
        Argument("slow_decay", ("B M H",), "gate", "decay_factor", optional=True),
        Argument("fast_gate", ("B T H",), "gate", "gate", optional=True),
        Argument("slow_gate", ("B T H",), "gate", "gate", optional=True),
        Argument("alpha", ("", "H", "B T H"), "gate", "mixing", optional=True),
        a.INITIAL_STATE,
        Argument("initial_fast_state", ("N H K V",), "state", "state", optional=True),
        a.CU_SEQLENS,
    ),
    options=(a.TRANSFORM, a.chunk_size(64), a.SCALE, a.OUTPUT_FINAL_STATE, a.QK_L2NORM, a.DELTA),
    outputs=(
        Output("o", "B T H V", like="v"),
        Output("final_state", "N H K V", when="output_final_state"),
        Output("final_fast_state", "N H K V", when="output_final_state"),
    ),
    check=check,
    reference=reference,
    work=work,
    variants=(
        # A decay cancels in the next read, and the mixing where both states are parallel (as without states and decays): then the gradients of the
        # numbers per chunk would be nothing but rounding. So the variants have states at one end at least, and several chunks.
        Variant(
            "coupled",
            {"output_final_state": True, "chunk_size": 32},
            given=("fast_decay", "slow_decay", "fast_gate", "slow_gate", "alpha", "initial_state", "initial_fast_state"),
        ),
        Variant(
            "lam",
            {"transform": "lam", "output_final_state": True, "chunk_size": 32},
            given=("coupling", "fast_decay", "slow_decay", "fast_gate", "slow_gate", "alpha"),
            gentle=True,
        ),
        Variant("plain", {"qk_l2norm": True, "scale": 0.5, "chunk_size": 32}, given=("initial_fast_state",)),
        Variant("no delta", {"output_final_state": True, "delta": False, "transform": "none"}, given=("slow_decay", "initial_fast_state")),
    ),
)

"""dual_core: S_fast and S_slow with their merge.

    o = alpha * fast_core(q, k, beta * v, gate=fast_gate)  +  (1 - alpha) * slow

"recurrent": slow is slow_core on uw_transform's u and w, state carried across chunks. "flat": slow is slow_gate * (tril(scale Q K^T) * Gamma) u,
every chunk from an empty memory, so nothing crosses a chunk and there are no states (LAM's current inference, with transform "lam").
`chunk_size` is part of the function for S_fast always, for S_slow unless it is the exact delta rule without chunk_decay and normalize_read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from titans_backends.contracts import arguments as a
from titans_backends.contracts.algebra import decay_mask, expand_heads, heads_first, l2_normalize, normalize_state
from titans_backends.contracts.case import Variant
from titans_backends.contracts.chunks import chunk_spans
from titans_backends.contracts.contract import Argument, Contract, Option, Output, arithmetic_dtype
from titans_backends.contracts.fast_core import FastCore, check_offset
from titans_backends.contracts.fast_core import reference as fast_reference
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.contracts.gated_delta_rule import reference as rule_reference
from titans_backends.contracts.slow_core import SlowCore, recurrence_flop
from titans_backends.contracts.slow_core import reference as slow_reference
from titans_backends.contracts.uw_transform import UWTransform, transform_flop
from titans_backends.contracts.uw_transform import reference as transform_reference

__all__ = ["CONTRACT", "DualCore", "is_exact_rule"]


@dataclass(slots=True, eq=False)
class DualCore:
    """Arguments: q, k `[B, T, G, K]`, v `[B, T, H, V]`, beta, g, gates `[B, T, H]`, alpha a number, 0-d, `[H]` or `[B, T, H]`, states."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None = None
    _: KW_ONLY
    fast_gate: Tensor | None = None
    slow_gate: Tensor | None = None
    alpha: float | Tensor = 0.1
    memory: str = "recurrent"
    transform: str = "exact"
    chunk_decay: Tensor | None = None
    chunk_size: int = 128
    scale: float = 1.0
    initial_state: Tensor | None = None
    initial_fast_state: Tensor | None = None
    chunk_offset: int = 0
    output_final_state: bool = False
    qk_l2norm: bool = False
    cu_seqlens: Tensor | None = None
    delta: bool = True
    normalize_read: bool = False
    normalize_final: bool = False


def is_exact_rule(call: DualCore) -> bool:
    """Whether S_slow is the exact delta rule, whose chunk size is free."""
    return call.memory == "recurrent" and call.transform == "exact" and call.delta and not call.normalize_read and call.chunk_decay is None


def check(call: DualCore, dims: Mapping[str, int]) -> None:
    """One kind of decay, an offset only where a sequence may be split, nothing about states in the flat mode."""
    check_offset("dual_core", call.chunk_offset, call.chunk_size)
    if call.g is not None and call.chunk_decay is not None:
        raise ValueError("dual_core: g and chunk_decay are both given; pass one")
    if call.chunk_offset:
        reasons = [
            name
            for name, present in {
                "chunk_decay": call.chunk_decay is not None,
                "normalize_read=True": call.normalize_read,
                "delta=False": not call.delta,
                f"transform={call.transform!r}": call.transform != "exact",
            }.items()
            if present
        ]
        if reasons:
            raise ValueError(
                f"dual_core: chunk_offset={call.chunk_offset} cannot be combined with {', '.join(reasons)}: "
                "such a chunk cannot be continued from its state; split the sequence at a multiple of chunk_size"
            )
    if call.memory == "flat":
        meaningless = {
            "initial_state": call.initial_state is not None,
            "initial_fast_state": call.initial_fast_state is not None,
            "output_final_state=True": call.output_final_state,
            "chunk_decay": call.chunk_decay is not None,
            "delta=False": not call.delta,
            "normalize_read=True": call.normalize_read,
            "normalize_final=True": call.normalize_final,
        }
        wrong = [name for name, present in meaningless.items() if present]
        if wrong:
            raise ValueError(
                f"dual_core: memory='flat' carries no state, so {', '.join(wrong)} has no meaning there; drop it or pass memory='recurrent'"
            )


def flat_reference(q: Tensor, k: Tensor, call: DualCore) -> Tensor:
    """The slow core of the flat mode, without its gate. A shifted grid is the exact rule from an empty memory in every chunk."""
    outputs = []
    for span in chunk_spans(q.shape[1], call.chunk_size, call.cu_seqlens, call.chunk_offset):
        part = slice(span.start, span.stop)
        g = None if call.g is None else call.g[:, part]
        length = span.stop - span.start
        u, _ = transform_reference(UWTransform(k[:, part], call.v[:, part], call.beta[:, part], g, chunk_size=length, transform=call.transform))
        assert u is not None
        heads = u.shape[2]
        qc, kc, uc = (heads_first(x, 0, length) for x in (expand_heads(q[:, part], heads), expand_heads(k[:, part], heads), u))
        log_decay = qc.new_zeros(qc.shape[:-1]) if g is None else heads_first(g, 0, length).to(qc.dtype).cumsum(-1)
        outputs.append((call.scale * (qc @ kc.transpose(-1, -2)) * decay_mask(log_decay) @ uc).transpose(1, 2))
    return torch.cat(outputs, 1) if outputs else torch.zeros_like(call.v)


def slow_part(q: Tensor, k: Tensor, call: DualCore) -> tuple[Tensor, Tensor | None]:
    """The slow core with its gate, and its final state where asked."""
    if call.memory == "flat":
        o = flat_reference(q, k, call)
        return (o if call.slow_gate is None else call.slow_gate.to(o.dtype)[..., None] * o), None
    if is_exact_rule(call):
        exact = GatedDeltaRule(
            q, k, call.v, call.beta, call.g, gate=call.slow_gate, scale=call.scale, initial_state=call.initial_state,
            output_final_state=call.output_final_state, cu_seqlens=call.cu_seqlens,
        )  # fmt: skip
        found, state = rule_reference(exact)
        if state is not None and call.normalize_final:
            state = normalize_state(state)
    else:
        u, w = transform_reference(
            UWTransform(k, call.v, call.beta, call.g, chunk_size=call.chunk_size, transform=call.transform, cu_seqlens=call.cu_seqlens)
        )
        assert u is not None
        assert w is not None
        found, state = slow_reference(
            SlowCore(
                q, k, u, w, g=call.g, chunk_decay=call.chunk_decay, gate=call.slow_gate, chunk_size=call.chunk_size, scale=call.scale,
                initial_state=call.initial_state, output_final_state=call.output_final_state, cu_seqlens=call.cu_seqlens,
                delta=call.delta, normalize_read=call.normalize_read, normalize_final=call.normalize_final,
            )
        )  # fmt: skip
    assert found is not None
    return found, state


def reference(call: DualCore) -> tuple[Tensor | None, ...]:
    """The two cores and the merge."""
    dtype = arithmetic_dtype(call.v.dtype)
    q, k, v, beta = call.q.to(dtype), call.k.to(dtype), call.v.to(dtype), call.beta.to(dtype)
    if call.qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    wide = DualCore(**{name: getattr(call, name) for name in CONTRACT.parameters} | {"v": v, "beta": beta})
    fast, fast_state = fast_reference(
        FastCore(
            q, k, beta[..., None] * v, gate=call.fast_gate, chunk_size=call.chunk_size, scale=call.scale, initial_state=call.initial_fast_state,
            chunk_offset=call.chunk_offset, output_final_state=call.output_final_state, cu_seqlens=call.cu_seqlens,
        )
    )  # fmt: skip
    slow, state = slow_part(q, k, wide)
    assert fast is not None
    alpha = call.alpha
    if isinstance(alpha, Tensor):
        alpha = alpha.to(dtype)[..., None] if alpha.dim() else alpha.to(dtype)
    return (alpha * fast + (1 - alpha) * slow).to(call.v.dtype), state, fast_state


def work(dims: Mapping[str, int], call: DualCore) -> tuple[float, float]:
    """FLOP: one QK^T and one K K^T for both cores; the recurrent mode adds the state's."""
    keys, values = dims["K"], dims["V"]
    chunk = min(call.chunk_size, max(dims["T"], 1))
    transform = transform_flop(keys, values, chunk, call.transform)
    fast = chunk * values
    slow = chunk * (keys + values) if call.memory == "flat" else recurrence_flop(keys, values, chunk, delta=call.delta)
    unused = chunk * keys if call.memory == "flat" and call.transform != "none" else 0.0  # w
    return dims["B"] * dims["T"] * dims["H"] * (transform - unused + fast + slow), 0.0


CONTRACT = Contract(
    name="dual_core",
    summary="S_fast and S_slow with their merge, recurrent or flat",
    make_call=DualCore,
    arguments=(
        a.Q,
        a.K,
        a.V,
        a.BETA,
        a.LOG_DECAY,
        Argument("fast_gate", ("B T H",), "gate", "gate", optional=True),
        Argument("slow_gate", ("B T H",), "gate", "gate", optional=True),
        Argument("alpha", ("", "H", "B T H"), "gate", "mixing", optional=True),
        a.CHUNK_DECAY,
        a.INITIAL_STATE,
        Argument("initial_fast_state", ("N H K V",), "state", "state", optional=True),
        a.CU_SEQLENS,
    ),
    options=(
        Option("memory", "str", "recurrent", choices=("recurrent", "flat")),
        a.TRANSFORM,
        a.chunk_size(128),
        a.SCALE,
        a.CHUNK_OFFSET,
        a.OUTPUT_FINAL_STATE,
        a.QK_L2NORM,
        a.DELTA,
        a.NORMALIZE_READ,
        a.NORMALIZE_FINAL,
    ),
    outputs=(
        Output("o", "B T H V", like="v"),
        Output("final_state", "N H K V", when="output_final_state"),
        Output("final_fast_state", "N H K V", when="output_final_state"),
    ),
    check=check,
    reference=reference,
    work=work,
    variants=(
        Variant("recurrent", {"chunk_size": 64, "output_final_state": True}, given=("g", "fast_gate", "slow_gate", "alpha", "initial_state")),
        Variant("flat", {"memory": "flat", "transform": "lam"}, given=("fast_gate", "slow_gate"), gentle=True),
        Variant("flat exact", {"memory": "flat", "chunk_size": 64}, given=("g", "alpha")),
        Variant(
            "continued",
            {"chunk_size": 64, "chunk_offset": 17, "output_final_state": True, "qk_l2norm": True},
            given=("g", "initial_state", "initial_fast_state"),
        ),
        Variant(
            "lam with chunk decay",
            {"chunk_size": 64, "transform": "lam", "delta": False, "output_final_state": True, "normalize_final": True},
            given=("chunk_decay", "slow_gate"),
            gentle=True,
        ),
        Variant(  # without an initial state the decay would cancel in the read, and its gradient be nothing but rounding
            "normalized read", {"chunk_size": 64, "normalize_read": True, "output_final_state": True}, given=("chunk_decay", "initial_state")
        ),
    ),
)

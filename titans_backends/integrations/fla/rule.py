"""One call of FLA's as our ops take it: dtypes made one, gates computed, the state turned to our layout and back, decode told from the rest.

`gated_delta_step` runs up to eight tokens that need no gradient, `gated_delta_rule` everything else. A rule that is only looked at launches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from titans_backends.contracts.gated_delta_step import MAX_TOKENS
from titans_backends.integrations.fla.gates import decay_of, gates_of, rate_of, wide
from titans_backends.op import get_op

__all__ = ["DeltaRule", "OpName", "compute", "op_for", "state_shape"]

OpName = Literal["gated_delta_rule", "gated_delta_step"]


@dataclass(frozen=True, slots=True)
class DeltaRule:
    """What a call of FLA's asks for: q, k `[B, T, G, K]`, v `[B, T, H, V]`, beta (None: ones), g (None: no decay) `[B, T, H]`, A_log and dt_bias `[H]`.

    With A_log g is the gate before its activation; with `beta_logits` beta is before its sigmoid, which `doubled` doubles. The state is
    `[N, H, K, V]`, or `[N, H, V, K]` with `state_v_first`.
    """

    function: str
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    g: Tensor | None
    output_dtype: torch.dtype
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    beta_logits: bool = False
    doubled: bool = False
    scale: float | None = None
    initial_state: Tensor | None = None
    output_final_state: bool = False
    qk_l2norm: bool = False
    state_v_first: bool = False
    cu_seqlens: Tensor | None = None
    chunk_size: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of q, k and v in the op: theirs, or what holds all three."""
        return torch.promote_types(torch.promote_types(self.q.dtype, self.k.dtype), self.v.dtype)


def op_for(rule: DeltaRule) -> OpName:
    """The op that computes a rule."""
    if rule.cu_seqlens is not None or rule.chunk_size is not None or rule.q.dim() != 4 or not 1 <= rule.q.shape[1] <= MAX_TOKENS:
        return "gated_delta_rule"
    tensors = (rule.q, rule.k, rule.v, rule.beta, rule.g, rule.A_log, rule.dt_bias, rule.initial_state)
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return "gated_delta_rule" if differentiated else "gated_delta_step"


def compute(rule: DeltaRule, backend: str | None = None) -> tuple[Tensor, Tensor | None]:
    """o `[B, T, H, V]` in the rule's output dtype, and the final state in float32 and the given layout, None unless asked for.

    A state that is turned is a view, so that handing it back costs nothing.
    """
    dtype = rule.dtype
    q, k, v = rule.q.to(dtype), rule.k.to(dtype), rule.v.to(dtype)
    beta, g = _gates(rule, v)
    state = rule.initial_state
    if state is not None:
        state = (state.transpose(-1, -2) if rule.state_v_first else state).to(wide(dtype))
    if op_for(rule) == "gated_delta_step":
        if state is None:
            state = torch.zeros(q.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=wide(dtype), device=v.device)
        o, final = get_op("gated_delta_step")(q, k, v, beta, g, state=state, scale=rule.scale, qk_l2norm=rule.qk_l2norm, backend=backend)
        final = final if rule.output_final_state else None
    else:
        o, final = get_op("gated_delta_rule")(
            q, k, v, beta, g,
            scale=rule.scale, chunk_size=rule.chunk_size, initial_state=state, output_final_state=rule.output_final_state,
            qk_l2norm=rule.qk_l2norm, cu_seqlens=rule.cu_seqlens, backend=backend,
        )  # fmt: skip
    assert o is not None
    if final is not None and rule.state_v_first:
        final = final.transpose(-1, -2)
    return o.to(rule.output_dtype), final


def state_shape(rule: DeltaRule) -> tuple[int, int, int, int]:
    """The shape of a rule's states, in the caller's layout."""
    sequences = rule.q.shape[0] if rule.cu_seqlens is None else rule.cu_seqlens.shape[0] - 1
    keys, values = rule.q.shape[-1], rule.v.shape[-1]
    return (sequences, rule.v.shape[2], values, keys) if rule.state_v_first else (sequences, rule.v.shape[2], keys, values)


def _gates(rule: DeltaRule, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """beta and g of a rule as our ops take them beside v."""
    if rule.beta is not None and rule.beta_logits and rule.g is not None and rule.A_log is not None:
        decay, rate = gates_of(rule.function, rule.g, rule.beta, rule.A_log, rule.dt_bias, rule.doubled)
        return _gate(rate, v.dtype), _gate(decay, v.dtype)
    beta = v.new_ones(v.shape[:3]) if rule.beta is None else rate_of(rule.beta, rule.beta_logits, rule.doubled)
    g = rule.g
    if g is not None and rule.A_log is not None:
        g = decay_of(rule.function, g, rule.A_log, rule.dt_bias)
    return _gate(beta, v.dtype), None if g is None else _gate(g, v.dtype)


def _gate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A gate as our ops take it: of the operands' dtype, or wide."""
    return x if x.dtype == dtype or x.dtype == wide(dtype) else x.to(wide(dtype))

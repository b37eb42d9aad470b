"""FLA's four functions of the delta rule, with its signatures and its meaning, computed by our ops: what a model imports instead of `fla.ops`.

An option of FLA's is computed, or refused by name; a keyword that nobody knows is a TypeError, where FLA would drop it. Beyond FLA: gradients through
the `fused_recurrent` functions, grouped value heads in the ungated ones, float32 and float64, a CPU, `torch.compile(fullgraph=True)`.

Each function reads its arguments into a `DeltaRule` and computes that. `READERS` holds the reading alone, for who only asks whether a call is one of ours.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec

from torch import Tensor

from titans_backends.integrations.fla import keywords as words
from titans_backends.integrations.fla.rule import DeltaRule, compute

__all__ = ["READERS", "chunk_delta_rule", "chunk_gated_delta_rule", "fused_recurrent_delta_rule", "fused_recurrent_gated_delta_rule"]

Arguments = ParamSpec("Arguments")


READERS: dict[str, Callable[..., DeltaRule]] = {}
"""The reading of each function's arguments, by its name."""


def _computed(read: Callable[Arguments, DeltaRule]) -> Callable[Arguments, tuple[Tensor, Tensor | None]]:
    """The function that reads its arguments so, and computes what it read."""

    @functools.wraps(read)
    def function(*args: Arguments.args, **kwargs: Arguments.kwargs) -> tuple[Tensor, Tensor | None]:
        return compute(read(*args, **kwargs))

    READERS[read.__name__] = read
    signature = inspect.signature(read)
    function.__signature__ = signature.replace(return_annotation="tuple[Tensor, Tensor | None]")  # type: ignore[attr-defined]  # what `inspect` shows
    return function


@_computed
def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: object = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int | None = None,
    **unknown: object,
) -> DeltaRule:
    """o `[B, T, HV, V]` in q's dtype, and the final state in float32, `[N, HV, K, V]` or with `state_v_first` `[N, HV, V, K]`; None unless asked for.

    q, k `[B, T, H, K]`, v `[B, T, HV, V]`, g (log decay <= 0; before its activation with `use_gate_in_kernel`; None: no decay) and beta (logits with
    `use_beta_sigmoid_in_kernel`; None: ones) `[B, T, HV]`, A_log and dt_bias `[HV]`. ValueError or TypeError for what is not computed, by name.
    """
    name = "chunk_gated_delta_rule"
    state_v_first = words.state_layout(name, state_v_first, unknown)
    words.refuse_unknown(name, unknown)
    words.refuse_operands(name, q=q, k=k, v=v)
    words.refuse_context(name, cp_context)
    words.refuse_hints(name, cu_seqlens, cu_seqlens_cpu, chunk_indices)
    words.refuse_chunk_size(name, chunk_size)
    words.refuse_gates(name, g, A_log, dt_bias, use_gate_in_kernel)
    words.refuse_beta(name, beta, v, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    rule = DeltaRule(
        name, q, k, v, beta, g, q.dtype, A_log, dt_bias, bool(use_beta_sigmoid_in_kernel), bool(allow_neg_eigval), scale, initial_state,
        bool(output_final_state), bool(use_qk_l2norm_in_kernel), state_v_first, cu_seqlens, chunk_size,
    )  # fmt: skip
    words.refuse_state(rule)
    return rule


@_computed
def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **unknown: object,
) -> DeltaRule:
    """The same as `chunk_gated_delta_rule`, in FLA's order of arguments, and o in v's dtype; gradients too. gk and gv are refused."""
    name = "fused_recurrent_gated_delta_rule"
    state_v_first = words.state_layout(name, state_v_first, unknown)
    words.refuse_unknown(name, unknown)
    words.refuse_operands(name, q=q, k=k, v=v)
    words.refuse_channel_decay(name, gk, gv)
    words.refuse_gates(name, g, A_log, dt_bias, use_gate_in_kernel)
    words.refuse_beta(name, beta, v, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    rule = DeltaRule(
        name, q, k, v, beta, g, v.dtype, A_log, dt_bias, bool(use_beta_sigmoid_in_kernel), bool(allow_neg_eigval), scale, initial_state,
        bool(output_final_state), bool(use_qk_l2norm_in_kernel), state_v_first, cu_seqlens,
    )  # fmt: skip
    words.refuse_state(rule)
    return rule


@_computed
def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    **unknown: object,
) -> DeltaRule:
    """o `[B, T, HV, V]` in q's dtype, and the final state `[N, HV, K, V]` in float32, None unless asked for: the rule without a decay.

    q, k `[B, T, H, K]`, v `[B, T, HV, V]`, beta (None: ones) `[B, T, HV]`. float32 as well, which FLA's own refuses.
    """
    name = "chunk_delta_rule"
    words.refuse_unknown(name, unknown)
    words.refuse_operands(name, q=q, k=k, v=v)
    words.refuse_hints(name, cu_seqlens, cu_seqlens_cpu)
    words.refuse_chunk_size(name, chunk_size)
    words.refuse_beta(name, beta, v)
    rule = DeltaRule(
        name, q, k, v, beta, None, q.dtype, scale=scale, initial_state=initial_state, output_final_state=bool(output_final_state),
        qk_l2norm=bool(use_qk_l2norm_in_kernel), cu_seqlens=cu_seqlens, chunk_size=chunk_size,
    )  # fmt: skip
    words.refuse_state(rule)
    return rule


@_computed
def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **unknown: object,
) -> DeltaRule:
    """The same as `chunk_delta_rule`."""
    name = "fused_recurrent_delta_rule"
    words.refuse_unknown(name, unknown)
    words.refuse_operands(name, q=q, k=k, v=v)
    words.refuse_beta(name, beta, v)
    rule = DeltaRule(
        name, q, k, v, beta, None, q.dtype, scale=scale, initial_state=initial_state, output_final_state=bool(output_final_state),
        qk_l2norm=bool(use_qk_l2norm_in_kernel), cu_seqlens=cu_seqlens,
    )  # fmt: skip
    words.refuse_state(rule)
    return rule

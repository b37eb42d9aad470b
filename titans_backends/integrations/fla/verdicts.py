"""Whether a call of FLA's is one for our ops: asked before the call, of its facts alone. It launches nothing and computes nothing.

No, where a function refuses the arguments, where no backend takes the call, and where on a GPU only eager does, which FLA's kernels outrun.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from titans_backends import library
from titans_backends.autocasting import autocast
from titans_backends.contracts import contract
from titans_backends.contracts.contract import Call
from titans_backends.dispatch import Choice
from titans_backends.errors import BackendRefusedError, UnknownNameError
from titans_backends.integrations.fla.gates import wide
from titans_backends.integrations.fla.rule import DeltaRule, op_for
from titans_backends.request import request
from titans_backends.verdict import ACCEPTED, Verdict, refused
from titans_backends.watching import watched

__all__ = ["verdict_of"]


def verdict_of(read: Callable[..., DeltaRule], args: tuple[object, ...], kwargs: Mapping[str, object], backend: str | None = None) -> Verdict:
    """The verdict on a function's arguments; `backend` forces one."""
    try:
        rule = read(*args, **kwargs)
        if watched((rule.q, rule.k, rule.v)):
            return ACCEPTED
        return _on_choice(_choice(rule, backend))
    except (TypeError, ValueError, DeprecationWarning, BackendRefusedError, UnknownNameError) as refusal:
        return refused(str(refusal))


def _choice(rule: DeltaRule, backend: str | None) -> Choice:
    op = contract(op_for(rule))
    call = _stand_in(rule)
    if torch._C._is_any_autocast_enabled():
        call = autocast(op, call)
    given = (rule.q, rule.k, rule.v, rule.beta, rule.g, rule.A_log, rule.dt_bias, rule.initial_state)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    return library.planner(op.name).plan(call, replace(request(backend, training=training), tune_budget_s=None)).choice


def _stand_in(rule: DeltaRule) -> Call:
    """The op's call with unwritten tensors where `compute` would compute one: same shapes, strides, dtypes and device."""
    dtype, op = rule.dtype, op_for(rule)

    def operand(x: Tensor) -> Tensor:
        return x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)

    def gate(x: Tensor, computed: bool) -> Tensor:
        return x if not computed and x.dtype in (dtype, wide(dtype)) else torch.empty_like(x, dtype=wide(dtype))

    q, k, v = operand(rule.q), operand(rule.k), operand(rule.v)
    beta = v.new_empty(v.shape[:3]) if rule.beta is None else gate(rule.beta, rule.beta_logits)
    g = None if rule.g is None else gate(rule.g, rule.A_log is not None)
    state = rule.initial_state
    if state is not None:
        state = state.transpose(-1, -2) if rule.state_v_first else state
        state = state if state.dtype == wide(dtype) else torch.empty_like(state, dtype=wide(dtype))
    if op == "gated_delta_step":
        if state is None:
            state = torch.empty(q.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=wide(dtype), device=v.device)
        return contract(op).make_call(q, k, v, beta, g, state=state, scale=rule.scale, qk_l2norm=rule.qk_l2norm)
    return contract(op).make_call(
        q, k, v, beta, g,
        scale=rule.scale, chunk_size=rule.chunk_size, initial_state=state, output_final_state=rule.output_final_state,
        qk_l2norm=rule.qk_l2norm, cu_seqlens=rule.cu_seqlens,
    )  # fmt: skip


def _on_choice(choice: Choice) -> Verdict:
    if choice.machine.kind != "cuda" or choice.origin != "default" or choice.pair.forward.backend != "eager":
        return ACCEPTED
    others = "; ".join(f"{offer.backend.name}: {offer.verdict}" for offer in choice.offers if not offer.verdict)
    return refused(f"on a GPU only eager takes this call, which FLA's own kernels outrun ({others or 'no other backend is known'})")

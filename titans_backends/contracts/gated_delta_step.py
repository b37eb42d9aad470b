"""gated_delta_step: decode, one to eight tokens of the exact gated delta rule on a state or on a pool of states.

The recurrence is that of `gated_delta_rule`. With `state_indices` `[B]` the state is a pool `[P, H, K, V]`: row b reads and
writes slot `state_indices[b]`, -1 skips the row (its o is 0). What comes back has the given state's shape, other slots unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from titans_backends.contracts import arguments as a
from titans_backends.contracts.algebra import expand_heads, l2_normalize
from titans_backends.contracts.case import Variant
from titans_backends.contracts.contract import Argument, Contract, Option, Output, arithmetic_dtype
from titans_backends.contracts.gated_delta_rule import delta_rule

__all__ = ["CONTRACT", "MAX_TOKENS", "GatedDeltaStep", "overlaps"]

MAX_TOKENS = 8


@dataclass(slots=True, eq=False)
class GatedDeltaStep:
    """Arguments: q, k `[B, T, G, K]`, v `[B, T, H, V]`, beta, g `[B, T, H]`, state `[B, H, K, V]` or a pool, state_indices `[B]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None = None
    _: KW_ONLY
    state: Tensor
    state_indices: Tensor | None = None
    inplace: bool = False
    scale: float | None = None
    qk_l2norm: bool = False


def check(call: GatedDeltaStep, dims: Mapping[str, int]) -> None:
    """A few tokens, one row of the state for each sequence."""
    if not 1 <= dims["T"] <= MAX_TOKENS:
        raise ValueError(f"gated_delta_step: T must be 1 to {MAX_TOKENS}, got {dims['T']}; use gated_delta_rule for more tokens")
    if call.state_indices is None and dims["P"] != dims["B"]:
        raise ValueError(
            f"gated_delta_step: state has {dims['P']} rows and q, k, v have {dims['B']} sequences; pass one row each, or state_indices [B] into a pool"
        )
    if call.inplace and overlaps(call.state):
        raise ValueError(
            f"gated_delta_step: state has strides {call.state.stride()} for shape {tuple(call.state.shape)}, so that some elements share memory; "
            "it cannot be updated in place. Pass state.clone() or inplace=False"
        )


def overlaps(state: Tensor) -> bool:
    """Whether two elements of a strided tensor may share memory."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(state.stride(), state.shape, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def reference(call: GatedDeltaStep) -> tuple[Tensor | None, ...]:
    """The token recurrence on the selected rows. Never in place: it returns what an in-place call would leave behind."""
    heads, dtype = call.v.shape[2], arithmetic_dtype(call.v.dtype)
    q, k = (expand_heads(x, heads).to(dtype) for x in (call.q, call.k))
    if call.qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    g = None if call.g is None else call.g.to(dtype)
    scale = k.shape[-1] ** -0.5 if call.scale is None else call.scale
    state = call.state.to(dtype)
    slots = torch.arange(q.shape[0], device=q.device) if call.state_indices is None else call.state_indices.to(q.device, torch.int64)
    rows = state[slots.clamp_min(0)] if len(state) else state.new_zeros(len(slots), *state.shape[1:])
    o, after = delta_rule(q, k, call.v.to(dtype), call.beta.to(dtype), g, scale, rows)
    used = slots >= 0
    o = torch.where(used[:, None, None, None], o, torch.zeros_like(o))
    return o.to(call.v.dtype), state.index_put((slots[used],), after[used])


def work(dims: Mapping[str, int], call: GatedDeltaStep) -> tuple[float, float]:
    """FLOP of the token rule. Bytes beyond the token tensors: each selected state read once and written once."""
    states = dims["B"] * dims["H"] * dims["K"] * dims["V"]
    size = arithmetic_dtype(call.v.dtype).itemsize
    return dims["T"] * states * 7.0, (2 * states - 2 * dims["P"] * dims["H"] * dims["K"] * dims["V"]) * float(size)


CONTRACT = Contract(
    name="gated_delta_step",
    summary="decode: one to eight tokens on a state, or on a pool of states with indices",
    make_call=GatedDeltaStep,
    arguments=(
        a.Q,
        a.K,
        a.V,
        a.BETA,
        a.LOG_DECAY,
        Argument("state", ("P H K V",), "state", "state"),
        Argument("state_indices", ("B",), "index", "slots", optional=True),
    ),
    options=(Option("inplace", "bool", False), a.SCALE_OR_ROOT, a.QK_L2NORM),
    outputs=(Output("o", "B T H V", like="v"), Output("state", "P H K V")),
    check=check,
    reference=reference,
    work=work,
    variants=(
        Variant("gated", given=("g",)),
        Variant("pool", {"qk_l2norm": True}, given=("g", "state_indices")),
        Variant("in place", {"inplace": True}, given=("g", "state_indices")),
    ),
    seq_len_is="T",
    default_seq_lens=(1,),
    max_tokens=MAX_TOKENS,
    step_of="gated_delta_rule",
)

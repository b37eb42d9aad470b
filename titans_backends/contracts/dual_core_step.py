"""dual_core_step: decode, one to eight tokens of `dual_core` (memory "recurrent", transform "exact"), each row at its own place in its chunk.

`position[b]` counts the tokens that row b has seen, whole or modulo chunk_size, and lives on the device, so that a captured graph can go on; afterwards
the caller adds T. S is `state`, W is `fast_state`:

    W <- 0 if position % chunk_size == 0;   W += k (beta v)^T;   S <- e^g S;   S += k (beta (v - S^T k))^T;   position += 1
    o = alpha * fast_gate * scale * W^T q + (1 - alpha) * slow_gate * scale * S^T q

A decay per chunk is a g that is not 0 at a chunk's first token only. With `state_indices` `[B]` both states are pools of P slots: row b reads and
writes slot `state_indices[b]` of both, -1 skips the row (its o is 0); `position` stays one a row. What comes back has the pools' shape, other slots unchanged.
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
from titans_backends.contracts.gated_delta_step import MAX_TOKENS, overlaps

__all__ = ["CONTRACT", "DualCoreStep"]


@dataclass(slots=True, eq=False)
class DualCoreStep:
    """Arguments: q, k `[B, T, G, K]`, v `[B, T, H, V]`, beta, g, gates `[B, T, H]`, alpha a number, 0-d, `[H]` or `[B, T, H]`, state and fast_state
    `[B, H, K, V]`, or pools of P slots and state_indices `[B]`; position `[B]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None = None
    _: KW_ONLY
    fast_gate: Tensor | None = None
    slow_gate: Tensor | None = None
    alpha: float | Tensor = 0.1
    state: Tensor
    fast_state: Tensor
    position: Tensor
    state_indices: Tensor | None = None
    inplace: bool = False
    chunk_size: int = 128
    scale: float = 1.0
    qk_l2norm: bool = False


def check(call: DualCoreStep, dims: Mapping[str, int]) -> None:
    """A few tokens, one row of the states for each sequence."""
    if not 1 <= dims["T"] <= MAX_TOKENS:
        raise ValueError(f"dual_core_step: T must be 1 to {MAX_TOKENS}, got {dims['T']}; use dual_core for more tokens")
    if call.state_indices is None and dims["P"] != dims["B"]:
        raise ValueError(
            f"dual_core_step: state has {dims['P']} rows and q, k, v have {dims['B']} sequences; pass one row each, or state_indices [B] into a pool"
        )
    for name in ("state", "fast_state") if call.inplace else ():
        given = getattr(call, name)
        if overlaps(given):
            raise ValueError(
                f"dual_core_step: {name} has strides {given.stride()} for shape {tuple(given.shape)}, so that some elements share memory; "
                f"it cannot be updated in place. Pass {name}.clone() or inplace=False"
            )


def fast_tokens(q: Tensor, k: Tensor, x: Tensor, position: Tensor, chunk_size: int, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_fast token by token on `[B, T, H, *]`, x = beta v: o without its gate, and W."""
    outputs = []
    for t in range(q.shape[1]):
        begins = ((position + t) % chunk_size == 0)[:, None, None, None]
        state = torch.where(begins, torch.zeros_like(state), state) + k[:, t, :, :, None] * x[:, t, :, None, :]
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, 1), state


def reference(call: DualCoreStep) -> tuple[Tensor | None, ...]:
    """Token after token on the selected rows. Never in place: it returns what an in-place call would leave behind."""
    heads, dtype = call.v.shape[2], arithmetic_dtype(call.v.dtype)
    q, k = (expand_heads(x, heads).to(dtype) for x in (call.q, call.k))
    if call.qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    v, beta = call.v.to(dtype), call.beta.to(dtype)
    g = None if call.g is None else call.g.to(dtype)
    slots = torch.arange(q.shape[0], device=q.device) if call.state_indices is None else call.state_indices.to(q.device, torch.int64)
    pools = call.state.to(dtype), call.fast_state.to(dtype)
    start, fast_start = (x[slots.clamp_min(0)] if len(x) else x.new_zeros(len(slots), *x.shape[1:]) for x in pools)
    slow, after = delta_rule(q, k, v, beta, g, call.scale, start)
    fast, fast_after = fast_tokens(q, k, beta[..., None] * v, call.position.to(q.device), call.chunk_size, call.scale, fast_start)
    if call.fast_gate is not None:
        fast = call.fast_gate.to(dtype)[..., None] * fast
    if call.slow_gate is not None:
        slow = call.slow_gate.to(dtype)[..., None] * slow
    alpha = call.alpha
    if isinstance(alpha, Tensor):
        alpha = alpha.to(dtype)[..., None] if alpha.dim() else alpha.to(dtype)
    used = slots >= 0
    o = torch.where(used[:, None, None, None], alpha * fast + (1 - alpha) * slow, 0.0)
    left = (x.index_put((slots[used],), rows[used]) for x, rows in zip(pools, (after, fast_after), strict=True))
    return (o.to(call.v.dtype), *left)


def work(dims: Mapping[str, int], call: DualCoreStep) -> tuple[float, float]:
    """FLOP of the two token rules. Bytes beyond the token tensors: each selected S and W read once and written once."""
    states = dims["B"] * dims["H"] * dims["K"] * dims["V"]
    size = arithmetic_dtype(call.v.dtype).itemsize
    return dims["T"] * states * 11.0, 4.0 * (states - dims["P"] * dims["H"] * dims["K"] * dims["V"]) * size


CONTRACT = Contract(
    name="dual_core_step",
    summary="decode: one to eight tokens of dual_core's recurrent memory, exact rule, on both states or on pools of them",
    make_call=DualCoreStep,
    arguments=(
        a.Q, a.K, a.V, a.BETA, a.LOG_DECAY,
        Argument("fast_gate", ("B T H",), "gate", "gate", optional=True),
        Argument("slow_gate", ("B T H",), "gate", "gate", optional=True),
        Argument("alpha", ("", "H", "B T H"), "gate", "mixing", optional=True),
        Argument("state", ("P H K V",), "state", "state"),
        Argument("fast_state", ("P H K V",), "state", "state"),
        Argument("position", ("B",), "index", "position"),
        Argument("state_indices", ("B",), "index", "slots", optional=True),
    ),
    options=(Option("inplace", "bool", False), a.chunk_size(128), a.SCALE, a.QK_L2NORM),
    outputs=(Output("o", "B T H V", like="v"), Output("state", "P H K V"), Output("fast_state", "P H K V")),
    check=check,
    reference=reference,
    work=work,
    variants=(
        Variant("gated", {"chunk_size": 4}, given=("g", "fast_gate", "slow_gate", "alpha")),
        Variant("plain", {"chunk_size": 1, "scale": 0.5}),
        Variant("pool", {"chunk_size": 2, "qk_l2norm": True}, given=("g", "slow_gate", "state_indices")),
        Variant("in place", {"chunk_size": 4, "inplace": True}, given=("g", "fast_gate", "slow_gate", "alpha", "state_indices")),
    ),
    seq_len_is="T",
    default_seq_lens=(1,),
    max_tokens=MAX_TOKENS,
    step_of="dual_core",
)  # fmt: skip

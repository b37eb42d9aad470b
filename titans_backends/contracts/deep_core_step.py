"""deep_core_step: decode, one to eight tokens of `deep_core` on its carry, each row at its own place in its block. Experimental.

`position[b]` counts the tokens that row b's open block holds, and lives on the device, so that a captured graph can go on: afterwards
it is (position + T) % (chunk_size * period), for the caller to write. The rest of the carry comes back new, whole block or open:

    o = gate * scale * D^T q;   E += eta k (v - D^T k)^T;   mass += eta |k|^2;   log_decay += g;   position += 1
    at position = chunk_size * period:   D <- exp(log_decay) D + E / Z;   E, mass, log_decay, position <- 0

With `state_indices` `[B]` the carry is a pool of P slots: row b reads and writes slot `state_indices[b]` of all four tensors, -1 skips the row (its o is 0).
`position` stays one a row. What comes back has the pool's shape, other slots unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from titans_backends.contracts import arguments as a
from titans_backends.contracts.algebra import expand_heads
from titans_backends.contracts.case import Variant
from titans_backends.contracts.contract import Argument, Contract, Option, Output, arithmetic_dtype
from titans_backends.contracts.deep_core import ETA, NORMALIZE, PERIOD, Carry, close_block
from titans_backends.contracts.gated_delta_step import MAX_TOKENS, overlaps

__all__ = ["CONTRACT", "DeepCoreStep"]


@dataclass(slots=True, eq=False)
class DeepCoreStep:
    """Arguments: q, k `[B, T, G, K]`, v `[B, T, H, V]`, eta, g, gate `[B, T, H]`, the carry: state D, error E `[B, H, K, V]`, mass, log_decay
    `[B, H]`, or pools of P slots each and state_indices `[B]`; position `[B]`. Experimental."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    g: Tensor | None = None
    _: KW_ONLY
    gate: Tensor | None = None
    state: Tensor
    error: Tensor
    mass: Tensor
    log_decay: Tensor
    position: Tensor
    state_indices: Tensor | None = None
    inplace: bool = False
    chunk_size: int = 64
    period: int = 4
    normalize: str = "safe"
    scale: float = 1.0


def check(call: DeepCoreStep, dims: Mapping[str, int]) -> None:
    """A few tokens, one row of the carry for each sequence."""
    if not 1 <= dims["T"] <= MAX_TOKENS:
        raise ValueError(f"deep_core_step: T must be 1 to {MAX_TOKENS}, got {dims['T']}; use deep_core for more tokens")
    if call.state_indices is None and dims["P"] != dims["B"]:
        raise ValueError(
            f"deep_core_step: state has {dims['P']} rows and q, k, v have {dims['B']} sequences; pass one row each, or state_indices [B] into a pool"
        )
    for name in _CARRIED if call.inplace else ():
        given = getattr(call, name)
        if overlaps(given):
            raise ValueError(
                f"deep_core_step: {name} has strides {given.stride()} for shape {tuple(given.shape)}, so that some elements share memory; "
                f"it cannot be updated in place. Pass {name}.clone() or inplace=False"
            )


def reference(call: DeepCoreStep) -> tuple[Tensor | None, ...]:
    """Token after token on the selected rows. Never in place: it returns what an in-place call would leave behind."""
    heads, dtype = call.v.shape[2], arithmetic_dtype(call.v.dtype)
    q, k = (expand_heads(x, heads).to(dtype) for x in (call.q, call.k))
    v, eta = call.v.to(dtype), call.eta.to(dtype)
    block = call.chunk_size * call.period
    whole = Carry(*(x.to(dtype) for x in (call.state, call.error, call.mass, call.log_decay)))
    slots = torch.arange(q.shape[0], device=q.device) if call.state_indices is None else call.state_indices.to(q.device, torch.int64)
    carry = Carry(*(x[slots.clamp_min(0)] if len(x) else x.new_zeros(len(slots), *x.shape[1:]) for x in whole))
    position, outputs = call.position.to(q.device), []
    for t in range(q.shape[1]):
        outputs.append(call.scale * torch.einsum("bhkv,bhk->bhv", carry.state, q[:, t]))
        missed = v[:, t] - torch.einsum("bhkv,bhk->bhv", carry.state, k[:, t])
        error = carry.error + (eta[:, t, :, None] * k[:, t])[..., None] * missed[..., None, :]
        mass = carry.mass + eta[:, t] * (k[:, t] * k[:, t]).sum(-1)
        log_decay = carry.log_decay if call.g is None else carry.log_decay + call.g[:, t].to(dtype)
        opened = Carry(carry.state, error, mass, log_decay)
        position = (position + 1) % block
        ends = position == 0
        after = zip(close_block(opened, call.normalize, block), opened, strict=True)
        carry = Carry(*(torch.where(ends.view(-1, *[1] * (x.dim() - 1)), closed, x) for closed, x in after))
    used = slots >= 0
    o = torch.where(used[:, None, None, None], torch.stack(outputs, 1), 0.0)
    if call.gate is not None:
        o = call.gate.to(dtype)[..., None] * o
    return (o.to(call.v.dtype), *(x.index_put((slots[used],), after[used]) for x, after in zip(whole, carry, strict=True)))


def work(dims: Mapping[str, int], call: DeepCoreStep) -> tuple[float, float]:
    """FLOP: each token reads D twice and writes once. Bytes beyond the token tensors: each selected D and E read once and written once."""
    states = dims["B"] * dims["H"] * dims["K"] * dims["V"]
    size = arithmetic_dtype(call.v.dtype).itemsize
    return dims["T"] * states * 6.0, 4.0 * (states - dims["P"] * dims["H"] * dims["K"] * dims["V"]) * size


_CARRIED = ("state", "error", "mass", "log_decay")


CONTRACT = Contract(
    name="deep_core_step",
    summary="decode: one to eight tokens of deep_core on its carry, each row at its own place in its block (experimental)",
    make_call=DeepCoreStep,
    arguments=(
        a.Q, a.K, a.V, ETA, a.LOG_DECAY, a.GATE,
        Argument("state", ("P H K V",), "state", "state"),
        Argument("error", ("P H K V",), "state", "state"),
        Argument("mass", ("P H",), "state", "beta"),
        Argument("log_decay", ("P H",), "state", "log_decay"),
        Argument("position", ("B",), "index", "position"),
        Argument("state_indices", ("B",), "index", "slots", optional=True),
    ),
    options=(Option("inplace", "bool", False), a.chunk_size(64), PERIOD, NORMALIZE, a.SCALE),
    outputs=(
        Output("o", "B T H V", like="v"),
        Output("state", "P H K V"),
        Output("error", "P H K V"),
        Output("mass", "P H"),
        Output("log_decay", "P H"),
    ),
    check=check,
    reference=reference,
    work=work,
    experimental=True,
    max_tokens=MAX_TOKENS,
    step_of="deep_core",
    variants=(
        Variant("gated", {"chunk_size": 2, "period": 2}, given=("g", "gate")),
        Variant("mean", {"chunk_size": 4, "period": 1, "normalize": "mean", "scale": 0.5}, given=("g",)),
        Variant("blocks of one token", {"chunk_size": 1, "period": 1, "normalize": "sum"}),
        Variant("pool", {"chunk_size": 2, "period": 2}, given=("g", "state_indices")),
        Variant("in place", {"chunk_size": 2, "period": 2, "inplace": True}, given=("g", "gate", "state_indices")),
    ),
    seq_len_is="T",
    default_seq_lens=(1,),
)  # fmt: skip

"""deep_core_step: decode, one to eight tokens of `deep_core` on its carry, each row at its own place in its block (SPEC 7, 9). Experimental.

`position[b]` counts the tokens that row b's open block holds, and lives on the device, so that a captured graph can go on: afterwards
it is (position + T) % (chunk_size * period), for the caller to write. The rest of the carry comes back new, whole block or open:

    o = gate * scale * D^T q;   E += eta k (v - D^T k)^T;   mass += eta |k|^2;   log_decay += g;   position += 1
    at position = chunk_size * period:   D <- exp(log_decay) D + E / Z;   E, mass, log_decay, position <- 0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from titans_backends.contracts import arguments as a
from titans_backends.contracts.algebra import expand_heads
from titans_backends.contracts.case import Variant
from titans_backends.contracts.contract import Argument, Contract, Output, arithmetic_dtype
from titans_backends.contracts.deep_core import ETA, NORMALIZE, PERIOD, Carry, close_block
from titans_backends.contracts.gated_delta_step import MAX_TOKENS

__all__ = ["CONTRACT", "DeepCoreStep"]


@dataclass(slots=True, eq=False)
class DeepCoreStep:
    """Arguments: q, k `[B, T, G, K]`, v `[B, T, H, V]`, eta, g, gate `[B, T, H]`, the carry: state D, error E `[B, H, K, V]`, mass, log_decay `[B, H]`,
    position `[B]`. Experimental."""

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
    chunk_size: int = 64
    period: int = 4
    normalize: str = "safe"
    scale: float = 1.0


def check(call: DeepCoreStep, dims: Mapping[str, int]) -> None:
    """A few tokens."""
    if not 1 <= dims["T"] <= MAX_TOKENS:
        raise ValueError(f"deep_core_step: T must be 1 to {MAX_TOKENS}, got {dims['T']}; use deep_core for more tokens")


def reference(call: DeepCoreStep) -> tuple[Tensor | None, ...]:
    """Token after token."""
    heads, dtype = call.v.shape[2], arithmetic_dtype(call.v.dtype)
    q, k = (expand_heads(x, heads).to(dtype) for x in (call.q, call.k))
    v, eta = call.v.to(dtype), call.eta.to(dtype)
    block = call.chunk_size * call.period
    carry = Carry(*(x.to(dtype) for x in (call.state, call.error, call.mass, call.log_decay)))
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
    o = torch.stack(outputs, 1)
    if call.gate is not None:
        o = call.gate.to(dtype)[..., None] * o
    return (o.to(call.v.dtype), *carry)


def work(dims: Mapping[str, int], call: DeepCoreStep) -> tuple[float, float]:
    """FLOP: each token reads D twice and writes once."""
    return 6.0 * dims["B"] * dims["T"] * dims["H"] * dims["K"] * dims["V"], 0.0


CONTRACT = Contract(
    name="deep_core_step",
    summary="decode: one to eight tokens of deep_core on its carry, each row at its own place in its block (experimental)",
    make_call=DeepCoreStep,
    arguments=(
        a.Q, a.K, a.V, ETA, a.LOG_DECAY, a.GATE,
        Argument("state", ("B H K V",), "state", "state"),
        Argument("error", ("B H K V",), "state", "state"),
        Argument("mass", ("B H",), "state", "beta"),
        Argument("log_decay", ("B H",), "state", "log_decay"),
        Argument("position", ("B",), "index", "position"),
    ),
    options=(a.chunk_size(64), PERIOD, NORMALIZE, a.SCALE),
    outputs=(
        Output("o", "B T H V", like="v"),
        Output("state", "B H K V"),
        Output("error", "B H K V"),
        Output("mass", "B H"),
        Output("log_decay", "B H"),
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
    ),
    seq_len_is="T",
    default_seq_lens=(1,),
)  # fmt: skip

"""qkv_prepare: what lies between a layer's projections and its memory: three short convolutions, SiLU, and unit q and k.

    q = norm(silu(conv(q)))        k = norm(silu(conv(k)))        v = silu(conv(v))        conv as in `short_conv`

`qk_norm="l2"` is x / max(|x|, 1e-12) over each head, the original's; `"l2_eps"` x * rsqrt(sum x^2 + 1e-6), as FLA and transformers have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from titans_backends.contracts import arguments as a
from titans_backends.contracts.algebra import l2_normalize
from titans_backends.contracts.case import Variant
from titans_backends.contracts.contract import Argument, Contract, Option, Output
from titans_backends.contracts.short_conv import LOOKAHEAD, TAPS, ShortConv, check_conv, convolve

__all__ = ["CONTRACT", "QKVPrepare", "parts"]


@dataclass(slots=True, eq=False)
class QKVPrepare:
    """Arguments: q, k `[B, T, G, K]`, v `[B, T, H, V]` as projected; weights `[G, K, 4]` and `[H, V, 4]`, biases `[G, K]` and `[H, V]`, states
    `[N, G, K, 4]` and `[N, H, V, 4]`, all three or none."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_weight: Tensor
    k_weight: Tensor
    v_weight: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    _: KW_ONLY
    qk_norm: str = "l2"
    lookahead: int = 0
    q_state: Tensor | None = None
    k_state: Tensor | None = None
    v_state: Tensor | None = None
    output_final_state: bool = False
    cu_seqlens: Tensor | None = None


def parts(call: QKVPrepare) -> tuple[ShortConv, ShortConv, ShortConv]:
    """The three convolutions."""

    def part(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> ShortConv:
        return ShortConv(
            x, weight, bias,
            lookahead=call.lookahead, initial_state=state, output_final_state=call.output_final_state, cu_seqlens=call.cu_seqlens,
        )  # fmt: skip

    return (
        part(call.q, call.q_weight, call.q_bias, call.q_state),
        part(call.k, call.k_weight, call.k_bias, call.k_state),
        part(call.v, call.v_weight, call.v_bias, call.v_state),
    )


def check(call: QKVPrepare, dims: Mapping[str, int]) -> None:
    """As `short_conv`; biases and states come in threes."""
    for kind in ("bias", "state"):
        given = [f"{x}_{kind}" for x in "qkv" if getattr(call, f"{x}_{kind}") is not None]
        if len(given) not in (0, 3):
            raise ValueError(f"qkv_prepare: {', '.join(given)} without the others; pass q_{kind}, k_{kind} and v_{kind}, or none of them")
    if dims["W"] != TAPS:
        raise ValueError(f"qkv_prepare: q_weight has {dims['W']} taps in its last dimension; it must have {TAPS}")
    check_conv("qkv_prepare", call.lookahead, "q_state" if call.q_state is not None else None, call.output_final_state)


def reference(call: QKVPrepare) -> tuple[Tensor | None, ...]:
    """Three convolutions, then the norm of q and k."""
    (q, q_state), (k, k_state), (v, v_state) = (convolve(part) for part in parts(call))
    q, k = (_normalized(x, call.qk_norm) for x in (q, k))
    return q.to(call.q.dtype), k.to(call.q.dtype), v.to(call.q.dtype), q_state, k_state, v_state


def _normalized(x: Tensor, qk_norm: str) -> Tensor:
    if qk_norm == "none":
        return x
    return torch.nn.functional.normalize(x, dim=-1, eps=1e-12) if qk_norm == "l2" else l2_normalize(x)


def work(dims: Mapping[str, int], call: QKVPrepare) -> tuple[float, float]:
    """FLOP: the convolutions, and three for the norm."""
    keys, values = 2 * dims["G"] * dims["K"], dims["H"] * dims["V"]
    return dims["B"] * dims["T"] * ((keys + values) * (2.0 * TAPS + 5.0) + 3.0 * keys), 0.0


_STATES = ("q_state", "k_state", "v_state")
_BIASES = ("q_bias", "k_bias", "v_bias")

CONTRACT = Contract(
    name="qkv_prepare",
    summary="short convolutions, SiLU and L2 norm of q, k and v in one pass",
    make_call=QKVPrepare,
    arguments=(
        Argument("q", ("B T G K",), "operand", "value"),
        Argument("k", ("B T G K",), "operand", "value"),
        Argument("v", ("B T H V",), "operand", "value"),
        Argument("q_weight", ("G K W",), "gate", "value"),
        Argument("k_weight", ("G K W",), "gate", "value"),
        Argument("v_weight", ("H V W",), "gate", "value"),
        Argument("q_bias", ("G K",), "gate", "value", optional=True),
        Argument("k_bias", ("G K",), "gate", "value", optional=True),
        Argument("v_bias", ("H V",), "gate", "value", optional=True),
        Argument("q_state", ("N G K W",), "state", "state", optional=True),
        Argument("k_state", ("N G K W",), "state", "state", optional=True),
        Argument("v_state", ("N H V W",), "state", "state", optional=True),
        a.CU_SEQLENS,
    ),
    options=(Option("qk_norm", "str", "l2", choices=("l2", "l2_eps", "none")), LOOKAHEAD, a.OUTPUT_FINAL_STATE),
    outputs=(
        Output("q", "B T G K", like="q"),
        Output("k", "B T G K", like="k"),
        Output("v", "B T H V", like="v"),
        Output("q_state", "N G K W", when="output_final_state"),
        Output("k_state", "N G K W", when="output_final_state"),
        Output("v_state", "N H V W", when="output_final_state"),
    ),
    check=check,
    reference=reference,
    work=work,
    variants=(
        Variant("causal", {"output_final_state": True}, given=(*_BIASES, *_STATES)),
        Variant("original", {"lookahead": 1}, given=_BIASES),
        Variant("eps inside the root", {"qk_norm": "l2_eps"}),
    ),
)

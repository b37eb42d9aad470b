"""gated_rms_norm: each head's output over its root mean square, weighted and gated (the layer's o before its projection).

    y = x / sqrt(mean over V of x^2 + eps) * weight * activation(gate)

LAM gates with a sigmoid, gated delta nets with SiLU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from titans_backends.contracts.case import Variant
from titans_backends.contracts.contract import Argument, Contract, Option, Output, arithmetic_dtype

__all__ = ["CONTRACT", "GatedRMSNorm"]


@dataclass(slots=True, eq=False)
class GatedRMSNorm:
    """Arguments: x, gate (before its activation) `[B, T, H, V]`, weight `[V]`, the same for every head."""

    x: Tensor
    gate: Tensor
    weight: Tensor
    _: KW_ONLY
    eps: float = 1e-5
    activation: str = "sigmoid"


def check(call: GatedRMSNorm, dims: Mapping[str, int]) -> None:
    """eps keeps a row of zeros finite."""
    if call.eps <= 0:
        raise ValueError(f"gated_rms_norm: eps must be above 0, got {call.eps}; the original's is 1e-5")


def reference(call: GatedRMSNorm) -> tuple[Tensor | None, ...]:
    """The formula in the arithmetic's dtype."""
    dtype = arithmetic_dtype(call.x.dtype)
    x, gate = call.x.to(dtype), call.gate.to(dtype)
    normed = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + call.eps) * call.weight.to(dtype)
    return ((normed * (torch.sigmoid(gate) if call.activation == "sigmoid" else torch.nn.functional.silu(gate))).to(call.x.dtype),)


def work(dims: Mapping[str, int], call: GatedRMSNorm) -> tuple[float, float]:
    """FLOP: two for the mean, three products and four for the gate."""
    return dims["B"] * dims["T"] * dims["H"] * dims["V"] * 9.0, 0.0


CONTRACT = Contract(
    name="gated_rms_norm",
    summary="RMS norm over each head, weighted and gated",
    make_call=GatedRMSNorm,
    arguments=(
        Argument("x", ("B T H V",), "operand", "value"),
        Argument("gate", ("B T H V",), "operand", "value"),
        Argument("weight", ("V",), "gate", "gate"),
    ),
    options=(Option("eps", "float", 1e-5, in_key=False), Option("activation", "str", "sigmoid", choices=("sigmoid", "silu"))),
    outputs=(Output("y", "B T H V", like="x"),),
    check=check,
    reference=reference,
    work=work,
    variants=(Variant("sigmoid"), Variant("silu", {"activation": "silu", "eps": 1e-6})),
    seq_len_is="T",
)

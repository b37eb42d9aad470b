"""token_flux: how much a token weighs S_fast against S_slow, by a small network that all heads share.

    hidden = silu(w1 [beta k ; beta v] + b1)        flux = clamp(sigmoid(w2 . hidden + b2), 0.01, 0.99)

Outside of the clamp nothing has a gradient. The original's merge weight is `0.5 + 0.3 * flux`, which `dual_core` takes as alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_backends.contracts import arguments as a
from titans_backends.contracts.algebra import expand_heads
from titans_backends.contracts.case import Variant
from titans_backends.contracts.contract import Argument, Contract, Output, arithmetic_dtype

__all__ = ["CONTRACT", "LEAST", "MOST", "TokenFlux"]

LEAST, MOST = 0.01, 0.99


@dataclass(slots=True, eq=False)
class TokenFlux:
    """Arguments: k `[B, T, G, K]`, v `[B, T, H, V]`, beta `[B, T, H]`, w1 `[F, K + V]`, b1 `[F]`, w2 `[1, F]`, b2 `[1]`, as two Linear layers have."""

    k: Tensor
    v: Tensor
    beta: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


def check(call: TokenFlux, dims: Mapping[str, int]) -> None:
    """The network reads a key and a value, and gives one number."""
    if dims["J"] != dims["K"] + dims["V"]:
        raise ValueError(f"token_flux: w1 has {dims['J']} inputs; it must have K + V = {dims['K']} + {dims['V']} = {dims['K'] + dims['V']}")
    if dims["Y"] != 1:
        raise ValueError(f"token_flux: w2 and b2 must have one row, got {dims['Y']}; all heads share one network")


def reference(call: TokenFlux) -> tuple[Tensor | None, ...]:
    """The formula in the arithmetic's dtype."""
    dtype = arithmetic_dtype(call.k.dtype)
    k, v = expand_heads(call.k, call.v.shape[2]).to(dtype), call.v.to(dtype)
    x = call.beta.to(dtype)[..., None] * torch.cat([k, v], -1)
    hidden = torch.nn.functional.silu(torch.nn.functional.linear(x, call.w1.to(dtype), call.b1.to(dtype)))
    logit = torch.nn.functional.linear(hidden, call.w2.to(dtype), call.b2.to(dtype))[..., 0]
    return (torch.sigmoid(logit).clamp(LEAST, MOST).to(call.v.dtype),)


def work(dims: Mapping[str, int], call: TokenFlux) -> tuple[float, float]:
    """FLOP: the first product once for each head of k and of v, and the second one."""
    tokens, hidden = dims["B"] * dims["T"], dims["F"]
    groups = dims.get("G", dims["H"])
    return tokens * hidden * (2.0 * groups * dims["K"] + dims["H"] * (2.0 * dims["V"] + 8.0)), 0.0


CONTRACT = Contract(
    name="token_flux",
    summary="token flux: a small network's weight for each token and head, from beta k and beta v",
    make_call=TokenFlux,
    arguments=(
        a.K,
        a.V,
        a.BETA,
        Argument("w1", ("F J",), "gate", "state"),
        Argument("b1", ("F",), "gate", "value"),
        Argument("w2", ("Y F",), "gate", "value"),
        Argument("b2", ("Y",), "gate", "value"),
    ),
    options=(),
    outputs=(Output("flux", "B T H", like="v"),),
    check=check,
    reference=reference,
    work=work,
    variants=(Variant("plain"),),
    seq_len_is="T",
)

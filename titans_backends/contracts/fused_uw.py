"""fused_uw: u = attn_const v_beta and w = attn_const k_beta as one product, from an attn_const that is given; `uw_transform` makes it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from titans_backends.contracts.case import Variant
from titans_backends.contracts.contract import Argument, Contract, Output, arithmetic_dtype

__all__ = ["CONTRACT", "FusedUW"]


@dataclass(slots=True, eq=False)
class FusedUW:
    """Arguments: attn_const `[..., C, C]` (used as given, no triangle assumed), v_beta `[..., C, V]`, k_beta `[..., C, K]`."""

    attn_const: Tensor
    v_beta: Tensor
    k_beta: Tensor


def check(call: FusedUW, dims: Mapping[str, int]) -> None:
    """The tables say everything."""


def reference(call: FusedUW) -> tuple[Tensor | None, ...]:
    """Two products in the arithmetic's dtype."""
    dtype = arithmetic_dtype(call.v_beta.dtype)
    attn = call.attn_const.to(dtype)
    return (attn @ call.v_beta.to(dtype)).to(call.v_beta.dtype), (attn @ call.k_beta.to(dtype)).to(call.v_beta.dtype)


def work(dims: Mapping[str, int], call: FusedUW) -> tuple[float, float]:
    """FLOP: the whole product; a kernel may not assume a triangle."""
    return dims["*"] * 2.0 * dims["C"] ** 2 * (dims["K"] + dims["V"]), 0.0


CONTRACT = Contract(
    name="fused_uw",
    summary="u and w from a given attn_const, as one product",
    make_call=FusedUW,
    arguments=(
        Argument("attn_const", ("* C C",), "operand", "lower_triangular"),
        Argument("v_beta", ("* C V",), "operand", "value"),
        Argument("k_beta", ("* C K",), "operand", "key"),
    ),
    options=(),
    outputs=(Output("u", "* C V", like="v_beta"), Output("w", "* C K", like="v_beta")),
    check=check,
    reference=reference,
    work=work,
    variants=(Variant("plain"),),
    seq_len_is="C x the product of the leading dimensions",
)

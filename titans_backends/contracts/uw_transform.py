"""uw_transform: the u and w that feed slow_core, from k, v, beta and g, chunk by chunk.

A = -stril(diag(beta) K K^T * Gamma)
exact: T = (I - A)^-1        lam: T = I + A + stril(A A^T)  (LAM's; A A^T, not A A)        none: T = I
u = T (beta * V)             w = T (beta * exp(G) * K)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from titans_backends.contracts import arguments as a
from titans_backends.contracts.algebra import decay_mask, expand_heads, heads_first
from titans_backends.contracts.case import Variant
from titans_backends.contracts.chunks import chunk_spans
from titans_backends.contracts.contract import Contract, Output, arithmetic_dtype

__all__ = ["CONTRACT", "UWTransform", "transform_flop"]


@dataclass(slots=True, eq=False)
class UWTransform:
    """Arguments: k `[B, T, G, K]`, v `[B, T, H, V]` (not scaled by beta), beta, g (log decay <= 0) `[B, T, H]`."""

    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None = None
    _: KW_ONLY
    chunk_size: int = 64
    transform: str = "exact"
    cu_seqlens: Tensor | None = None


def check(call: UWTransform, dims: Mapping[str, int]) -> None:
    """The tables say everything."""


def solve(a_matrix: Tensor, right: Tensor, transform: str) -> Tensor:
    """T times the right-hand sides."""
    if transform == "none":
        return right
    if transform == "lam":
        return right + (a_matrix + (a_matrix @ a_matrix.transpose(-1, -2)).tril(-1)) @ right
    unit = torch.eye(a_matrix.shape[-1], dtype=a_matrix.dtype, device=a_matrix.device)
    solved: Tensor = torch.linalg.solve_triangular(unit - a_matrix, right, upper=False, unitriangular=True)
    return solved


def reference(call: UWTransform) -> tuple[Tensor | None, ...]:
    """The matrix form, one chunk at a time; the inverse by substitution."""
    heads, values = call.v.shape[2:]
    k = expand_heads(call.k, heads)
    parts = []
    for span in chunk_spans(k.shape[1], call.chunk_size, call.cu_seqlens):
        kc, vc = (heads_first(x, span.start, span.stop) for x in (k, call.v))
        beta = heads_first(call.beta, span.start, span.stop).to(kc.dtype)
        log_decay = torch.zeros_like(beta) if call.g is None else heads_first(call.g, span.start, span.stop).to(kc.dtype).cumsum(-1)
        a_matrix = -(beta[..., None] * (kc @ kc.transpose(-1, -2)) * decay_mask(log_decay)).tril(-1)
        right = torch.cat([beta[..., None] * vc, (beta * log_decay.exp())[..., None] * kc], -1)
        parts.append(solve(a_matrix, right, call.transform).transpose(1, 2))
    shape = (*call.v.shape[:3], values + k.shape[-1])
    uw = torch.cat(parts, 1) if parts else call.v.new_zeros(shape, dtype=arithmetic_dtype(call.v.dtype))
    return uw[..., :values].to(call.v.dtype), uw[..., values:].to(call.v.dtype)


def transform_flop(keys: int, values: int, chunk: int, transform: str) -> float:
    """Multiply-adds, counted as two, per token and head: half of K K^T, the triangle's inverse, its product with [V | K]."""
    inverse = {"exact": chunk * chunk / 3, "lam": chunk * chunk / 2, "none": 0.0}[transform]
    return (chunk * keys + chunk * (keys + values) if transform != "none" else 0.0) + inverse + keys + values


def work(dims: Mapping[str, int], call: UWTransform) -> tuple[float, float]:
    """FLOP by `transform_flop`."""
    chunk = min(call.chunk_size, max(dims["T"], 1))
    return dims["B"] * dims["T"] * dims["H"] * transform_flop(dims["K"], dims["V"], chunk, call.transform), 0.0


CONTRACT = Contract(
    name="uw_transform",
    summary="u and w from k, v, beta, g: the UT transform with its triangular solve and product",
    make_call=UWTransform,
    arguments=(a.K, a.V, a.BETA, a.LOG_DECAY, a.CU_SEQLENS),
    options=(a.chunk_size(64), a.TRANSFORM),
    outputs=(Output("u", "B T H V", like="v"), Output("w", "B T H K", like="v")),
    check=check,
    reference=reference,
    work=work,
    variants=(
        Variant("exact", given=("g",)),
        Variant("exact without g"),
        Variant("lam", {"transform": "lam"}, given=("g",), gentle=True),
        Variant("none", {"transform": "none", "chunk_size": 32}, given=("g",)),
    ),
)

"""chunk_flux: how strongly a chunk's keys and values resonate, by a bilinear form of each head and a small network that all share.

    e_i = k_i^T bilinear_h u_i / temp_h        x = [mean k ; mean u ; mean e], over the chunk's tokens
    psi = clamp(sigmoid(w2 . silu(w1 x + b1) + b2), 0.01, 0.99)

Outside of the clamp nothing has a gradient. LAM's u is that of `uw_transform` with `transform="lam"`; psi scales the decay of S_slow and couples the states
of `coupled_core`. Packed, the result has T // chunk_size + N rows, which no look at `cu_seqlens` is needed for: the chunks' in order, then zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from titans_backends.contracts import arguments as a
from titans_backends.contracts.algebra import expand_heads
from titans_backends.contracts.case import Variant
from titans_backends.contracts.chunks import chunk_rows, chunk_spans
from titans_backends.contracts.contract import Argument, Contract, Output, arithmetic_dtype
from titans_backends.contracts.token_flux import LEAST, MOST

__all__ = ["CONTRACT", "ChunkFlux"]


@dataclass(slots=True, eq=False)
class ChunkFlux:
    """Arguments: k `[B, T, G, K]`, u `[B, T, H, V]`, bilinear `[H, K, V]`, temp `[H]`, w1 `[F, K + V + 1]`, b1 `[F]`, w2 `[1, F]`, b2 `[1]`."""

    k: Tensor
    u: Tensor
    bilinear: Tensor
    temp: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    _: KW_ONLY
    chunk_size: int = 64
    cu_seqlens: Tensor | None = None


def check(call: ChunkFlux, dims: Mapping[str, int]) -> None:
    """The network reads a mean key, a mean u and a mean energy, and gives one number."""
    if dims["X"] != dims["K"] + dims["V"] + 1:
        wanted = dims["K"] + dims["V"] + 1
        raise ValueError(f"chunk_flux: w1 has {dims['X']} inputs; it must have K + V + 1 = {dims['K']} + {dims['V']} + 1 = {wanted}")
    if dims["Y"] != 1:
        raise ValueError(f"chunk_flux: w2 and b2 must have one row, got {dims['Y']}; all heads share one network")


def reference(call: ChunkFlux) -> tuple[Tensor | None, ...]:
    """One chunk at a time, in the arithmetic's dtype."""
    dtype = arithmetic_dtype(call.k.dtype)
    k, u = expand_heads(call.k, call.u.shape[2]).to(dtype), call.u.to(dtype)
    bilinear, temp, w1, b1, w2, b2 = (x.to(dtype) for x in (call.bilinear, call.temp, call.w1, call.b1, call.w2, call.b2))
    parts = []
    for span in chunk_spans(k.shape[1], call.chunk_size, call.cu_seqlens):
        kc, uc = k[:, span.start : span.stop], u[:, span.start : span.stop]
        energy = torch.einsum("bthk,hkv,bthv->bth", kc, bilinear, uc) / temp
        x = torch.cat([kc.mean(1), uc.mean(1), energy.mean(1)[..., None]], -1)
        hidden = torch.nn.functional.silu(torch.nn.functional.linear(x, w1, b1))
        parts.append(torch.sigmoid(torch.nn.functional.linear(hidden, w2, b2)[..., 0]).clamp(LEAST, MOST))
    sequences = None if call.cu_seqlens is None else len(call.cu_seqlens) - 1
    rows = chunk_rows(k.shape[1], call.chunk_size, sequences)
    rest = k.new_zeros(k.shape[0], rows - len(parts), u.shape[2])
    return (torch.cat([torch.stack(parts, 1), rest], 1) if parts else rest,)


def work(dims: Mapping[str, int], call: ChunkFlux) -> tuple[float, float]:
    """FLOP: the bilinear form and the sums of each token; the network of each chunk."""
    keys, values, heads = dims["K"], dims["V"], dims["H"]
    token = heads * (2.0 * keys * values + 3.0 * values) + dims.get("G", heads) * keys
    return dims["B"] * (dims["T"] * token + dims["Z"] * heads * dims["F"] * (2.0 * dims["X"] + 8.0)), 0.0


CONTRACT = Contract(
    name="chunk_flux",
    summary="chunk resonance: a small network's weight for each chunk and head, from mean k, mean u and their mean energy",
    make_call=ChunkFlux,
    arguments=(
        a.K,
        Argument("u", ("B T H V",), "operand", "value"),
        Argument("bilinear", ("H K V",), "gate", "state"),
        Argument("temp", ("H",), "gate", "gate"),
        Argument("w1", ("F X",), "gate", "state"),
        Argument("b1", ("F",), "gate", "value"),
        Argument("w2", ("Y F",), "gate", "value"),
        Argument("b2", ("Y",), "gate", "value"),
        a.CU_SEQLENS,
    ),
    options=(a.chunk_size(64),),
    outputs=(Output("psi", "B Z H"),),
    check=check,
    reference=reference,
    work=work,
    variants=(Variant("chunks of 64"), Variant("chunks of 20", {"chunk_size": 20}), Variant("one chunk", {"chunk_size": 256})),
)

"""The launches of the flux network, one forward and four backward, for `token_flux` and, over chunks' means, for `chunk_flux`; and what their candidates are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict, refused

from .flux_gradients import NETWORK_GRADIENTS, NETWORK_WEIGHTS
from .flux_network import NETWORK
from .grid import strides, unit_stride
from .partial_sums import add_up
from .serving import dots, narrow_warps, serves, tile_width

__all__ = ["Network", "forward_ways", "gradient_ways", "network", "network_gradients", "serves_network"]

_WIDEST = 256
_SLAB_BYTES = 128
_ROWS = (64, 32, 16)
_WALKS = ((32, 4), (32, 1), (16, 1))
"""Tokens of a backward program's block, and how many blocks it takes one after the other."""
_WEIGHT_ROWS = 64
_FULL = 1024
"""Programs that fill a card."""


@dataclass(frozen=True, slots=True)
class Network:
    """k `[B, T, G, K]`, v `[B, T, H, V]`, beta (None: 1) `[B, T, H]`, e, contiguous, float32 (None: the network has no such input), and the weights.

    Of chunks of packed sequences, whose rows are not all there: `cu_seqlens`, on the device, and the chunk size.
    """

    k: Tensor
    v: Tensor
    beta: Tensor | None
    extra: Tensor | None
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    cu_seqlens: Tensor | None = None
    chunk: int = 1

    @property
    def sequences(self) -> int:
        """How many sequences are packed."""
        return 0 if self.cu_seqlens is None else self.cu_seqlens.numel() - 1


def serves_network(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says, and a hidden layer that a program holds."""
    verdict = serves(signature, machine)
    if not 1 <= signature.dim("F") <= _WIDEST:
        verdict &= refused(f"a hidden layer of F={signature.dim('F')} is not in 1 to {_WIDEST}; use backend='eager'")
    return verdict


def _warps(dtype: torch.dtype, rows: int, columns: int, features: int) -> int:
    """Warps of a program whose narrowest product has so many columns."""
    return narrow_warps(dtype, rows, columns, 8 if features > 64 and rows > 16 else 4 if rows > 16 or features > 32 else 2)


def _few(signature: Signature, rows: int) -> bool:
    sizes = dict(signature.dims)
    return not signature.batch_invariant and sizes["B"] * sizes["T"] * sizes["G"] < _FULL * rows


def forward_ways(signature: Signature) -> list[Candidate]:
    """Blocks of tokens, the largest first but where they would leave the card idle; then the other roundings of float32."""
    rows = _ROWS if not _few(signature, _ROWS[0]) else tuple(reversed(_ROWS))
    ways = dots(signature)
    return [
        *(Candidate("triton", "rows", (("rows", count), ("dot", ways[0]))) for count in rows),
        *(Candidate("triton", "rows", (("rows", rows[1]), ("dot", dot))) for dot in ways[1:]),
    ]


def gradient_ways(signature: Signature) -> list[Candidate]:
    """Blocks of tokens and how many a program takes; then the other roundings of float32."""
    plans = _WALKS if not _few(signature, 128) else tuple(reversed(_WALKS))
    if tile_width(signature.dim("F")) > 64 and signature.dtype.itemsize == 4:
        plans = tuple(dict.fromkeys((16, blocks) for _, blocks in plans))
    ways = dots(signature)
    every = [(plan, ways[0]) for plan in plans] + [(plans[0], dot) for dot in ways[1:]]
    return [Candidate("triton", "rows", (("rows", rows), ("blocks", blocks), ("dot", dot)), direction="backward") for (rows, blocks), dot in every]


def _slabs(net: Network) -> tuple[int, int, int]:
    """Columns of k and of v that a product takes at a time, and the hidden layer's tile."""
    most = _SLAB_BYTES // net.k.dtype.itemsize
    return min(most, tile_width(net.k.shape[-1])), min(most, tile_width(net.v.shape[-1])), tile_width(net.b1.shape[0])


def _ready(net: Network) -> Network:
    w1, b1, w2, b2 = (x.contiguous() for x in (net.w1, net.b1, net.w2, net.b2))
    return Network(unit_stride(net.k), unit_stride(net.v), net.beta, net.extra, w1, b1, w2, b2, net.cu_seqlens, net.chunk)


def network(net: Network, flux: Tensor, rows: int, dot: str) -> None:
    """Writes the flux `[B, T, H]`, contiguous."""
    net = _ready(net)
    batch, tokens, heads, values = net.v.shape
    groups, keys = net.k.shape[2:]
    slab_k, slab_v, features = _slabs(net)
    NETWORK(
        batch * -(-tokens // rows) * groups,
        (
            net.k, net.v, net.beta, net.extra, net.w1, net.b1, net.w2, net.b2, net.cu_seqlens, flux,
            tokens, net.sequences, heads, heads // groups if groups else 1, *strides(net.k), *strides(net.v), *strides(net.beta),
        ),
        (keys, values, net.b1.shape[0], slab_k, slab_v, features, rows, net.chunk, dot),
        _warps(net.k.dtype, rows, features, features),
        2,
    )  # fmt: skip


def network_gradients(net: Network, d_flux: Tensor, outs: dict[str, Tensor], rows: int, blocks: int, dot: str) -> None:
    """Writes the gradients `outs` of k, v, beta, extra, w1, b1, w2 and b2, those that are there, contiguous."""
    net = _ready(net)
    batch, tokens, heads, values = net.v.shape
    groups, keys = net.k.shape[2:]
    group = heads // groups if groups else 1
    hidden, (slab_k, slab_v, features) = net.b1.shape[0], _slabs(net)
    programs = batch * -(-tokens // (rows * blocks)) * groups
    weights = batch * -(-tokens // _WEIGHT_ROWS)
    d_inner = d_keys = sums = products = None
    if "w1" in outs:
        d_inner = net.k.new_empty((batch, tokens, heads, hidden))
        d_keys = net.k.new_empty((batch, tokens, groups, hidden)) if group > 1 else None
        products = net.k.new_empty((weights, net.w1.numel()), dtype=torch.float32)
    if {"b1", "w2", "b2"} & set(outs):
        sums = net.k.new_empty((programs, 2 * hidden + 1), dtype=torch.float32)
    sizes = (tokens, net.sequences, heads, group, *strides(net.k), *strides(net.v))
    tiles = (keys, values, hidden, slab_k, slab_v, features)
    NETWORK_GRADIENTS(
        programs,
        (
            net.k, net.v, net.beta, net.extra, net.w1, net.b1, net.w2, net.b2, net.cu_seqlens, d_flux,
            outs.get("k"), outs.get("v"), outs.get("beta"), outs.get("extra"), d_inner, d_keys, sums,
            *sizes, *strides(net.beta), *strides(d_flux),
        ),
        (*tiles, rows, blocks, net.chunk, dot),
        _warps(net.k.dtype, rows, min(features, slab_k, slab_v), features),
        2,
    )  # fmt: skip
    if sums is not None:
        add_up(sums, programs, 2 * hidden + 1, [(outs.get("b1"), hidden), (outs.get("w2"), hidden), (outs.get("b2"), 1)])
    if products is None:
        return
    parts = -(-keys // slab_k) + -(-values // slab_v) + (net.extra is not None)
    NETWORK_WEIGHTS(
        weights * parts,
        (net.k, net.v, net.extra, d_inner, d_keys, net.cu_seqlens, products, *sizes),
        (*tiles, _WEIGHT_ROWS, net.chunk, dot),
        _warps(net.k.dtype, features, min(slab_k, slab_v), features),
        2,
    )
    add_up(products, weights, net.w1.numel(), [(outs["w1"], net.w1.numel())])

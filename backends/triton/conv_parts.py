"""The launches of `short_conv` and `qkv_prepare`: one forward, two backward, for the convolutions of q, k and v or for one alone, which is called v.

Also what their candidates are: how many tokens a program has of how many channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.short_conv import ShortConv
from titans_backends.signature import Signature

from .conv_gradients import WALK
from .conv_rows import NORMS, PREPARE
from .grid import on_device, slot_count, strides, unit_stride
from .partial_sums import add_up
from .serving import tile_width

__all__ = ["Parts", "backward_ways", "convolved", "convolved_backward", "ways"]

Parts = tuple[ShortConv | None, ShortConv | None, ShortConv]
"""The convolutions of q, k and v; q and k both or neither."""

_TILES = ((4096, 4), (2048, 4), (1024, 2))
"""Numbers of a forward program's tile, and its warps."""
_WALKS = ((64, 128), (16, 128), (128, 256))
"""Tokens that a backward program walks, and at least how many channels it has."""
_LANES = 128
"""Channels of a warp in a walk: four of a thread, whose last rows and sums take 100 registers."""
_FULL = 2048
"""Programs that fill a card."""


def _numbers(signature: Signature) -> int:
    """How many numbers the three tensors have."""
    sizes = dict(signature.dims)
    keys = 2 * sizes["G"] * sizes["K"] if signature.has("q") else 0
    return sizes["B"] * sizes["T"] * (keys + sizes["H"] * sizes["V"])


def ways(signature: Signature) -> list[Candidate]:
    """Tiles, the largest first but where they would leave the card idle; the set is the same for every length and batch."""
    wide = max(tile_width(signature.dim("K")), tile_width(signature.dim("V")))
    few = not signature.batch_invariant and _numbers(signature) < _FULL * _TILES[0][0]
    plans = dict.fromkeys((max(4, min(128, tile // wide)), warps) for tile, warps in (reversed(_TILES) if few else _TILES))
    return [Candidate("triton", "rows", (("rows", rows), ("warps", warps))) for rows, warps in plans]


def backward_ways(signature: Signature) -> list[Candidate]:
    """Walks, long ones first but where they would leave the card idle."""
    few = not signature.batch_invariant and _numbers(signature) < _FULL * 64 * 128
    wide = max(tile_width(signature.dim("K")), tile_width(signature.dim("V")))
    found = []
    for length, channels in (_WALKS[1], _WALKS[0], _WALKS[2]) if few else _WALKS:
        channels = max(channels, wide)
        params = (("span", length), ("channels", channels), ("warps", channels // _LANES))
        found.append(Candidate("triton", "walk", params, direction="backward"))
    return found


def _sizes(parts: Parts) -> tuple[int, int, int, int]:
    """Heads and head_dim of k, then of v; without k those of v."""
    _, k, v = parts
    heads, values = v.x.shape[2:]
    groups, keys = (heads, values) if k is None else k.x.shape[2:]
    return groups, keys, heads, values


def _sequences(v: ShortConv) -> int:
    return v.x.shape[0] if v.cu_seqlens is None else v.cu_seqlens.numel() - 1


def _each(parts: Parts, name: str) -> list[Tensor | None]:
    """One tensor of each part, contiguous but for x, whose rows are."""
    found = [None if part is None else getattr(part, name) for part in parts]
    return [None if x is None else unit_stride(x) if name == "x" else x.contiguous() for x in found]


def convolved(parts: Parts, norm: str, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """y of q, k and v, then their final states."""
    v = parts[2]
    batch, tokens = v.x.shape[:2]
    groups, keys, heads, values = _sizes(parts)
    rows = int(candidate.param("rows"))
    xs, states = _each(parts, "x"), _each(parts, "initial_state")
    ys = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    finals: list[Tensor | None] = [None] * 3
    if v.output_final_state:
        finals = [None if x is None else x.new_empty((_sequences(v), *x.shape[2:], 4), dtype=torch.float32) for x in xs]
    packed = on_device(v.cu_seqlens, v.x)
    if not tokens and packed is None:
        return (*ys, *(_handed_on(state, final) for state, final in zip(states, finals, strict=True)))
    slots = slot_count(batch, tokens, rows, packed)
    PREPARE(
        slots * ((0 if xs[0] is None else 2 * groups) + heads),
        (
            *xs, *_each(parts, "weight"), *_each(parts, "bias"), *states, packed, *ys, *finals,
            slots, tokens, _sequences(v), groups, heads, *strides(xs[0]), *strides(xs[1]), *strides(xs[2]),
        ),
        (keys, values, tile_width(keys), tile_width(values), rows, v.lookahead, v.activation == "silu", NORMS[norm]),
        int(candidate.param("warps")),
        2,
    )  # fmt: skip
    return (*ys, *finals)


def _handed_on(given: Tensor | None, like: Tensor | None) -> Tensor | None:
    """What a call without tokens gives for `like`: what was given, or zeros."""
    if like is None:
        return None
    return torch.zeros_like(like) if given is None else given.clone()


def _span(numbers: int, width: int, heads: int) -> int:
    """How many heads of a width a program of so many channels has, a power of two."""
    return min(max(1, numbers // width), 1 << (heads - 1).bit_length())


def convolved_backward(
    parts: Parts, norm: str, grads: tuple[Tensor | None, ...], needs: tuple[frozenset[str], ...], candidate: Candidate
) -> list[tuple[Tensor | None, ...]]:
    """Of each part the gradients of x, weight, bias and initial_state that its `needs` names; `grads` are those of `convolved`'s results."""
    v = parts[2]
    batch, tokens = v.x.shape[:2]
    groups, keys, heads, values = _sizes(parts)
    length, channels = int(candidate.param("span")), int(candidate.param("channels"))
    xs, weights, biases, states = (_each(parts, name) for name in ("x", "weight", "bias", "initial_state"))
    d_ys = [None if grad is None else unit_stride(grad) for grad in grads[:3]]
    d_finals = [None if grad is None else grad.contiguous() for grad in grads[3:]]
    d_xs, d_weights, d_biases, d_states = (
        [
            None if x is None or name not in wanted else torch.empty(x.shape, dtype=x.dtype, device=x.device)
            for x, wanted in zip(given, needs, strict=True)
        ]
        for name, given in (("x", xs), ("weight", weights), ("bias", biases), ("initial_state", states))
    )
    packed = on_device(v.cu_seqlens, v.x)
    slots = slot_count(batch, tokens, length, packed)
    if not tokens and packed is None:
        d_states = [_handed_on(grad, like) for grad, like in zip(d_finals, d_states, strict=True)]
    summed = [
        (out, 0 if weight is None else weight.numel() // share)
        for weight, *outs in zip(weights, d_weights, d_biases, strict=True)
        for out, share in zip(outs, (1, 4), strict=True)
    ]
    total = sum(size for _, size in summed)
    partial = v.x.new_empty((slots, total), dtype=torch.float32) if any(out is not None for out, _ in summed) else None
    tiles = (_span(channels, tile_width(keys), groups), _span(channels, tile_width(values), heads))
    wanted = [int(bool(names)) for names in needs]
    blocks = slots * ((wanted[0] + wanted[1]) * -(-groups // tiles[0]) + wanted[2] * -(-heads // tiles[1]))
    WALK(
        blocks,
        (
            *xs, *weights, *biases, *states, packed, *d_ys, *d_finals, *d_xs, *d_states, partial,
            slots, tokens, _sequences(v), groups, heads, total, *wanted,
            *strides(xs[0]), *strides(xs[1]), *strides(xs[2]), *strides(d_ys[0]), *strides(d_ys[1]), *strides(d_ys[2]),
        ),
        (keys, values, tile_width(keys), tile_width(values), *tiles, length, v.lookahead, v.activation == "silu", NORMS[norm]),
        int(candidate.param("warps")),
        2,
    )  # fmt: skip
    if partial is not None:
        add_up(partial, slots, total, summed)
    return list(zip(d_xs, d_weights, d_biases, d_states, strict=True))

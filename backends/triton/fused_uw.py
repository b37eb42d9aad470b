"""fused_uw: u and w from a given attn_const in one launch, which reads attn_const once for both (SPEC.md 3's last line); the backward is uw_product_gradients.py.

Leading dimensions are flattened: a view where one stride describes them, a copy where not.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.fused_uw import FusedUW
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .ahead import ahead_of
from .matrices import flat
from .program import remembering, remembering_backward
from .serving import CONSUMER_SHARED_BYTES, dots, serves, tile_width
from .uw_product import PRODUCT, SERIES
from .uw_product_gradients import backward_candidates, run_backward

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]

_PLANS = (
    ("product", 64, 64, 128, 0, 4, 3),
    ("series", 64, 64, 128, 4, 4, 2),
    ("product", 64, 64, 64, 0, 4, 3),
    ("series", 64, 64, 128, 8, 4, 3),
    ("product", 128, 64, 128, 0, 8, 3),
    ("product", 64, 128, 128, 0, 4, 2),
    ("series", 64, 64, 64, 4, 4, 3),
    ("product", 64, 32, 128, 0, 4, 2),
    ("product", 32, 32, 64, 0, 4, 2),
)
"""Variant, rows, inner tile, columns of u and of w, matrices a program, warps, stages. The last fits every card."""
_MOST = 6


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says; any C."""
    return serves(signature, machine)


def _shared_bytes(size: int, itemsize: int, variant: str, rows: int, inner: int, keys: int, values: int, stages: int) -> int:
    """Shared memory of a program at most: its operand tiles, as often as the loop that loads them is pipelined, and what a store turns around."""
    operands, turned = (rows * inner + inner * (keys + values)) * itemsize, rows * max(keys, values) * itemsize
    if variant == "series":
        return operands * stages + turned
    return max(operands * (stages if size > inner else 1), turned)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """A matrix by tiles, or several small matrices one after the other in a program, whose loads overlap."""
    size, keys, values = (signature.dim(letter) for letter in "CKV")
    itemsize, limit = signature.dtype.itemsize, machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    found: dict[Candidate, None] = {}
    for variant, rows, inner, columns, count, warps, stages in _PLANS:
        rows, inner = min(rows, tile_width(size)), min(inner, tile_width(size))
        columns = min(columns, 64) if itemsize == 4 else columns
        key_tile, value_tile = min(columns, tile_width(keys)), min(columns, tile_width(values))
        if variant == "series" and size > min(rows, inner):
            continue
        if _shared_bytes(size, itemsize, variant, rows, inner, key_tile, value_tile, stages) > limit:
            continue
        if itemsize == 4 and rows * (key_tile + value_tile) >= 64 * 128:
            warps = 8  # products of float32 want registers
        while warps > 1 and rows * (key_tile + value_tile) < 1024 * warps:
            warps //= 2
        params = {"rows": rows, "inner": inner, "key_tile": key_tile, "value_tile": value_tile, "count": count, "warps": warps, "stages": stages}
        if variant == "product":
            del params["count"]
            if size <= inner:
                del params["stages"]
        found[Candidate("triton", variant, (*params.items(), ("dot", dots(signature)[0])))] = None
    offered, least = list(found)[:_MOST], list(found)[-1]
    return [*offered, *(replace(least, params=(*least.params[:-1], ("dot", dot))) for dot in dots(signature)[1:])]


def run(call: FusedUW, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """u and w, contiguous."""
    (attn, attn_b), (v, v_b), (k, k_b) = flat(call.attn_const), flat(call.v_beta), flat(call.k_beta)
    u, w = torch.empty(v.shape, dtype=v.dtype, device=v.device), torch.empty(k.shape, dtype=v.dtype, device=v.device)
    size, values, keys = attn.shape[-1], v.shape[-1], k.shape[-1]
    if not size:
        return u, w
    matrices = attn.numel() // (size * size)
    rows, inner, key_tile, value_tile, warps = (int(candidate.param(name)) for name in ("rows", "inner", "key_tile", "value_tile", "warps"))
    tiles = max(-(-keys // key_tile), -(-values // value_tile))
    args = (attn, v, k, u, w, size, matrices, attn_b, attn.stride(-2), v_b, v.stride(-2), k_b, k.stride(-2))
    constants = (keys, values, key_tile, value_tile, tiles, rows, inner, size % rows == 0 and size % inner == 0)
    dot = str(candidate.param("dot"))
    if candidate.variant == "series":
        count = int(candidate.param("count"))
        SERIES(-(-matrices // count) * tiles, args, (*constants, count, dot), warps, int(candidate.param("stages")))
    else:
        stages = 2 if size <= inner else int(candidate.param("stages"))
        PRODUCT(matrices * -(-size // rows) * tiles, args, (*constants, size <= inner, dot), warps, stages)
    return u, w


compile_ahead = ahead_of(run, "fused_uw", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)

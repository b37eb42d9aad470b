"""The gradients of fused_uw: dv and dk in one launch, d(attn_const) in another; a frozen input launches nothing (SPEC.md 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.fused_uw import FusedUW
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .launch import DTYPES, Kernel
from .serving import CONSUMER_SHARED_BYTES, padded
from .sources import source_names
from .strides import aligned_rows, flat

__all__ = ["backward_candidates", "run_backward"]

SOURCE = "fused_uw_gradients.cu"
_LAYOUT = "8P10q2i"
OPERANDS, ATTN = Kernel(SOURCE, "fused_uw_operands", _LAYOUT), Kernel(SOURCE, "fused_uw_attn", _LAYOUT)
_PLANS = ((64, 32, 128), (64, 64, 64), (32, 32, 64))
"""Rows of a block, inner tile, columns."""


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tiles that fit the card; the first is the default."""
    size, widest = signature.dim("C"), padded(max(signature.dim("K"), signature.dim("V")), 32)
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    found: dict[Candidate, None] = {}
    for rows, inner, columns in _PLANS:
        rows, columns = min(rows, padded(size, 32)), min(columns, widest, 256 // signature.dtype.itemsize)
        if shared_bytes(rows, inner, columns, signature.dtype) <= room:
            params = (("rows", rows), ("inner", inner), ("columns", columns))
            found[Candidate("cupy", "tiles", params, "backward", sources=source_names(SOURCE))] = None
    return list(found)


def shared_bytes(rows: int, inner: int, columns: int, dtype: torch.dtype) -> int:
    """Dynamic shared memory of a block of either kernel: two tiles of each operand."""
    return 2 * inner * (rows + max(rows, columns)) * dtype.itemsize


def run_backward(
    call: FusedUW, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of attn_const, v_beta and k_beta, in that order."""
    (attn, attn_m), (v, v_m), (k, k_m) = flat(call.attn_const), flat(call.v_beta), flat(call.k_beta)
    du, dw = grads
    made: list[Tensor | None] = []
    for name, x in (("attn_const", call.attn_const), ("v_beta", call.v_beta), ("k_beta", call.k_beta)):
        made.append(torch.empty(x.shape, dtype=x.dtype, device=x.device) if name in needs else None)
    d_attn, dv, dk = made
    size, values, keys = attn.shape[-1], v.shape[-1], k.shape[-1]
    for gradient, missing in ((dv, du is None), (dk, dw is None), (d_attn, du is None and dw is None)):
        if gradient is not None and missing:
            gradient.zero_()
    matrices = call.v_beta.numel() // max(size * values, 1)
    if not matrices:
        return d_attn, dv, dk
    (left, left_m), (right, right_m) = (None, 0) if du is None else flat(du), (None, 0) if dw is None else flat(dw)
    rows, inner, columns = (int(candidate.param(name)) for name in ("rows", "inner", "columns"))
    blocks, given = -(-size // rows), [x for x in (attn, v, k, left, right) if x is not None]
    wanted_v, wanted_k = dv if du is not None else None, dk if dw is not None else None
    macros = (
        ("DTYPE", DTYPES[v.dtype]), ("KEYS", keys), ("VALUES", values), ("SIDE", rows), ("INNER", inner), ("SLICE", columns),
        ("ALIGNED", all(aligned_rows(x, whole=True) for x in given)), ("GIVEN_U", du is not None), ("GIVEN_W", dw is not None),
    )  # fmt: skip
    args = (
        attn, v, k, left, right, d_attn, wanted_v, wanted_k, attn_m, attn.stride(-2), v_m, v.stride(-2), k_m, k.stride(-2),
        left_m, 0 if left is None else left.stride(-2), right_m, 0 if right is None else right.stride(-2), size, blocks,
    )  # fmt: skip
    shared = shared_bytes(rows, inner, columns, v.dtype)
    if wanted_v is not None or wanted_k is not None:
        OPERANDS((matrices * blocks * (-(-values // columns) + -(-keys // columns)), 1, 1), 2 * rows, macros, args, shared)
    if d_attn is not None and (du is not None or dw is not None):
        ATTN((matrices * blocks * blocks, 1, 1), 2 * rows, macros, args, shared)
    return d_attn, dv, dk

"""fused_uw: u and w from a given attn_const in one launch of tiles, for any C (SPEC.md 3's last line)."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.fused_uw import FusedUW
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .ahead import ahead_of
from .fused_uw_gradients import backward_candidates, run_backward
from .launch import DTYPES, Kernel
from .program import remembering, remembering_backward
from .serving import CONSUMER_SHARED_BYTES, padded, serves
from .serving import candidate as _candidate
from .strides import aligned_rows, flat

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]

SOURCE = "fused_uw.cu"
PRODUCT = Kernel(SOURCE, "fused_uw", "5P6q2i")
_MOST = 3
"""Candidates of a call."""
_PLANS = ((64, 64, 128, 1), (64, 64, 64, 1), (64, 64, 128, 2), (64, 32, 64, 1), (32, 32, 64, 1), (128, 64, 128, 1), (128, 32, 64, 1))
"""Rows of a block, inner tile, columns, warps along the columns."""


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says; any C."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tiles that fit the card; the first is the default."""
    size, widest = signature.dim("C"), padded(max(signature.dim("K"), signature.dim("V")), 32)
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    found: dict[Candidate, None] = {}
    for rows, inner, columns, split in _PLANS:
        rows, inner, columns = min(rows, padded(size)), min(inner, padded(size, 32)), min(columns, widest, 256 // signature.dtype.itemsize)
        if shared_bytes(rows, inner, columns, signature.dtype) <= room and columns // split >= 16:
            found[_candidate("tiles", (SOURCE,), rows=rows, inner=inner, columns=columns, split=split)] = None
    return list(found)[:_MOST]


def shared_bytes(rows: int, inner: int, columns: int, dtype: torch.dtype) -> int:
    """Dynamic shared memory of a block: two tiles of each operand."""
    return 2 * inner * (rows + columns) * dtype.itemsize


def run(call: FusedUW, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """u and w, contiguous."""
    (attn, attn_m), (v, v_m), (k, k_m) = flat(call.attn_const), flat(call.v_beta), flat(call.k_beta)
    u, w = torch.empty(v.shape, dtype=v.dtype, device=v.device), torch.empty(k.shape, dtype=v.dtype, device=v.device)
    size, values, keys = attn.shape[-1], v.shape[-1], k.shape[-1]
    if not u.numel():
        return u, w
    rows, inner, columns, split = (int(candidate.param(name)) for name in ("rows", "inner", "columns", "split"))
    blocks = -(-size // rows)
    aligned = all(aligned_rows(x, whole=True) for x in (attn, v, k))
    PRODUCT(
        (u.numel() // (size * values) * blocks * (-(-values // columns) + -(-keys // columns)), 1, 1),
        2 * rows * split,
        (
            ("DTYPE", DTYPES[v.dtype]), ("KEYS", keys), ("VALUES", values), ("SIDE", rows), ("INNER", inner), ("SLICE", columns),
            ("SPLIT", split), ("ALIGNED", aligned),
        ),
        (attn, v, k, u, w, attn_m, attn.stride(-2), v_m, v.stride(-2), k_m, k.stride(-2), size, blocks),
        shared_bytes(rows, inner, columns, v.dtype),
    )  # fmt: skip
    return u, w


compile_ahead = ahead_of(run, "fused_uw", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)

"""gated_delta_step: decode in one launch, on a state for each sequence or on the slots of a pool (SPEC.md 9).

Out of place, a pool's other slots must be in the result too: it is cloned, and the clone's slots are written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_step import GatedDeltaStep
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .ahead import ahead_of
from .launch import DTYPES, Kernel
from .program import remembering
from .serving import candidate as _candidate
from .serving import serves
from .strides import aligned_rows, unit_stride

__all__ = ["candidates", "compile_ahead", "remember", "run", "supports"]

SOURCE = "gated_delta_step.cu"
STEP = Kernel(SOURCE, "gated_delta_step", "9P24q7if")

_PLANS = ((32, 4), (16, 2), (8, 4))
"""Value columns of a warp, and its block's warps; what comes first was the fastest on an H100, from 8 sequences of 32 heads of 128 on."""
_NARROW = ((16, 2), (16, 1), (8, 4), (32, 4))
"""The same for few heads and sequences: more blocks, fewer columns each."""
_MOST_REGISTERS = 128
"""State elements of a thread."""


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says; every option."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Columns and warps, the same for any number of heads; small blocks first where few heads would leave most of the card idle."""
    keys, values = signature.dim("K"), signature.dim("V")
    few = not signature.batch_invariant and signature.dim("B") * signature.dim("H") * keys * values < 16384 * (machine.sms or 64)
    fitting = [
        (width, warps)
        for width, warps in (_NARROW if few else _PLANS)
        if (width <= max(8, values) and 4 * -(-keys * width // 128) <= _MOST_REGISTERS)
    ]
    return [_candidate("warps", (SOURCE,), width=width, warps=warps) for width, warps in fitting]


def run(call: GatedDeltaStep, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and the state after the tokens: a new tensor, or the given one when in place."""
    q, k, v, beta, g, state, slots = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v), call.beta, call.g, call.state, call.state_indices
    batch, tokens, heads, values = v.shape
    groups, keys = k.shape[2:]
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if slots is not None and slots.device != v.device:
        slots = slots.to(v.device)
    if call.inplace:
        after = state
    elif slots is None:
        after = torch.empty(state.shape, dtype=state.dtype, device=state.device)
    else:
        after = state = state.clone(memory_format=torch.contiguous_format)
    width, warps = int(candidate.param("width")), int(candidate.param("warps"))
    vector = values % 4 == 0 and aligned_rows(state) and aligned_rows(after)
    STEP(
        (-(-batch * heads * -(-values // width) // warps), 1, 1),
        32 * warps,
        (
            ("DTYPE", DTYPES[v.dtype]), ("KEYS", keys), ("VALUES", values), ("WIDTH", width), ("WARPS", warps),
            ("VECTOR", vector), ("PACKED", aligned_rows(q) and aligned_rows(k)), ("L2NORM", bool(call.qk_l2norm)),
        ),
        (
            q, k, v, beta, g, state, after, slots, o,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *beta.stride(), *((0, 0, 0) if g is None else g.stride()),
            *state.stride(), *after.stride(), 0 if slots is None else slots.stride(0),
            batch, tokens, heads, heads // groups if groups else 1,
            beta.dtype == torch.float32, g is not None and g.dtype == torch.float32, slots is not None and slots.dtype == torch.int64,
            keys**-0.5 if call.scale is None else float(call.scale),
        ),
    )  # fmt: skip
    return o, after


compile_ahead = ahead_of(run)
remember = remembering(run)

"""deep_core: one to three launches forward: sums, blocks in turn or side by side, all tokens (SPEC.md 7). Experimental; the backward is left to eager.

Every variant of the op is served; a packed call's cu_seqlens is read on the device. The kernels: deep_scan, deep_parallel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.deep_core import DeepCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .ahead import ahead_of
from .deep_calls import DeepCall
from .deep_plans import forward_ways
from .program import remembering
from .serving import serves

__all__ = ["candidates", "compile_ahead", "remember", "run", "supports"]


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says; every option."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tiles of value columns with their warps and stages, the expected best first."""
    return forward_ways(signature, machine)


def run(call: DeepCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o and the final carry."""
    made = DeepCall(call, candidate)
    o = torch.empty(call.v.shape, dtype=call.v.dtype, device=call.v.device)
    final = made.carry() if call.output_final_state else (None,) * 4
    if o.numel() or call.output_final_state:
        if candidate.variant == "blocks":
            made.in_parallel(o, final)
        else:
            made.sweep(o, made.blocks() if candidate.variant == "prepared" else (None, None), (None, None), final)
    return o, *final


compile_ahead = ahead_of(run)
remember = remembering(run)

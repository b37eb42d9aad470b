"""deep_core: one to three launches forward, five backward: sums, blocks forward and in reverse, their scalars, all tokens (SPEC.md 7). Experimental.

Every variant of the op is served; a packed call's cu_seqlens is read on the device. The kernels: deep_scan, deep_parallel, deep_gradients.
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
from .deep_backward import gradients
from .deep_calls import DeepCall
from .deep_plans import backward_ways, forward_ways
from .program import remembering, remembering_backward
from .serving import serves

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says; every option."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tiles of value columns with their warps and stages, the expected best first."""
    return forward_ways(signature, machine)


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The same of the backward."""
    return backward_ways(signature, machine)


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


def run_backward(
    call: DeepCore, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, eta, g, gate and the initial carry, in that order."""
    return gradients(call, grads, needs, candidate)


compile_ahead = ahead_of(run, "deep_core", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)

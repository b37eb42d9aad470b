"""gated_delta_rule in Triton: four schedules of the exact rule, for the tuner to race (SPEC.md 3, 4).

whole    one launch, everything in the serial loop: short sequences, no scratch memory
scan     blocks prepared in parallel, then one scan that holds the state and writes the output
split    the same with every sequence cut into segments that run side by side; what a segment does to the state is computed exactly
states   the scan writes the state at each block's start, outputs then in parallel
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GRID, GatedDeltaRule
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .ahead import ahead_of
from .delta_backward import gradients
from .delta_backward_plans import backward_plans
from .delta_plans import delta_plans, saving
from .delta_schedules import SCHEDULES, Operands
from .grid import on_device, unit_stride
from .program import remembering, remembering_backward
from .serving import serves

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]

_INPUTS = ("q", "k", "v", "beta", "g", "gate", "initial_state")


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Every option, at any chunk size: the rule is the same on every grid."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The schedules with their tiles; the default by how many programs the card wants."""
    return saving(delta_plans(signature, machine), signature, _grid(signature), ("scan", "split"))


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The states computed again, or handed over by the forward."""
    return backward_plans(signature, machine, _grid(signature))


def _grid(signature: Signature) -> int:
    chunk = signature.option("chunk_size")
    return GRID if chunk is None else int(chunk)


def _operands(call: GatedDeltaRule, o: Tensor | None) -> Operands:
    initial = None if call.initial_state is None else call.initial_state.contiguous()
    v = unit_stride(call.v)
    scale = call.k.shape[3] ** -0.5 if call.scale is None else float(call.scale)
    cu_seqlens = on_device(call.cu_seqlens, v)
    return Operands(unit_stride(call.q), unit_stride(call.k), v, call.beta, call.g, call.gate, initial, None, o, cu_seqlens, scale, call.qk_l2norm)


def run(call: GatedDeltaRule, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o and the final state."""
    v = call.v
    x = _operands(call, torch.empty(v.shape, dtype=v.dtype, device=v.device))
    if call.output_final_state:
        x.final = torch.empty(x.sequences, x.heads, x.keys, x.values, dtype=torch.float32, device=v.device)
    kept = (x.saving(int(candidate.param("block"))),) if candidate.saves_states else ()
    if v.numel() or x.final is not None:
        SCHEDULES[candidate.variant](x, dict(candidate.params))
    return x.o, x.final, *kept


def run_backward(
    call: GatedDeltaRule, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, beta, g, gate and the initial state, in that order."""
    return gradients(_operands(call, None), dict(candidate.params), call, grads, states, needs, _INPUTS)


compile_ahead = ahead_of(run, "gated_delta_rule", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)

"""gated_delta_rule by FlashQLA's `chunk_gated_delta_rule_fwd`, on chunks of 64 tokens, with its context parallelism and without.

With it a single sequence is cut into segments where FlashQLA's own cost model says so, and a segment starts from what is left of the earlier ones after the
decay, which is an approximation; the gate decides whether it may race. Copies to FlashQLA's layout and the output gate, which it has not, are part of a call.
"""

from __future__ import annotations

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from ..peers import gated, sources
from .gradients import backward_candidates, run_backward
from .inputs import Kept, cuts, keeping, kernels, made, plan_of
from .serving import DISTRIBUTIONS
from .serving import serves as supports

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """With context parallelism, as its users have it, and where that can cut anything without; in training also what hands its backward the inverses."""
    shared = {"batch_invariant": False, "sources": sources(*DISTRIBUTIONS)}
    plain = [Candidate("flash_qla", "chunked", (("auto_cp", auto),), **shared) for auto in cuts(signature)]
    if signature.regime == "inference":
        return plain
    return [*map(keeping, plain), *plain]


def run(call: GatedDeltaRule, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o, the final state and, by `kept`, what FlashQLA's autograd keeps."""
    x, keeps, auto = made(call), candidate.saves_states, bool(candidate.param("auto_cp"))
    plan = plan_of(x, auto) if keeps else None
    running, inverse, o, _, state, segments = kernels().chunk_gated_delta_rule_fwd(
        g=x.g, output_final_state=call.output_final_state, auto_cp=auto, enable_fwd_cp_cache=keeps, cp_context=plan, **x.shared
    )
    outputs = gated(o, call.gate), x.of_all(state, call.initial_state) if call.output_final_state else None
    return (*outputs, *Kept(running, inverse, x.units, segments, plan).tensors) if keeps else outputs

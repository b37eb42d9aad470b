"""gated_delta_step by FLA's `fused_recurrent_gated_delta_rule_fwd`: a state for each sequence; no pool of states, which it does not know.

It returns a new state; in place that is copied back, which counts.
"""

from __future__ import annotations

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_step import GatedDeltaStep
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict, refused

from ..peers import dense, load, sources
from .dispatching import fla_alone
from .serving import DISTRIBUTION, serves

__all__ = ["candidates", "run", "supports"]

_FUNCTIONS = ("fused_recurrent_gated_delta_rule_fwd",)


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says, in float32 exactly; no pool."""
    pool = refused("it takes no state_indices: a state for each sequence alone; use backend='triton'") if signature.has("state_indices") else ACCEPTED
    return serves(signature, machine, exact=True) & pool


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The one kernel."""
    return [Candidate("fla", "fused_recurrent", batch_invariant=False, sources=sources(DISTRIBUTION))]


def run(call: GatedDeltaStep, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o and the state."""
    q, k, v, beta, state = (dense(x) for x in (call.q, call.k, call.v, call.beta, call.state))
    with fla_alone():
        o, after = load("fla", "fla.ops.gated_delta_rule.fused_recurrent", _FUNCTIONS).fused_recurrent_gated_delta_rule_fwd(
            q=q,
            k=k,
            v=v,
            g=None if call.g is None else dense(call.g),
            beta=beta,
            scale=k.shape[-1] ** -0.5 if call.scale is None else call.scale,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=call.qk_l2norm,
        )
    if not call.inplace:
        return o, after
    call.state.copy_(after)
    return o, call.state

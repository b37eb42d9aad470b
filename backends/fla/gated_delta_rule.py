"""gated_delta_rule by FLA: `chunk_gated_delta_rule_fwd`, or `chunk_delta_rule_fwd` where there is no decay, on chunks of 64 tokens.

The rule is the same on every chunk grid, so a given chunk_size changes nothing. Copies to FLA's layout, a zero decay where the gated rule stands in for the
plain one, and the output gate, which FLA has not, are part of a call.
"""

from __future__ import annotations

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from ..peers import gated, refuse_packed_graph, sources
from .dispatching import fla_alone
from .gradients import backward_candidates, run_backward
from .inputs import delta, is_gated, keeping, made, rule
from .serving import DISTRIBUTION, refuse_backward, serves, without_gate

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says; not packed in a captured graph, and not in training where FLA has no right gradients."""
    return serves(signature, machine) & refuse_packed_graph(signature) & refuse_backward(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """FLA's one forward: of the plain rule where that serves, else of the gated one; in training first what hands its backward the inverses."""
    variant = "delta_rule" if without_gate(signature) else "gated_delta_rule"
    plain = Candidate("fla", variant, batch_invariant=False, sources=sources(DISTRIBUTION))
    return [plain] if signature.regime == "inference" else [keeping(plain), plain]


def run(call: GatedDeltaRule, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o, the final state and, by what keeps, what FLA's autograd keeps."""
    with_decay = is_gated(candidate)
    x = made(call, zero_decay=with_decay)
    with fla_alone():
        if with_decay:
            running, o, inverse, state, _, _ = rule().chunk_gated_delta_rule_fwd(
                g=x.g, beta=x.beta, output_final_state=call.output_final_state, **x.shared
            )
        else:
            running, (o, inverse, state) = None, delta().chunk_delta_rule_fwd(beta=x.beta, output_final_state=call.output_final_state, **x.shared)
    if o.dtype is not call.v.dtype:
        o = o.to(call.v.dtype)
    outputs = gated(o, call.gate), state if call.output_final_state else None
    if not candidate.saves_states:
        return outputs
    return (*outputs, inverse, *x.units) if running is None else (*outputs, inverse, running, *x.units)

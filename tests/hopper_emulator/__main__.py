"""Every candidate of an op, run as machine code and compared with float64: `python -m tests.hopper_emulator gated_delta_rule --dtype float16 --K 60 --V 100`.

With `--backward` those of the backward. Seconds to a minute for each, most of it the compiler's. Whether a call is served does not matter.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

import torch
from torch import Tensor

from tests.hopper_emulator import Fault, emulating
from tests.triton_forms import module_of
from tests.triton_machines import H100
from titans_backends.backend import Candidate
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build, cotangents
from titans_backends.contracts.contract import Call, Contract
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.signature import Regime, Signature

__all__ = ["error", "exact", "run", "signature"]


def signature(made: Contract, call: Call, regime: Regime) -> Signature:
    """Of the call as if it lay on a card."""
    return replace(signature_of(made, call, validate(made, call), regime=regime), device="cuda")


def exact(made: Contract, call: Call, grads: tuple[Tensor | None, ...] | None) -> tuple[Tensor | None, ...]:
    """The outputs in float64, or with `grads` the gradients of every differentiable input."""
    given = {
        name: value.detach().double().requires_grad_(grads is not None) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in ((name, getattr(call, name)) for name in (*made.argument_by_name, *made.option_by_name))
    }
    wide = made.make_call(**given)
    outputs = made.reference(wide)
    if grads is None:
        return outputs
    wanted = [given[name] for name in made.differentiable if given[name] is not None]
    total = torch.stack(
        [(output * grad.double()).sum() for output, grad in zip(outputs, grads, strict=True) if output is not None and grad is not None]
    )
    found = iter(torch.autograd.grad(total.sum(), wanted, allow_unused=True))
    return tuple(None if given[name] is None else next(found) for name in made.differentiable)


def run(made: Contract, call: Call, candidate: Candidate, grads: tuple[Tensor | None, ...] | None = None) -> tuple[Tensor | None, ...]:
    """What a candidate computes as machine code."""
    module = module_of(made.name)
    with torch.no_grad(), emulating():
        if grads is None:
            return module.run(call, candidate)
        needs = frozenset(name for name in made.differentiable if getattr(call, name) is not None)
        return module.run_backward(call, grads, None, needs, candidate)  # type: ignore[attr-defined, no-any-return]


def error(found: tuple[Tensor | None, ...], wanted: tuple[Tensor | None, ...]) -> float:
    """The largest of the relative errors; NaN where one is."""
    errors = [
        float((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30))
        for one, other in zip(found, wanted, strict=False)
        if one is not None and other is not None
    ]
    return max(errors, key=lambda value: (value != value, value))


def main() -> int:
    """Prints a line for each candidate; 1 where one is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.hopper_emulator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--view", default="contiguous", choices=["contiguous", "transposed", "misaligned", "expanded"])
    for name, default in (("K", 64), ("V", 64), ("T", 138), ("most", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backward", action="store_true")
    asked = parser.parse_args()
    made = CONTRACTS[asked.op]
    variant = made.variants[0]
    case = Case("asked", B=1, T=asked.T, G=1, H=2, K=asked.K, V=asked.V, dtype=getattr(torch, asked.dtype), view=asked.view)
    case = replace(case, options=variant.options, given=variant.given)
    call = build(made, case)
    facts = signature(made, call, "training" if asked.backward else "inference")
    grads = cotangents(made, call, made.reference(call)) if asked.backward else None
    wanted, worst = exact(made, call, grads), 0
    module = module_of(asked.op)
    found = module.backward_candidates(facts, H100) if asked.backward else module.candidates(facts, H100)  # type: ignore[attr-defined]
    for candidate in [one for one in found if not one.saves_states][: asked.most or None]:
        start = time.perf_counter()
        try:
            value = error(run(made, call, candidate, grads), wanted)
            right, said = value < 2e-2, f"{value:.1e}"
        except Fault as fault:
            right, said = False, str(fault)
        worst |= not right
        print(f"{'right' if right else 'WRONG'} {candidate.label}: {said} ({time.perf_counter() - start:.0f} s)", flush=True)
    return int(worst)


if __name__ == "__main__":
    sys.exit(main())

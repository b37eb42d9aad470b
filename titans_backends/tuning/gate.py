"""May a candidate be timed: it runs the hostile cases and the timed shape, and its results are compared with float64 references.

Outputs, states and gradients must keep the contract's tolerance, shape, dtype and layout; inputs must come through unchanged and unshared;
where a candidate says that it is deterministic, two runs must give the same bits. What fails is a value with its error, never an exception.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from titans_backends.backend import Candidate, OpModule, TrainableOpModule
from titans_backends.buckets import Bucket
from titans_backends.contracts import contract as contract_of
from titans_backends.contracts.case import Case
from titans_backends.contracts.contract import Call, Contract, state_dtype
from titans_backends.contracts.tolerance import Tolerance
from titans_backends.machine import Machine
from titans_backends.offers import unshared
from titans_backends.plan import Handed
from titans_backends.signature import Signature
from titans_backends.tuning.guarded_run import run_backward, run_forward
from titans_backends.tuning.ledger import Ledger, Rejected, gradient_floor, limits
from titans_backends.tuning.problem import case_of, signature_of_case
from titans_backends.tuning.slices import Part
from titans_backends.tuning.suite import Exam, Outputs, suite, suite_key

__all__ = ["GateResult", "check_backward", "check_backward_part", "check_forward", "check_forward_part", "failure", "gate", "taken"]


@dataclass(frozen=True, slots=True)
class GateResult:
    """Passed where `reason` is empty. `errors` holds the largest error per output or gradient, `skipped` the cases that it refuses."""

    reason: str = ""
    errors: tuple[tuple[str, float], ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the candidate may be timed."""
        return not self.reason


def gate(
    bucket: Bucket, candidate: Candidate, module: OpModule | TrainableOpModule, machine: Machine, device: str, heads: int | None = None
) -> GateResult:
    """Runs a candidate on the hostile cases that it takes. What the candidate raises is its failure, named with the case."""
    made, ledger, skipped = contract_of(bucket.op), Ledger(), []
    exams = suite(suite_key(bucket), device)
    takes = taken(bucket, candidate, module, machine, device, [exam.case for exam in exams], heads)
    for exam, taking in zip(exams, takes, strict=True):
        where = exam.case.name
        if taking is None:
            skipped.append(where)
            continue
        limit = limits(taking.dtype, machine, taking.float32)
        try:
            if candidate.direction == "forward":
                check_forward(made, candidate, module, exam, limit, ledger, where)
            else:
                maker = next((one for one in module.candidates(taking, machine) if one.agrees(candidate)), None)
                check_backward(made, candidate, module, exam, limit, ledger, where, maker=maker)
        except Rejected as reason:
            return GateResult(str(reason), tuple(ledger.errors.items()), tuple(skipped))
        except Exception as error:  # a candidate's own failure is its result
            return GateResult(failure(error, where), tuple(ledger.errors.items()), tuple(skipped))
    return GateResult("", tuple(ledger.errors.items()), tuple(skipped))


def taken(
    bucket: Bucket,
    candidate: Candidate,
    module: OpModule | TrainableOpModule,
    machine: Machine,
    device: str,
    cases: Sequence[Case],
    heads: int | None = None,
) -> list[Signature | None]:
    """For each case of a bucket's, whether a candidate is examined on it: a signature where its backend offers it, or None.

    What pays at many heads or tokens alone may be offered at none of the cases' few: then it takes those whose tensors and options it is offered for at the bucket's own
    sizes. A kernel has to be right wherever `supports` says yes; `candidates` says what is worth trying.
    """
    here = [signature_of_case(bucket, case, device) for case in cases]
    found = [signature if _offered(candidate, module, signature, machine) else None for signature in here]
    if any(found):
        return found
    own = case_of(bucket, heads)
    sized = [replace(case, B=own.B, T=own.T, G=own.G, H=own.H, lengths=own.lengths) for case in cases]
    large = [signature_of_case(bucket, case, device) for case in sized]
    return [
        big if module.supports(small, machine) and _offered(candidate, module, big, machine) else None for small, big in zip(here, large, strict=True)
    ]


def failure(error: Exception, where: str) -> str:
    """A sentence for what a candidate raised."""
    text = str(error).strip().split("\n", 1)[0][:300]
    said = any(words in str(error).lower() for words in ("can't allocate memory", "out of memory"))
    memory = said or isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return f"{'out of memory' if memory else 'raised'} on {where}: {type(error).__name__}{': ' if text else ''}{text}"


def _offered(candidate: Candidate, module: OpModule | TrainableOpModule, signature: Signature, machine: Machine) -> bool:
    """Whether the backend would run this candidate on another signature: it may refuse a case honestly."""
    if not module.supports(signature, machine):
        return False
    if candidate.direction == "forward":
        return candidate in module.candidates(signature, machine)
    return hasattr(module, "backward_candidates") and candidate in module.backward_candidates(signature, machine)


def check_forward(
    made: Contract, candidate: Candidate, module: OpModule, exam: Exam, limit: Tolerance, ledger: Ledger, where: str, *, again: bool = True
) -> None:
    """One exam of a forward candidate: layout, outputs, saved states, bits. Rejected says what is wrong. `again` False: called once, so no bits."""
    first = run_forward(made, candidate, module, exam.call, where)
    _compare_forward(made, candidate, first, exam, limit, ledger, where)
    if not again:
        return
    second = run_forward(made, candidate, module, exam.call, where, repeated=True)
    if candidate.deterministic:
        count = len(made.outputs) + (candidate.saves_states and not candidate.residual)
        _same_bits(first[:count], second[:count], where)
    else:
        _compare_forward(made, candidate, second, exam, limit, ledger, f"{where}, called again")


def _compare_forward(made: Contract, candidate: Candidate, found: Outputs, exam: Exam, limit: Tolerance, ledger: Ledger, where: str) -> None:
    outputs, states = found[: len(made.outputs)], found[len(made.outputs) :]
    check_layout(made, exam.call, outputs, exam.outputs, where)
    for spec, got, want in zip(made.outputs, outputs, exam.outputs, strict=True):
        if got is not None and want is not None:
            ledger.compare(spec.name, got, want, limit.outputs, where)
    if states and candidate.residual:
        if any(one is None for one in states):
            raise Rejected(f"a tensor of its residual is None on {where}")
    elif states and states[0] is not None and exam.states is not None and exam.states.numel():
        if states[0].shape != exam.states.shape:
            raise Rejected(f"the saved states have shape {tuple(states[0].shape)}, not {tuple(exam.states.shape)}, on {where}")
        ledger.compare("states", states[0], exam.states, limit.outputs, where)


def check_layout(made: Contract, call: Call, outputs: Outputs, wanted: Outputs, where: str) -> None:
    """Which outputs are there, their shapes, dtypes and strides."""
    dtype = made.tensors(call)[made.operands[0]].dtype
    for spec, got, want in zip(made.outputs, outputs, wanted, strict=True):
        if (got is None) != (want is None):
            raise Rejected(f"{spec.name} {'is missing' if got is None else 'was not asked for'} on {where}")
        if got is None or want is None:
            continue
        expected = dtype if spec.like else state_dtype(dtype)
        if got.shape != want.shape:
            raise Rejected(f"{spec.name} has shape {tuple(got.shape)}, not {tuple(want.shape)}, on {where}")
        if got.dtype != expected:
            raise Rejected(f"{spec.name} has dtype {got.dtype}, not {expected}, on {where}")
        if not got.is_contiguous():
            raise Rejected(f"{spec.name} is not contiguous on {where}")


def check_backward(
    made: Contract,
    candidate: Candidate,
    module: OpModule | TrainableOpModule,
    exam: Exam,
    limit: Tolerance,
    ledger: Ledger,
    where: str,
    *,
    maker: Candidate | None = None,
    again: bool = True,
) -> None:
    """One exam of a backward candidate: every gradient, with all cotangents and with that of o alone. `again` False: called once for each, so no bits.

    Where it takes a residual, `maker` is the forward of its backend that makes it.
    """
    states: Handed = None
    if candidate.residual:
        if maker is None:
            raise Rejected(unshared(candidate))
        states = cast("tuple[torch.Tensor, ...]", run_forward(made, maker, module, exam.call, where)[len(made.outputs) :])
    elif candidate.saves_states:
        if exam.states is None:
            raise Rejected("it wants saved states, but the op saves none")
        states = exam.states.to(state_dtype(made.tensors(exam.call)[made.operands[0]].dtype))
    for grads, wanted in exam.grads:
        missing = "" if all(g is not None or o is None for g, o in zip(grads, exam.outputs, strict=True)) else ", with a gradient of o alone"
        found = run_backward(made, candidate, module, exam.call, grads, states, where + missing)
        _compare_backward(made, found, wanted, exam, limit, ledger, where + missing)
        if not again:
            continue
        second = run_backward(made, candidate, module, exam.call, grads, states, where + missing, repeated=True)
        if candidate.deterministic:
            _same_bits(found, second, where + missing)
        else:
            _compare_backward(made, second, wanted, exam, limit, ledger, f"{where}{missing}, called again")


def _compare_backward(made: Contract, found: Outputs, wanted: Outputs, exam: Exam, limit: Tolerance, ledger: Ledger, where: str) -> None:
    for name, got, want in zip(made.differentiable, found, wanted, strict=True):
        if want is not None:
            assert got is not None
            ledger.compare(f"d{name}", got, want, limit.gradients, where, floor=gradient_floor(exam.call, name, wanted))


def check_forward_part(made: Contract, part: Part, whole: Outputs, wanted: Outputs, limit: Tolerance, ledger: Ledger, where: str) -> None:
    """Compares a part of the timed outputs with the reference of that part."""
    for index, (spec, got, want) in enumerate(zip(made.outputs, whole, wanted, strict=True)):
        cut = None if got is None else part.output(index, got)
        if cut is not None and want is not None:
            ledger.compare(spec.name, cut, want.reshape(cut.shape), limit.outputs, where)


def check_backward_part(made: Contract, part: Part, whole: Outputs, wanted: Outputs, limit: Tolerance, ledger: Ledger, where: str) -> None:
    """Compares a part of the timed gradients with those of the reference."""
    for name, got, want in zip(made.differentiable, whole, wanted, strict=True):
        cut = None if got is None else part.gradient(name, got)
        if cut is not None and want is not None:
            ledger.compare(f"d{name}", cut, want.reshape(cut.shape), limit.gradients, where, floor=gradient_floor(part.call, name, wanted))


def _same_bits(first: Outputs, second: Outputs, where: str) -> None:
    for one, other in zip(first, second, strict=True):
        if one is not None and other is not None and not torch.equal(one, other):
            raise Rejected(f"it says that it is deterministic, but two runs differ by {float((one - other).abs().max()):.1e} on {where}")

"""May a candidate be timed: it runs the hostile cases and the timed shape, and its results are compared with float64 references.

Outputs, states and gradients must keep the contract's tolerance, shape, dtype and layout; inputs must come through unchanged and unshared;
where a candidate says that it is deterministic, two runs must give the same bits. What fails is a value with its error, never an exception.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from titans_backends import registry
from titans_backends.backend import Candidate, OpModule, TrainableOpModule
from titans_backends.buckets import Bucket
from titans_backends.contracts import contract as contract_of
from titans_backends.contracts.contract import Call, Contract, state_dtype
from titans_backends.contracts.tolerance import Tolerance, compare, tolerance
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.tuning.problem import signature_of_case
from titans_backends.tuning.slices import Part
from titans_backends.tuning.suite import Exam, Outputs, suite, suite_key

__all__ = [
    "GateResult",
    "Ledger",
    "Rejected",
    "check_backward",
    "check_backward_part",
    "check_forward",
    "check_forward_part",
    "failure",
    "gate",
    "limits",
]

_NEGLIGIBLE = 0.01
"""A gradient that the formula cancels is compared on this share of the largest one."""
_CANCELLED = frozenset({"fast_decay", "slow_decay", "psi", "coupling"})
"""coupled_core's numbers per chunk."""


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


class Rejected(Exception):
    """A candidate's result is not what the contract says; the message says in what."""


@dataclass(slots=True)
class Ledger:
    """The largest error seen so far for each name."""

    errors: dict[str, float] = field(default_factory=dict)

    def compare(self, name: str, got: Tensor, want: Tensor, limit: float, where: str, *, floor: float = 0.0) -> None:
        """Notes the error of one tensor, on the reference's own scale or on `floor` where that is larger; Rejected where it is over the limit."""
        difference = compare(name, got, want)
        largest = float(want.abs().max()) if want.numel() else 0.0
        worst = max(difference.maximum, difference.rms) * min(1.0, (largest or 1.0) / floor if floor else 1.0)
        self.errors[name] = max(self.errors.get(name, 0.0), worst)
        if not difference.finite:
            raise Rejected(f"{name} is not finite on {where}")
        if worst > limit:
            raise Rejected(f"{name} is off by {worst:.1e} (limit {limit:.0e}) on {where}")


def limits(dtype: torch.dtype, machine: Machine, float32: str) -> Tolerance:
    """The tolerance that binds; the matmul precision loosens it on a GPU only."""
    return tolerance(dtype, float32 if machine.kind != "cpu" else "highest")


def gate(bucket: Bucket, candidate: Candidate, module: OpModule | TrainableOpModule, machine: Machine, device: str) -> GateResult:
    """Runs a candidate on the hostile cases that its backend accepts. What the candidate raises is its failure, named with the case."""
    made, ledger, skipped = contract_of(bucket.op), Ledger(), []
    for exam in suite(suite_key(bucket), device):
        where = exam.case.name
        signature = signature_of_case(bucket, exam.case, device)
        if not offered(candidate, module, signature, machine):
            skipped.append(where)
            continue
        limit = limits(signature.dtype, machine, signature.float32)
        try:
            if candidate.direction == "forward":
                check_forward(made, candidate, module, exam, limit, ledger, where)
            else:
                check_backward(made, candidate, module, exam, limit, ledger, where)
        except Rejected as reason:
            return GateResult(str(reason), tuple(ledger.errors.items()), tuple(skipped))
        except Exception as error:  # a candidate's own failure is its result
            return GateResult(failure(error, where), tuple(ledger.errors.items()), tuple(skipped))
    return GateResult("", tuple(ledger.errors.items()), tuple(skipped))


def failure(error: Exception, where: str) -> str:
    """A sentence for what a candidate raised."""
    text = str(error).strip().split("\n", 1)[0][:300]
    said = any(words in str(error).lower() for words in ("can't allocate memory", "out of memory"))
    memory = said or isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return f"{'out of memory' if memory else 'raised'} on {where}: {type(error).__name__}{': ' if text else ''}{text}"


def offered(candidate: Candidate, module: OpModule | TrainableOpModule, signature: Signature, machine: Machine) -> bool:
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
    _compare_forward(made, first, exam, limit, ledger, where)
    if not again:
        return
    second = run_forward(made, candidate, module, exam.call, where, repeated=True)
    if candidate.deterministic:
        _same_bits(first, second, where)
    else:
        _compare_forward(made, second, exam, limit, ledger, f"{where}, called again")


def _compare_forward(made: Contract, found: Outputs, exam: Exam, limit: Tolerance, ledger: Ledger, where: str) -> None:
    outputs, states = found[: len(made.outputs)], found[len(made.outputs) :]
    check_layout(made, exam.call, outputs, exam.outputs, where)
    for spec, got, want in zip(made.outputs, outputs, exam.outputs, strict=True):
        if got is not None and want is not None:
            ledger.compare(spec.name, got, want, limit.outputs, where)
    if states and states[0] is not None and exam.states is not None and exam.states.numel():
        if states[0].shape != exam.states.shape:
            raise Rejected(f"the saved states have shape {tuple(states[0].shape)}, not {tuple(exam.states.shape)}, on {where}")
        ledger.compare("states", states[0], exam.states, limit.outputs, where)


def run_forward(made: Contract, candidate: Candidate, module: OpModule, call: Call, where: str, *, repeated: bool = False) -> Outputs:
    """One run on memory that is poisoned where it can be, with the inputs guarded; a call in place gets states of its own.

    `repeated`: as a plan's second call is run, by what the module remembered of a first one on other tensors of the same facts, if it does.
    """
    writes = made.rewritten if getattr(call, "inplace", False) is True else ()
    given = made.tensors(call)
    call = made.with_tensors(call, {name: given[name].clone() for name in writes})
    given = made.tensors(call)
    before = {name: tensor.clone() for name, tensor in given.items() if name not in writes}
    remembering, again = registry.remembering(module) if repeated else None, None
    if remembering is not None:
        with torch.no_grad():
            again = remembering.remember(made.with_tensors(call, _others(given)), candidate)[1]
    _poison([tuple(tensor.shape) for tensor in given.values() if tensor.is_floating_point()], given[made.operands[0]])
    with torch.no_grad(), _guarded(given, before, where):
        found = again(made.values(call)) if again is not None else module.run(call, candidate)
    expected = len(made.outputs) + candidate.saves_states
    if not isinstance(found, tuple) or len(found) != expected:
        raise Rejected(f"it returned {len(found) if isinstance(found, tuple) else type(found).__name__}, not a tuple of {expected}, on {where}")
    names = [spec.name for spec in made.outputs]
    own = {tensor.untyped_storage().data_ptr(): name for name, tensor in given.items() if tensor.numel() and name not in writes}
    for name, tensor in zip([*names, "states"], found, strict=False):
        if tensor is not None and tensor.numel() and tensor.untyped_storage().data_ptr() in own:
            raise Rejected(f"{name} shares the memory of {own[tensor.untyped_storage().data_ptr()]} on {where}")
    for name in writes:
        returned = found[names.index(name)]
        if returned is None or returned.data_ptr() != given[name].data_ptr():
            raise Rejected(f"{name} was to be changed in place, but another tensor came back, on {where}")
    return found


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
    again: bool = True,
) -> None:
    """One exam of a backward candidate: every gradient, with all cotangents and with that of o alone. `again` False: called once for each, so no bits."""
    states = None
    if candidate.saves_states:
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


def run_backward(
    made: Contract,
    candidate: Candidate,
    module: OpModule | TrainableOpModule,
    call: Call,
    grads: Outputs,
    states: Tensor | None,
    where: str,
    *,
    repeated: bool = False,
) -> Outputs:
    """One backward with everything that it reads guarded; every given input wants its gradient. `repeated`: as for `run_forward`."""
    given = made.tensors(call)
    needs = frozenset(name for name in made.differentiable if name in given)
    read = {**given, **{f"the gradient of {spec.name}": grad for spec, grad in zip(made.outputs, grads, strict=True) if grad is not None}}
    if states is not None:
        read["the saved states"] = states
    before = {name: tensor.clone() for name, tensor in read.items()}
    assert hasattr(module, "run_backward")
    remembering, again = registry.remembering_backward(module) if repeated else None, None
    if remembering is not None:
        with torch.no_grad():
            others = _others({**given, **{f"grad {index}": grad for index, grad in enumerate((*grads, states)) if grad is not None}})
            arriving = [others.get(f"grad {index}") for index in range(len(grads) + 1)]
            first = made.with_tensors(call, {name: others[name] for name in given})
            again = remembering.remember_backward(first, tuple(arriving[:-1]), arriving[-1], needs, candidate)[1]
    _poison([tuple(tensor.shape) for tensor in given.values() if tensor.is_floating_point()], given[made.operands[0]])
    with torch.no_grad(), _guarded(read, before, where):
        found: object = module.run_backward(call, grads, states, needs, candidate) if again is None else again(made.values(call), grads, states)
    if not isinstance(found, tuple) or len(found) != len(made.differentiable):
        count = len(found) if isinstance(found, tuple) else type(found).__name__
        raise Rejected(f"it returned {count}, not {len(made.differentiable)} gradients, on {where}")
    for name, grad in zip(made.differentiable, found, strict=True):
        if (grad is not None) != (name in needs):
            raise Rejected(f"the gradient of {name} {'is missing' if grad is None else 'was not asked for'} on {where}")
        if grad is not None and (grad.shape != given[name].shape or grad.dtype != given[name].dtype):
            want = given[name]
            raise Rejected(f"the gradient of {name} is {tuple(grad.shape)} {grad.dtype}, not {tuple(want.shape)} {want.dtype}, on {where}")
    return found


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


def gradient_floor(call: Call, name: str, wanted: Outputs) -> float:
    """The least scale that a gradient is compared on: 0, but for the numbers per chunk whose effect a normalisation cancels.

    chunk_decay cancels in the read under normalize_read, and so do both decays of coupled_core, whose mixing cancels too where its
    states are parallel. Such a gradient may be zero: nothing but rounding, of the others' size.
    """
    if name not in _CANCELLED and not (name == "chunk_decay" and getattr(call, "normalize_read", False)):
        return 0.0
    return _NEGLIGIBLE * max((float(want.abs().max()) for want in wanted if want is not None and want.numel()), default=0.0)


@contextlib.contextmanager
def _guarded(given: Mapping[str, Tensor], before: Mapping[str, Tensor], where: str) -> Iterator[None]:
    """Puts changed inputs back, whatever happens: the next candidate must find them whole. Rejected where there were any."""
    changed: list[str] = []
    try:
        yield
    finally:
        for name, copy in before.items():
            if not torch.equal(given[name], copy):
                given[name].copy_(copy)
                changed.append(name)
    if changed:
        raise Rejected(f"it changed its input {', '.join(changed)} on {where}")


def _others(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same facts in other memory, shared as theirs is, the floating ones with half the values: what is remembered of them must not show."""
    copies: dict[int, torch.UntypedStorage] = {}
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        held = tensor.untyped_storage()
        memory = copies.get(held._cdata)
        if memory is None:
            memory = copies[held._cdata] = held.clone()
            if tensor.is_floating_point():
                torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(memory, 0, (memory.nbytes() // tensor.element_size(),), (1,)).mul_(0.5)
        made[name] = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
    return made


def _same_bits(first: Outputs, second: Outputs, where: str) -> None:
    for one, other in zip(first, second, strict=True):
        if one is not None and other is not None and not torch.equal(one, other):
            raise Rejected(f"it says that it is deterministic, but two runs differ by {float((one - other).abs().max()):.1e} on {where}")


def _poison(shapes: list[tuple[int, ...]], like: Tensor) -> None:
    """Leaves NaN in the memory that the allocator is likely to hand out next."""
    held = [torch.full((math.prod(shape),), float("nan"), dtype=torch.float32, device=like.device) for shape in shapes]
    del held

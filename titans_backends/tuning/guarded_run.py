"""One run of a candidate on poisoned memory, with its inputs guarded: what it returns has the contract's form, and its inputs come through whole."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from titans_backends import registry
from titans_backends.backend import Candidate, OpModule, TrainableOpModule
from titans_backends.contracts.contract import Call, Contract
from titans_backends.plan import Handed
from titans_backends.tuning.ledger import Rejected
from titans_backends.tuning.suite import Outputs

__all__ = ["run_backward", "run_forward"]


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
    if not isinstance(found, tuple) or (len(found) < expected if candidate.residual else len(found) != expected):
        more = " or more" if candidate.residual else ""
        raise Rejected(f"it returned {len(found) if isinstance(found, tuple) else type(found).__name__}, not a tuple of {expected}{more}, on {where}")
    names = [spec.name for spec in made.outputs]
    own = {tensor.untyped_storage().data_ptr(): name for name, tensor in given.items() if tensor.numel() and name not in writes}
    for name, tensor in zip([*names, *["its residual" if candidate.residual else "states"] * (len(found) - len(names))], found, strict=True):
        if tensor is not None and tensor.numel() and tensor.untyped_storage().data_ptr() in own:
            raise Rejected(f"{name} shares the memory of {own[tensor.untyped_storage().data_ptr()]} on {where}")
    for name in writes:
        returned = found[names.index(name)]
        if returned is None or returned.data_ptr() != given[name].data_ptr():
            raise Rejected(f"{name} was to be changed in place, but another tensor came back, on {where}")
    return found


def run_backward(
    made: Contract,
    candidate: Candidate,
    module: OpModule | TrainableOpModule,
    call: Call,
    grads: Outputs,
    states: Handed,
    where: str,
    *,
    repeated: bool = False,
) -> Outputs:
    """One backward with everything that it reads guarded; every given input wants its gradient. `repeated`: as for `run_forward`."""
    given = made.tensors(call)
    needs = frozenset(name for name in made.differentiable if name in given)
    read = {**given, **{f"the gradient of {spec.name}": grad for spec, grad in zip(made.outputs, grads, strict=True) if grad is not None}}
    read |= (
        {"the saved states": states} if isinstance(states, Tensor) else {f"the residual's tensor {index}": x for index, x in enumerate(states or ())}
    )
    before = {name: tensor.clone() for name, tensor in read.items()}
    assert hasattr(module, "run_backward")
    remembering, again = registry.remembering_backward(module) if repeated else None, None
    if remembering is not None:
        handed = states if isinstance(states, tuple) else (states,)
        with torch.no_grad():
            others = _others({**given, **{f"handed {index}": x for index, x in enumerate((*grads, *handed)) if x is not None}})
            arriving = tuple(others.get(f"handed {index}") for index in range(len(grads) + len(handed)))
            first, saved = made.with_tensors(call, {name: others[name] for name in given}), arriving[len(grads) :]
            again = remembering.remember_backward(first, arriving[: len(grads)], saved if isinstance(states, tuple) else saved[0], needs, candidate)[
                1
            ]
    _poison([tuple(tensor.shape) for tensor in given.values() if tensor.is_floating_point()], given[made.operands[0]])
    with torch.no_grad(), _guarded(read, before, where):
        if again is None:
            found: object = module.run_backward(call, grads, states, needs, candidate)
        else:
            found = again(made.values(call), grads, states)
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


@contextlib.contextmanager
def _guarded(given: Mapping[str, Tensor], before: Mapping[str, Tensor], where: str) -> Iterator[None]:
    """Puts changed inputs back, whatever happens: the next candidate must find them whole. Rejected where there were any."""
    changed: list[str] = []
    try:
        yield
    finally:
        for name, copy in before.items():
            if not _same(given[name], copy):
                given[name].copy_(copy)
                changed.append(name)
    if changed:
        raise Rejected(f"it changed its input {', '.join(changed)} on {where}")


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit by bit where values say no: a residual may hold NaN where nobody reads it."""
    return torch.equal(one, other) or torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


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


def _poison(shapes: list[tuple[int, ...]], like: Tensor) -> None:
    """Leaves NaN in the memory that the allocator is likely to hand out next."""
    held = [torch.full((math.prod(shape),), float("nan"), dtype=torch.float32, device=like.device) for shape in shapes]
    del held

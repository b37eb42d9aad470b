"""An op with its choice made: calls that match what it was bound to go to the kernel, others raise and say in what they differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from titans_backends import library
from titans_backends.autograd import differentiated
from titans_backends.contracts.contract import Call
from titans_backends.contracts.validate import check_indices, validate
from titans_backends.errors import BoundCallMismatchError
from titans_backends.in_place import NO_TRANSFORM, refuse_in_place
from titans_backends.plan import Outputs, Plan
from titans_backends.request import asks_gradient
from titans_backends.sameness import never, same_as
from titans_backends.watching import watched

if TYPE_CHECKING:
    from titans_backends.op import Op

__all__ = ["BoundOp"]

_is_compiling = torch.compiler.is_compiling


class BoundOp:
    """An op with its choice made. Calls take the same arguments as the op and must match what it was bound to."""

    def __init__(self, op: Op, plan: Plan, call: Call, training: bool) -> None:
        self.op = op
        self.choice = plan.choice
        self._plan = plan
        self._training = training
        names, values = op.contract.parameters, op._planner.values(call)
        self._numbers = {name: value for name, value in zip(names, values, strict=True) if not isinstance(value, Tensor)}
        self._planner = op._planner
        self._facts = op._planner.facts(call)
        self._same = never if watched(op._planner.tensors(call)) else same_as(values)
        pair = plan.choice.pair  # a traced call is forced to its backend, unless forward and backward are of two
        self._forced = pair.forward.backend if pair.backward is None or pair.backward.backend == pair.forward.backend else None
        self._invariant = plan.choice.signature.batch_invariant
        self._requires_grad = any(isinstance(value, Tensor) and value.requires_grad for value in values)

    def __repr__(self) -> str:
        return f"<{self.op!r} bound to {self.choice.pair.label}>"

    def __deepcopy__(self, memo: dict[int, object]) -> BoundOp:
        """Itself: it holds a choice and no tensor, so a copied module may share it."""
        return self

    def __reduce__(self) -> NoReturn:
        """What was chosen holds for this machine and process."""
        raise TypeError(f"{self.op.name}: a bound op cannot be pickled; store get_op({self.op.name!r}), and bind it again where it is loaded")

    def __call__(self, *args: object, **kwargs: object) -> Outputs:
        """Runs the chosen kernel; BoundCallMismatchError names the first argument that differs."""
        if _is_compiling():
            return self.op._traced(args, kwargs, self._forced, self._invariant)
        plan = self._plan
        values = None if plan.again is None else self.op._places(args, kwargs)
        if values is not None and self._same(values) and not (self._requires_grad and torch.is_grad_enabled()):
            outputs = plan.repeated(values)
            if outputs is not None:
                return outputs
        if "backend" in kwargs:
            chosen, bind = self.choice.pair.forward.backend, f"get_op({self.op.name!r}).bind(..., backend=...)"
            raise TypeError(f"{self.op.name}: a bound op has its backend, {chosen}; name another when you bind it: {bind}")
        call = self.op._call(args, kwargs)
        planner = self._planner
        tensors = planner.tensors(call)
        if self._same(planner.values(call)):
            training = self._requires_grad and torch.is_grad_enabled()
        elif watched(tensors):
            return self._seen(call, tensors)
        elif self._fits(call):
            training = asks_gradient(tensors)
        else:
            raise self._mismatch(planner.values(call))
        if plan.checks_indices:
            check_indices(self.op.contract, call)
        if training:
            self._expect_training()
            return differentiated(self.op.name, plan, call, self._forced, self._invariant)
        return planner.execute(plan, call)[: len(self.op.contract.outputs)]

    def _fits(self, call: Call) -> bool:
        """Whether the call's facts are those that were bound. TypeError or ValueError for a tensor that has none (a sparse or nested one, say)."""
        try:
            return self._planner.facts(call) == self._facts
        except RuntimeError:
            validate(self.op.contract, call)
            raise

    def _seen(self, call: Call, tensors: tuple[object, ...]) -> Outputs:
        """A call that torch's dispatcher must see, on the backend that was bound: what its memory holds may mean nothing."""
        values = self._planner.values(call)
        if not self._alike(values):
            raise self._mismatch(values)
        training = asks_gradient(tensors)
        if training:
            self._expect_training()
        refuse_in_place(self.op.contract, call, torch._C._are_functorch_transforms_active(), NO_TRANSFORM)
        return library.call(self.op.contract, values, self._forced, self._invariant, training, training)

    def _expect_training(self) -> None:
        if not self._training:
            raise BoundCallMismatchError(
                f"{self.op.name}: it was bound without gradients, but an input requires one; bind it again, or use torch.no_grad()"
            )

    def _alike(self, values: tuple[object, ...]) -> bool:
        """Whether sizes, dtypes, device and options are those that were bound."""
        told = dict(self.choice.signature.tensors)
        for name, value in zip(self.op.contract.parameters, values, strict=True):
            bound = told.get(name)
            if isinstance(value, Tensor) and bound is not None:
                if value.is_neg() or (value.dtype, tuple(value.shape), value.stride()) != (bound.dtype, bound.shape, bound.stride):
                    return False
            elif isinstance(value, Tensor) or bound is not None or (type(value), value) != (type(self._numbers[name]), self._numbers[name]):
                return False
        return True

    def _mismatch(self, values: tuple[object, ...]) -> BoundCallMismatchError:
        told = dict(self.choice.signature.tensors)
        for name, value in zip(self.op.contract.parameters, values, strict=True):
            bound = told.get(name)
            if isinstance(value, Tensor) and bound is not None:
                if value.is_neg():
                    return BoundCallMismatchError(f"{self.op.name}: {name} is a lazily negated view; pass {name}.resolve_neg()")
                device = self._plan.device if name != "cu_seqlens" else value.device
                got = (value.dtype, tuple(value.shape), value.stride(), value.device)
                want = (bound.dtype, bound.shape, bound.stride, device)
                for what, mine, theirs in zip(("dtype", "shape", "stride", "device"), got, want, strict=True):
                    if mine != theirs:
                        return BoundCallMismatchError(f"{self.op.name}: {name} has {what} {mine}, but it was bound to {theirs}; bind it again")
            elif isinstance(value, Tensor) or bound is not None:
                return BoundCallMismatchError(f"{self.op.name}: it was bound {'with' if bound else 'without'} {name}; bind it again for this call")
            elif (type(value), value) != (type(self._numbers[name]), self._numbers[name]):
                return BoundCallMismatchError(f"{self.op.name}: {name} is {value!r}, but it was bound to {self._numbers[name]!r}; bind it again")
        return BoundCallMismatchError(
            f"{self.op.name}: a tensor has another 16-byte alignment than when it was bound, or lies on another device; bind it again"
        )

"""An op as its users hold it: call it, bind it, ask it why.

A plain call goes from its arguments to a memoised plan to the kernel, in training inside an autograd function; a call that a tracer watches goes
through the op that `library` registered with torch, and meets the same plan on the other side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from titans_backends import library, registry
from titans_backends.autograd import differentiated
from titans_backends.contracts import CONTRACTS, contract
from titans_backends.contracts.contract import Call, Contract
from titans_backends.contracts.validate import bind_arguments, check_indices, validate
from titans_backends.errors import BoundCallMismatchError
from titans_backends.placing import Places
from titans_backends.plans import Outputs, Plan, request
from titans_backends.sameness import never, same_as
from titans_backends.watching import watched

if TYPE_CHECKING:
    from titans_backends.explain import Explanation

__all__ = ["BoundOp", "Op", "get_op"]

_is_compiling = torch.compiler.is_compiling


def _training(tensors: tuple[object, ...]) -> bool:
    if torch.is_grad_enabled():
        for value in tensors:
            if isinstance(value, Tensor) and value.requires_grad:
                return True
    return False


_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    name: {f.name: f.default for f in fields(op.make_call)}  # type: ignore[arg-type]  # a dataclass by contract
    for name, op in CONTRACTS.items()
}

_PLACES: Mapping[str, Places] = {name: Places(op) for name, op in CONTRACTS.items()}


class Op:
    """One op of the registry; `backend` set: every call of this object is forced to it."""

    def __init__(self, op: Contract, backend: str | None = None) -> None:
        self.contract = op
        self.name = self.__name__ = op.name
        self.backend = backend
        self.__doc__ = f"{op.summary}.\n\n{op.make_call.__doc__}\n\nParameters: {', '.join(op.parameters)}, backend."
        self._make = op.make_call
        self._planner = library.planner(op.name)
        self._defaults = _DEFAULTS[op.name]
        self._places = _PLACES[op.name]

    def __repr__(self) -> str:
        forced = f", backend={self.backend!r}" if self.backend else ""
        return f"titans_backends.get_op({self.name!r}{forced})"

    def __reduce__(self) -> tuple[Callable[[str, str | None], Op], tuple[str, str | None]]:
        """A copy of an op, or of a module that holds one, is the op of that name."""
        return _restore, (self.name, self.backend)

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that declare this op; whether one accepts a call is for `explain` to say."""
        return tuple(sorted(b.name for b in registry.known().values() if self.name in b.ops))

    def __call__(self, *args: object, backend: str | None = None, **kwargs: object) -> Outputs:
        """The contract's outputs, None for an output that was not asked for.

        Raises TypeError or ValueError for arguments that the contract refuses, BackendRefusedError where no backend, or not
        the forced one, accepts the call.
        """
        if backend is None:
            backend = self.backend
        if _is_compiling():
            return self._traced(args, kwargs, backend)
        if self._planner.may_repeat():
            values = self._places(args, kwargs)
            outputs = None if values is None else self._planner.repeated(values, backend)
            if outputs is not None:
                return outputs
        call = self._call(args, kwargs)
        tensors = self._planner.tensors(call)
        if watched(tensors):
            _refuse_in_place(self.contract, call, torch._C._are_functorch_transforms_active(), _NO_TRANSFORM)
            return library.call(self.contract, self._planner.values(call), backend, False, False, False)
        asked = request(backend, training=_training(tensors))
        plan = self._planner.plan(call, asked)
        if asked.training:
            _refuse_in_place(self.contract, call, True)
            return differentiated(self.name, plan, call, asked.backend, asked.batch_invariant)
        return self._planner.execute(plan, call)

    def bind(self, *args: object, backend: str | None = None, **kwargs: object) -> BoundOp:
        """Chooses once for these tensors' dtype, shape, stride and alignment; the bound op skips policy and lookup.

        RuntimeError inside a transform of `torch.func`: bind outside, the bound op may be called inside.
        """
        call = self._call(args, kwargs)
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{self.name}: inside torch.func (vmap, grad, ...) nothing can be bound; bind it outside, or call the op, which chooses itself"
            )
        asked = request(self.backend if backend is None else backend, training=_training(self._planner.tensors(call)))
        return BoundOp(self, self._planner.plan(call, asked), call, asked.training)

    def explain(self, *args: object, backend: str | None = None, **kwargs: object) -> Explanation:
        """Which kernel would run and why: every backend's answer, every table asked, every timing known. Runs nothing.

        Inside a transform of `torch.func` it is the forward call of one slice that is explained.
        """
        from titans_backends.explain import explain

        call = self._call(args, kwargs)
        if torch._C._are_functorch_transforms_active():
            from titans_backends.transforms import one_slice

            call = self.contract.with_tensors(call, {name: one_slice(self.name, tensor) for name, tensor in self.contract.tensors(call).items()})
            return explain(self._planner, call, request(self.backend if backend is None else backend, training=False))
        asked = request(self.backend if backend is None else backend, training=_training(self._planner.tensors(call)))
        return explain(self._planner, call, asked)

    def _call(self, args: tuple[object, ...], kwargs: dict[str, object]) -> Call:
        try:
            call = self._make(*args, **kwargs)
        except TypeError:
            call = bind_arguments(self.contract, args, kwargs)  # raises the sentence
        return autocast(self.contract, call) if torch._C._is_any_autocast_enabled() else call

    def _traced(self, args: tuple[object, ...], kwargs: dict[str, object], backend: str | None, batch_invariant: bool = False) -> Outputs:
        """The call as a tracer sees it: plain Python that it can follow, ending in the registered op."""
        names = self.contract.parameters
        if len(args) > len(names) or any(name not in names for name in kwargs):
            bind_arguments(self.contract, args, kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        given.update(_cast(self.contract, {name: value for name, value in given.items() if isinstance(value, Tensor)}))
        if given.get("inplace") and _training(tuple(given.values())):
            raise ValueError(_NO_GRADIENT.format(self.name))
        values = tuple(given[name] if name in given else self._defaults[name] for name in names)
        return library.call(self.contract, values, backend, batch_invariant, _training(values), False)  # the scope is read at run time


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
            training = _training(tensors)
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
        training = _training(tensors)
        if training:
            self._expect_training()
        _refuse_in_place(self.op.contract, call, torch._C._are_functorch_transforms_active(), _NO_TRANSFORM)
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


def autocast(op: Contract, call: Call) -> Call:
    """Under torch.autocast the operands take its dtype, float64 excepted; gates, decays and states stay as they are."""
    changed = _cast(op, op.tensors(call))
    return op.with_tensors(call, changed) if changed else call


def _cast(op: Contract, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that autocast changes; plain enough for a tracer to follow."""
    first = tensors.get(op.operands[0])
    if first is None or not torch.is_autocast_enabled(first.device.type):
        return {}
    dtype = torch.get_autocast_dtype(first.device.type)
    changed = {}
    for name, tensor in tensors.items():
        role = op.argument_by_name[name].role
        if role == "operand" and tensor.is_floating_point() and tensor.dtype != torch.float64:
            changed[name] = tensor.to(dtype)
        elif role == "gate" and tensor.dtype in (torch.float16, torch.bfloat16) and tensor.dtype != dtype:
            changed[name] = tensor.float()
    return changed


_NO_GRADIENT = "{}: inplace=True takes no gradient, but an input requires one; pass inplace=False, or call it under torch.no_grad()"


_NO_TRANSFORM = "{}: inplace=True takes no gradient, and no other transform of torch.func; pass inplace=False"


def _refuse_in_place(op: Contract, call: Call, wrong: bool, why: str = _NO_GRADIENT) -> None:
    if wrong and getattr(call, "inplace", False):
        raise ValueError(why.format(op.name))


def _restore(name: str, backend: str | None) -> Op:
    return get_op(name) if backend is None else get_op(name, backend=backend)


_OPS: dict[tuple[str, str | None], Op] = {}


def get_op(name: str, *, backend: str | None = None) -> Op:
    """The op of that name, optionally forced to one backend. Imports no kernel package; UnknownNameError lists what there is.

    A backend that is known but refuses a call raises at the call, with its reasons; so does an unknown one where a tracer follows, which the registry
    cannot be shown to.
    """
    found = _OPS.get((name, backend))
    if found is not None:
        return found
    op = contract(name)
    if _is_compiling():
        return Op(op, backend)
    if backend is not None:
        registry.get(backend)
    made = _OPS[name, backend] = Op(op, backend)
    return made

"""An op as its users hold it: call it, bind it, ask it why.

A plain call goes from its arguments to a memoised plan to the kernel, in training inside an autograd function; a call that a tracer watches goes
through the op that `library` registered with torch, and meets the same plan on the other side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from titans_backends import library, registry
from titans_backends.autocasting import autocast, cast_tensors
from titans_backends.autograd import differentiated
from titans_backends.bound_op import BoundOp
from titans_backends.contracts import CONTRACTS, contract
from titans_backends.contracts.contract import Call, Contract
from titans_backends.contracts.validate import bind_arguments
from titans_backends.in_place import NO_GRADIENT, NO_TRANSFORM, refuse_in_place
from titans_backends.placing import Places
from titans_backends.plan import Outputs
from titans_backends.request import asks_gradient, request
from titans_backends.watching import watched

if TYPE_CHECKING:
    from titans_backends.explain import Explanation

__all__ = ["BoundOp", "Op", "get_op"]

_is_compiling = torch.compiler.is_compiling


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
        if torch.is_grad_enabled():
            outputs = self._step(args, kwargs, backend)
            if outputs is not None:
                return outputs
        call = self._call(args, kwargs)
        tensors = self._planner.tensors(call)
        if watched(tensors):
            refuse_in_place(self.contract, call, torch._C._are_functorch_transforms_active(), NO_TRANSFORM)
            return library.call(self.contract, self._planner.values(call), backend, False, False, False)
        asked = request(backend, training=asks_gradient(tensors))
        plan = self._planner.plan(call, asked)
        if asked.training:
            refuse_in_place(self.contract, call, True)
            return differentiated(self.name, plan, call, asked.backend, asked.batch_invariant)
        return self._planner.execute(plan, call)

    def _step(self, args: tuple[object, ...], kwargs: dict[str, object], backend: str | None) -> Outputs | None:
        """A training call just like one of the last few, which nobody watches; None where it may be another, where autocast might cast something, or where
        it changes its arguments."""
        values = self._places(args, kwargs)
        if values is None or not asks_gradient(values) or torch._C._is_any_autocast_enabled():
            return None
        asked = request(backend, training=True)
        plan = self._planner.known(values, asked)
        if plan is None or plan.written:
            return None
        return differentiated(self.name, plan, self._make(*args, **kwargs), asked.backend, asked.batch_invariant)

    def bind(self, *args: object, backend: str | None = None, **kwargs: object) -> BoundOp:
        """Chooses once for these tensors' dtype, shape, stride and alignment; the bound op skips policy and lookup.

        RuntimeError inside a transform of `torch.func`: bind outside, the bound op may be called inside.
        """
        call = self._call(args, kwargs)
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{self.name}: inside torch.func (vmap, grad, ...) nothing can be bound; bind it outside, or call the op, which chooses itself"
            )
        asked = request(self.backend if backend is None else backend, training=asks_gradient(self._planner.tensors(call)))
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
        asked = request(self.backend if backend is None else backend, training=asks_gradient(self._planner.tensors(call)))
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
        given.update(cast_tensors(self.contract, {name: value for name, value in given.items() if isinstance(value, Tensor)}))
        if given.get("inplace") and asks_gradient(tuple(given.values())):
            raise ValueError(NO_GRADIENT.format(self.name))
        values = tuple(given[name] if name in given else self._defaults[name] for name in names)
        return library.call(self.contract, values, backend, batch_invariant, asks_gradient(values), False)  # the scope is read at run time


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

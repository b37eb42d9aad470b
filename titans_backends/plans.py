"""The memo: one frozen plan per signature, found by one dictionary hit; a miss validates the call and asks `dispatch`.

The key is everything that a choice may depend on: the tensors' facts, the options, torch's global settings and the request.
On a hit nothing is validated but the values of index tensors that lie on the CPU. The call after a call like it builds no key.
"""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_backends import switches
from titans_backends.contracts.contract import Call, Contract
from titans_backends.contracts.validate import check_indices, validate
from titans_backends.dispatch import Choice, choose
from titans_backends.errors import BackendError, BackendRefusedError
from titans_backends.facts import signature_of
from titans_backends.in_place import announce_change, expect_apart
from titans_backends.machine import detect
from titans_backends.offers import Pair, run_modules
from titans_backends.plan import Outputs, Plan
from titans_backends.precision import float32_precision
from titans_backends.recording import count, listening
from titans_backends.request import PLAIN, Request, request
from titans_backends.sameness import same_as
from titans_backends.signature import Signature

__all__ = ["Planner", "invalidate"]

_MEMO_LIMIT = 4096
_RECENT = 8
"""Calls that are told from one another without a key: the shapes of a model's layers, in training each with its backward."""
_LENGTHS = frozenset("BTNMEPZ*")
_LONGEST_CHUNK = 512
_PLANNERS: weakref.WeakSet[Planner] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class _Entry:
    """A plan, and what tells a call like the one that it was made for: its values, settings and request. `differentiable`: a tensor asks for its gradient."""

    plan: Plan
    same: Callable[[tuple[object, ...]], bool]
    differentiable: bool
    settings: tuple[object, ...]
    on_cuda: bool


class Planner:
    """One op's memo."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self.values = _getter(contract.parameters)
        self.tensors = _getter(tuple(a.name for a in contract.arguments))
        self._options = _getter(tuple(o.name for o in contract.options))
        self._may_change = "inplace" in contract.option_by_name
        self._memo: dict[object, _Entry] = {}
        self._recent: tuple[_Entry, ...] = ()
        self._warmed: dict[object, set[Pair]] = {}
        _PLANNERS.add(self)

    def plan(self, call: Call, asked: Request) -> Plan:
        """The plan for a call, from the memo where it has one."""
        values = self.values(call)
        entry = self._like(values, asked)
        if entry is None or entry.settings != _settings(asked, entry.on_cuda):
            key = self._key(call, asked)
            known = self._memo.get(key) if key is not None else None
            plan = self._decide(call, asked) if known is None else known.plan
            like = known is not None and known.settings[0] is _told(asked) and known.same(values)
            entry = known if known is not None and like else self._entry(plan, values, asked)
            if key is not None:
                self._remember(key, entry)
            if known is None:
                return plan
        if entry.plan.checks_indices:
            check_indices(self.contract, call)
        return entry.plan

    def known(self, values: tuple[object, ...], asked: Request) -> Plan | None:
        """The plan of a call that surely is like one of the last few, so that nobody watches its tensors; None where it may be another, or where values of
        index tensors are to be checked."""
        entry = self._like(values, asked)
        if entry is None or entry.plan.checks_indices or entry.settings != _settings(asked, entry.on_cuda):
            return None
        return entry.plan

    def may_repeat(self) -> bool:
        """Whether one of the last few calls is remembered, so that `repeated` is worth its question."""
        for entry in self._recent:  # noqa: SIM110  # a loop costs a third of any(), and this is in every call
            if entry.plan.again is not None:
                return True
        return False

    def repeated(self, values: tuple[object, ...], backend: str | None) -> Outputs | None:
        """A call just like one of the last few, repeated; None where it may be another, or something stands between it and the kernel."""
        asked = request(backend, training=False)
        entry = self._like(values, asked)
        if entry is None or (entry.differentiable and torch.is_grad_enabled()):
            return None
        if entry.settings != _settings(asked, entry.on_cuda):
            return None
        return entry.plan.repeated(values)

    def _like(self, values: tuple[object, ...], asked: Request) -> _Entry | None:
        """The entry of one of the last few calls, asked for alike, that this one is surely like: a backward has its forward's values, and a plan of its own."""
        told = _told(asked)
        for entry in self._recent:
            if entry.settings[0] is told and entry.same(values):
                return entry
        return None

    def _entry(self, plan: Plan, values: tuple[object, ...], asked: Request) -> _Entry:
        """What tells later calls like this one. A plan may have several: its key does not see who asks for gradients, nor torch's modes."""
        on_cuda = plan.device.type == "cuda"
        differentiable = any(isinstance(value, Tensor) and value.requires_grad for value in values)
        return _Entry(plan, same_as(values), differentiable, _settings(asked, on_cuda), on_cuda)

    def _remember(self, key: object, entry: _Entry) -> None:
        if len(self._memo) >= _MEMO_LIMIT:
            self._memo.clear()
        self._memo[key] = entry
        others = [one for one in self._recent if one is not entry and (one.plan is not entry.plan or one.settings != entry.settings)]
        self._recent = (entry, *others)[:_RECENT]

    def execute(self, plan: Plan, call: Call) -> Outputs:
        """Runs a plan's forward, and remembers that its kernels are loaded; what was bound eagerly must not run first inside a capture."""
        if not plan.ran and plan.choice.signature.launch == "eager" and self._capturing(call):
            raise BackendRefusedError(
                f"{self.contract.name}: a graph is being captured, and this bound op has not run yet; call it once before the capture"
            )
        if self._may_change and call.inplace:  # type: ignore[attr-defined]
            expect_apart(self.contract.name, [getattr(call, name) for name in self.contract.rewritten])
            for name in self.contract.rewritten:
                announce_change(self.contract.name, getattr(call, name), name)
        outputs = plan.run(call)
        if not plan.ran:
            _expect_residual(plan, outputs)
            self._warmed.setdefault(_compiled_for(plan.choice.signature), set()).add(plan.choice.pair)
            plan.ran = True
        if listening:
            count(plan.choice.signature)
        return outputs

    def signature(self, call: Call, dims: dict[str, int], asked: Request) -> Signature:
        """A validated call's signature under a request."""
        return signature_of(
            self.contract,
            call,
            dims,
            regime="training" if asked.training else "inference",
            launch="graph" if self._capturing(call) or (asked.launch == "graph" and self._device(call).type == "cuda") else "eager",
            batch_invariant=asked.batch_invariant,
            may_save=asked.may_save,
        )

    def clear(self) -> None:
        """Forgets every plan."""
        self._memo.clear()
        self._recent = ()

    def _key(self, call: Call, asked: Request) -> object:
        """None where something cannot be hashed or is no strided tensor: validation says what."""
        try:
            key = self.facts(call)
            key += _settings(asked, isinstance(key[3], torch.device) and key[3].type == "cuda")
            found = tuple(key)
            hash(found)
        except (TypeError, RuntimeError, IndexError):
            return None
        return found

    def facts(self, call: Call) -> list[object]:
        """What a choice may depend on in the call itself: each tensor's facts, then the options with their types (1 is not True)."""
        key: list[object] = []
        for value in self.tensors(call):
            if isinstance(value, Tensor):
                key += (value.shape, value.stride(), value.dtype, value.device, value.data_ptr() & 15, value.is_neg())
            elif value is None:
                key.append(None)
            else:
                key += (value.__class__, value)
        key += self.options(call)
        return key

    def options(self, call: Call) -> tuple[tuple[object, ...], tuple[type, ...]]:
        """A call's options, and their types."""
        options = self._options(call)
        return options, tuple(map(type, options))

    def _device(self, call: Call) -> torch.device:
        device: torch.device = getattr(call, self.contract.operands[0]).device
        return device

    def _capturing(self, call: Call) -> bool:
        return self._device(call).type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _decide(self, call: Call, asked: Request) -> Plan:
        dims = validate(self.contract, call)
        tensors = self.contract.tensors(call)
        device = tensors[self.contract.operands[0]].device
        indices = [t for name, t in tensors.items() if self.contract.argument_by_name[name].role == "index"]
        checks = any(t.device.type == "cpu" or switches.current().check for t in indices)
        if checks:
            check_indices(self.contract, call)
        signature, machine = self.signature(call, dims, asked), detect(device)
        warmed = sorted(self._warmed.get(_compiled_for(signature), ()), key=lambda pair: pair.label) if self._capturing(call) else None
        choice = choose(signature, machine, asked.forced, warmed, must_save=asked.must_save)
        if asked.tune_budget_s is not None and warmed is None:
            from titans_backends.tuning import on_call

            if on_call.shared(signature.device):
                choice = choose(signature, machine, asked.forced, must_save=asked.must_save)
            if not _tuned_here(choice):
                on_call.tune(self.contract, call, signature, asked.tune_budget_s)
                choice = choose(signature, machine, asked.forced, must_save=asked.must_save)
        forward, backward = run_modules(choice.pair, self.contract.name)
        changed = self.contract.rewritten if self._may_change and call.inplace else ()  # type: ignore[attr-defined]
        written = tuple(self.contract.parameters.index(name) for name in changed)
        return Plan(choice, forward, backward, checks, device, self.values, len(self.contract.outputs), written)


def _told(asked: Request) -> Request | None:
    """A request as settings tell it; None: nothing was asked for. One object each, so that they compare by identity."""
    return None if asked is PLAIN else asked


def _settings(asked: Request, on_cuda: bool) -> tuple[object, ...]:
    """What a choice depends on outside the call."""
    capturing = on_cuda and torch.cuda.is_current_stream_capturing()
    return _told(asked), float32_precision(on_cuda), torch.are_deterministic_algorithms_enabled(), capturing


def _compiled_for(signature: Signature) -> object:
    """What a kernel may be compiled for: all but how many sequences there are, how far they go beyond a chunk, and numbers that it takes as it runs."""
    dims = dict(signature.dims)
    options = dict(signature.options)
    chunk = options.get("chunk_size")
    reach = min(dims.get("T", 1), chunk if isinstance(chunk, int) else _LONGEST_CHUNK)
    sizes = tuple(pair for pair in signature.dims if pair[0] not in _LENGTHS)
    chosen = tuple((name, value) for name, value in signature.options if name not in ("scale", "chunk_offset", "block_offset"))
    given = tuple((name, facts.aligned, tuple(step % 16 == 0 for step in facts.stride)) for name, facts in signature.tensors)
    shifted = bool(options.get("chunk_offset") or options.get("block_offset"))
    return signature.device, signature.dtype, sizes, chosen, given, signature.float32, signature.regime, shifted, reach.bit_length()


def _getter(names: tuple[str, ...]) -> Callable[[Call], tuple[object, ...]]:
    """Reads some fields of a call, as a tuple also where there is one or none."""
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda call: tuple(getattr(call, name) for name in names)


def _expect_residual(plan: Plan, outputs: Outputs) -> None:
    """BackendError where a forward that names a residual hands on none, or no tensors."""
    forward, handed = plan.choice.pair.forward, outputs[plan.outputs :]
    if forward.residual and not (handed and all(isinstance(one, Tensor) for one in handed)):
        raise BackendError(
            f"{plan.choice.signature.op}: {forward.label} is to return the tensors of its residual {forward.residual!r} behind its {plan.outputs} outputs, "
            f"but returned {', '.join(type(one).__name__ for one in handed) or 'none'}"
        )


def _tuned_here(choice: Choice) -> bool:
    """Whether a row of exactly this bucket, fresh, decided, and what it names runs; or a name did, so that there is nothing to tune."""
    answered = choice.answered
    exact = answered is not None and answered.hit is not None and answered.hit.exact
    fresh = answered is not None and answered.staleness is not None and answered.staleness.kind == "fresh"
    return choice.origin == "forced" or choice.signature.batch_invariant or (choice.origin == "tuned" and exact and fresh)


def invalidate() -> None:
    """Drops every memo and every loaded table: after tuning in this process, or when files or switches changed."""
    from titans_backends import tables

    tables.invalidate()
    for planner in list(_PLANNERS):
        planner.clear()


os.register_at_fork(after_in_child=invalidate)

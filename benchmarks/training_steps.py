"""A training step of anything that computes an op, and what has to come out of it in float64. Imported by training.py and by its peers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from against_fla import CHUNK
from device_timing import arriving, leaves_of
from torch import Tensor

import titans_backends as tb
from titans_backends.backend import Candidate, OpModule
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.contract import Call
from titans_backends.contracts.dual_core import DualCore, is_exact_rule
from titans_backends.contracts.fast_core import FastCore
from titans_backends.contracts.fast_core import reference as fast_reference
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.contracts.slow_core import reference as slow_reference
from titans_backends.contracts.uw_transform import UWTransform
from titans_backends.contracts.uw_transform import reference as uw_reference
from titans_backends.contracts.validate import validate
from titans_backends.facts import with_sizes
from titans_backends.plan import Handed

__all__ = ["RULE", "Found", "Outputs", "Problem", "Run", "Truth", "first_tokens", "handed", "ours", "posed", "step"]

RULE = "gated_delta_rule"
_SHORT = 2048

Outputs = tuple[Tensor | None, ...]
Found = dict[str, Tensor]
"""Outputs by their names, gradients by their inputs' names with a d before."""
Run = Callable[[], Found]
Function = Callable[[Mapping[str, Tensor]], Sequence[Tensor | None]]


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """One training call: the op's inputs, which want no gradient yet, and what arrives at its outputs, None at a state."""

    op: str
    name: str
    call: Call
    grads: Outputs

    @property
    def first(self) -> Tensor:
        """The call's first tensor."""
        return next(iter(CONTRACTS[self.op].tensors(self.call).values()))

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.first.device

    @property
    def tokens(self) -> int:
        """T; 0 for matrices."""
        return self.first.shape[1] if self.first.dim() == 4 else 0


def posed(op: str, name: str, call: Call) -> Problem:
    """A call with random gradients arriving."""
    likes = arriving(op, call)[0]
    source = torch.Generator(device=Problem(op, name, call, ()).device).manual_seed(1)
    drawn = (None if x is None else torch.randn(x.shape, generator=source, device=source.device).to(x.dtype) for x in likes)
    return Problem(op, name, call, tuple(drawn))


def handed(module: OpModule, of: Problem, candidate: Candidate) -> Handed:
    """What a forward leaves to its backward: all that it returns behind its outputs, where that has a name of its own."""
    more = module.run(of.call, candidate)[len(CONTRACTS[of.op].outputs) :]
    return cast("tuple[Tensor, ...]", more) if candidate.residual else more[0]


def step(subject: Problem, function: Function, leaves: Mapping[str, Tensor]) -> Run:
    """Forward and backward of anything that gives the op's outputs; its result holds no graph, which would tie the leaves to a stream."""
    specs = CONTRACTS[subject.op].outputs

    def run() -> Found:
        with torch.enable_grad():
            outputs = function(leaves)
            reached = [(o, grad) for o, grad in zip(outputs, subject.grads, strict=True) if o is not None and grad is not None]
            gradients = torch.autograd.grad([o for o, _ in reached], list(leaves.values()), [grad for _, grad in reached])
        found = {spec.name: o.detach() for spec, o in zip(specs, outputs, strict=True) if o is not None}
        return found | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}

    return run


def ours(subject: Problem) -> Run:
    """The op as anyone would call it, with the Triton backend asked for."""
    op = tb.get_op(subject.op, backend="triton")
    arguments = {name: getattr(subject.call, name) for name in CONTRACTS[subject.op].parameters}
    return step(subject, lambda leaves: op(**{**arguments, **leaves}), leaves_of(subject.op, subject.call))


def rule(call: GatedDeltaRule) -> Outputs:
    """The exact rule in its chunk form, from the contracts of u, w and the recurrence: the token form would keep a state for every token."""
    u, w = uw_reference(UWTransform(call.k, call.v, call.beta, call.g, chunk_size=CHUNK))
    assert u is not None
    assert w is not None
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    asked = call.output_final_state
    return slow_reference(SlowCore(call.q, call.k, u, w, g=call.g, gate=call.gate, chunk_size=CHUNK, scale=scale, output_final_state=asked))


def dual(call: DualCore) -> Outputs:
    """dual_core's contract, with the chunk form where that has the token form."""
    if not is_exact_rule(call):
        return CONTRACTS["dual_core"].reference(call)
    values = call.beta[..., None] * call.v
    fast, _ = fast_reference(FastCore(call.q, call.k, values, gate=call.fast_gate, chunk_size=call.chunk_size, scale=call.scale))
    slow, _ = rule(GatedDeltaRule(call.q, call.k, call.v, call.beta, call.g, gate=call.slow_gate, scale=call.scale))
    assert fast is not None
    assert slow is not None
    return call.alpha * fast + (1 - call.alpha) * slow, None, None


REFERENCES: Mapping[str, Callable[..., Outputs]] = {RULE: rule, "dual_core": dual}


class Truth:
    """What a problem's outputs and gradients must be, on the first and the last head of q and k with their v heads (fused_uw: two matrices).

    `subject` is what a step that is checked must run: the problem, or its first 2048 tokens where the whole does not fit the memory.
    """

    def __init__(self, subject: Problem, tokens: int | None = None) -> None:
        if not self._solves(subject if tokens is None else first_tokens(subject, tokens)):
            torch.cuda.empty_cache()
            if not self._solves(first_tokens(subject, _SHORT)):
                raise torch.OutOfMemoryError(f"{subject.op} {subject.name}: no memory for the float64 reference of its first {_SHORT} tokens")

    def _solves(self, subject: Problem) -> bool:
        try:
            self._solve(subject)
        except torch.OutOfMemoryError:  # what was made is freed once this is left
            return False
        return True

    def _solve(self, subject: Problem) -> None:
        self.subject, self._contract = subject, CONTRACTS[subject.op]
        sizes = with_sizes(validate(self._contract, subject.call))
        self._parts, self._heads = (sizes["*"], 1) if "*" in sizes else (sizes["G"], sizes["H"] // sizes["G"])
        given = self._contract.tensors(subject.call)
        self._layouts = {spec.name: spec.dims for spec in self._contract.outputs}
        for name, x in given.items():
            dims = next(dims for dims in self._contract.argument_by_name[name].dims if dims.startswith("*") or len(dims.split()) == x.dim())
            self._layouts |= {name: dims, f"d{name}": dims}
        self._wanted = {part: self._solved(part) for part in sorted({0, self._parts - 1})}

    def _solved(self, part: int) -> Found:
        given = self._contract.tensors(self.subject.call)
        wide = {name: self._cut(name, x, part).double().requires_grad_(name in self._contract.differentiable) for name, x in given.items()}
        with torch.enable_grad():
            outputs = REFERENCES.get(self.subject.op, self._contract.reference)(self._contract.with_tensors(self.subject.call, wide))
            named = [(spec.name, o, grad) for spec, o, grad in zip(self._contract.outputs, outputs, self.subject.grads, strict=True) if o is not None]
            reached = [(o, self._cut(name, grad, part).to(o.dtype)) for name, o, grad in named if grad is not None]
            ends, starts = [o for o, _ in reached], [grad.reshape(o.shape) for o, grad in reached]
            gradients = torch.autograd.grad(ends, list(wide.values()), starts, allow_unused=True, materialize_grads=True)
        return {name: o.detach() for name, o, _ in named} | {f"d{name}": gradient for name, gradient in zip(wide, gradients, strict=True)}

    def _cut(self, name: str, x: Tensor, part: int) -> Tensor:
        letters = self._layouts[name].split()
        if letters[0] == "*":
            return x.flatten(0, -len(letters)).narrow(0, part, 1)
        for position, letter in enumerate(letters):
            if letter == "G" and x.shape[position] != self._parts:  # a peer's repeated heads
                x = x.float().unflatten(position, (self._parts, -1)).sum(position + 1)
            if letter in "GH":
                count = 1 if letter == "G" else self._heads
                x = x.narrow(position, part * count, count)
        return x

    def errors(self, found: Found) -> tuple[dict[str, float], dict[str, float]]:
        """Root mean square and maximum of the errors by name, relative; infinite where something is not finite."""
        rms, largest = dict[str, float](), dict[str, float]()
        for name, got in found.items():
            pairs = [(wanted[name], self._cut(name, got, part).double().reshape(wanted[name].shape)) for part, wanted in self._wanted.items()]
            figures = [torch.stack([(b - a).square().sum(), a.square().sum(), (b - a).abs().max(), a.abs().max()]).tolist() for a, b in pairs]
            wrong, whole, most, scale = (list(column) for column in zip(*figures, strict=True))
            rms[name] = _finite(math.sqrt(sum(wrong)) / (math.sqrt(sum(whole)) or 1.0))
            largest[name] = _finite(max(most) / (max(scale) or 1.0)) if all(map(math.isfinite, most)) else math.inf
        return rms, largest


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def first_tokens(subject: Problem, tokens: int) -> Problem:
    """The problem's first tokens, as a problem of its own."""
    contract = CONTRACTS[subject.op]

    def short(dims: Iterable[str], x: Tensor) -> Tensor:
        layout = next(one.split() for one in dims if one.startswith("*") or len(one.split()) == x.dim())
        return x.narrow(layout.index("T"), 0, min(tokens, x.shape[layout.index("T")])).contiguous() if "T" in layout else x

    given = {name: short(contract.argument_by_name[name].dims, x) for name, x in contract.tensors(subject.call).items()}
    grads = tuple(None if x is None else short((spec.dims,), x) for spec, x in zip(contract.outputs, subject.grads, strict=True))
    return replace(subject, call=contract.with_tensors(subject.call, given), grads=grads)

"""A plan: one frozen choice with the modules that run it, forward and backward. Runs; neither validates nor chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from titans_backends import registry
from titans_backends.backend import OpModule, TrainableOpModule
from titans_backends.contracts.contract import Call
from titans_backends.dispatch import Choice
from titans_backends.errors import BackendRefusedError
from titans_backends.in_place import announce_change, expect_apart
from titans_backends.recording import count, listening

__all__ = ["Handed", "Outputs", "Plan"]

Outputs = tuple[Tensor | None, ...]
Handed = Tensor | tuple[Tensor, ...] | None
"""What a forward hands to its backward: chunk-start states, the tensors of a residual, or nothing."""
_BACKWARDS_LIMIT = 64


@dataclass(slots=True)
class Plan:
    """A frozen choice with the modules that run it. `ran` says that its kernels are loaded, which graph capture needs to know.

    `values` gives a call's, `outputs` counts the contract's, `written` are the places of what the call changes.
    `again` is what the module remembered of the first call: every call of a plan has the same facts. `tries`: how often it may still be asked, since a call
    with one tensor for two inputs cannot be remembered and the next one can. `again_backward`
    holds the same of backwards, by what was needed and the facts of what arrived; None: that cannot be repeated.
    """

    choice: Choice
    forward_module: OpModule
    backward_module: TrainableOpModule | None
    checks_indices: bool
    device: torch.device
    values: Callable[[Call], tuple[object, ...]]
    outputs: int = field(default=0)
    written: tuple[int, ...] = field(default=())
    ran: bool = field(default=False)
    again: Callable[[tuple[object, ...]], Outputs] | None = field(default=None)
    tries: int = field(default=3)
    again_backward: dict[object, tuple[Callable[[tuple[object, ...], Outputs, Handed], Outputs] | None]] = field(default_factory=dict)

    def run(self, call: Call) -> Outputs:
        """The forward kernel, on the current stream of the inputs' device, outside autocast."""
        if self.needs_guard():
            return self._guarded(lambda: self._run(call))
        return self._run(call)

    def _run(self, call: Call) -> Outputs:
        """What the module remembered of this plan's first call, or its `run`."""
        again = self.again
        if again is not None:
            return again(self.values(call))
        candidate = self.choice.pair.forward
        module = registry.remembering(self.forward_module) if self.tries else None
        if module is None:
            return self.forward_module.run(call, candidate)
        outputs, again = module.remember(call, candidate)
        self.tries -= 1  # a call that raised, for want of memory perhaps, is no try
        if again is not None:
            self.again = again
        return outputs

    def repeated(self, values: tuple[object, ...]) -> Outputs | None:
        """What the module remembered, of values that are like those of the plan's first call; None where it remembered nothing or a call has to do more."""
        again = self.again
        if again is None or self.checks_indices or self.needs_guard():
            return None
        if len(self.written) > 1:
            expect_apart(self.choice.signature.op, [values[place] for place in self.written])  # type: ignore[misc]  # tensors, as in the first call
        for place in self.written:
            announce_change(self.choice.signature.op, values[place])  # type: ignore[arg-type]
        outputs = again(values)[: self.outputs]
        if listening:
            count(self.choice.signature)
        return outputs

    def run_backward(self, call: Call, grads: Outputs, states: Handed, needs: frozenset[str]) -> Outputs:
        """The backward kernel, where and as the forward's; the gradients follow `contract.differentiable`."""
        guarded = self.needs_guard()
        found = self._guarded(lambda: self._run_backward(call, grads, states, needs)) if guarded else self._run_backward(call, grads, states, needs)
        if listening:
            count(self.choice.signature, backward=True)
        return found

    def _run_backward(self, call: Call, grads: Outputs, states: Handed, needs: frozenset[str]) -> Outputs:
        """What the module remembered of a backward like this, or its `run_backward`."""
        backward, module = self.choice.pair.backward, self.backward_module
        if backward is None or module is None:
            raise BackendRefusedError(f"{self.choice.signature.op}: {self.choice.pair.label} has no backward")
        remembering = registry.remembering_backward(module)
        if remembering is None:
            return module.run_backward(call, grads, states, needs, backward)
        handed = states if isinstance(states, tuple) else (states,)
        key = (needs, *[None if x is None else (x.stride(), x.dtype, x.data_ptr() & 15) for x in (*grads, *handed)])
        known = self.again_backward.get(key)
        if known is None:
            found, again = remembering.remember_backward(call, grads, states, needs, backward)
            if len(self.again_backward) >= _BACKWARDS_LIMIT:
                self.again_backward.clear()
            self.again_backward[key] = (again,)
            return found
        (again,) = known
        return module.run_backward(call, grads, states, needs, backward) if again is None else again(self.values(call), grads, states)

    def needs_guard(self) -> bool:
        """Whether autocast is on, or another device than the inputs' is current."""
        return torch._C._is_any_autocast_enabled() or (self.device.type == "cuda" and self.device.index != torch._C._cuda_getDevice())

    def _guarded(self, kernel: Callable[[], Outputs]) -> Outputs:
        """Runs with the inputs' device current and autocast off: a kernel sees the dtypes that it was promised."""
        with torch.autocast(self.device.type, enabled=False):
            if self.device.type == "cuda":
                with torch.cuda.device(self.device):
                    return kernel()
            return kernel()

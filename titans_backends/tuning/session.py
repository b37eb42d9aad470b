"""One bucket in the child process: its inputs, and what is asked of one candidate after the other: check it, take its peak, sample it.

Nothing here survives a candidate that kills its process; `host` sees to that.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from titans_backends import registry
from titans_backends.backend import Candidate, OpModule, TrainableOpModule
from titans_backends.buckets import Bucket, field
from titans_backends.contracts import contract
from titans_backends.contracts.case import build, cotangents
from titans_backends.contracts.contract import Call, state_dtype
from titans_backends.contracts.validate import validate
from titans_backends.facts import with_sizes
from titans_backends.machine import detect
from titans_backends.plan import Handed
from titans_backends.tuning.gate import GateResult, check_backward_part, check_forward_part, failure, gate
from titans_backends.tuning.guarded_run import run_backward, run_forward
from titans_backends.tuning.ledger import Ledger, Rejected, limits
from titans_backends.tuning.peak import peak_mib
from titans_backends.tuning.problem import case_of, set_torch
from titans_backends.tuning.sampler import Sampler, once, sampler_for
from titans_backends.tuning.slices import Part, group_part, heads_part
from titans_backends.tuning.suite import Outputs, suite, suite_key, wanted_gradients

__all__ = ["Checked", "Session"]

_MOST_TOKENS = 4096
"""Tokens of the timed outputs that are compared with the reference; a longer call's rest follows from its state."""
_MOST_GRADIENT_TOKENS = 1024
_REFERENCE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Checked:
    """A candidate's check: the gate's result, its peak, and the seconds to its first result, compilation included."""

    result: GateResult
    peak_mib: float | None = None
    compile_s: float | None = None


@functools.lru_cache(maxsize=512)
def _gated(key: Bucket, candidate: Candidate, bucket: Bucket, device: str, heads: int | None) -> GateResult:
    module, _ = registry.module(registry.get(candidate.backend), bucket.op)
    assert module is not None
    return gate(bucket, candidate, module, detect(device), device, heads)


class Session:
    """A bucket's inputs on the device, and the kernels that run on them. `references`: what candidates are checked against is made at once, else when asked."""

    def __init__(self, bucket: Bucket, device: str, heads: int | None, *, references: bool = True) -> None:
        set_torch(bucket)
        self.bucket, self.device, self.heads = bucket, device, heads
        self.contract, self.machine = contract(bucket.op), detect(device)
        self.call: Call = build(self.contract, case_of(bucket, heads), device)
        given = self.contract.tensors(self.call)
        own = {name: given[name].clone() for name in self.contract.rewritten} if getattr(self.call, "inplace", False) is True else {}
        self.timed: Call = self.contract.with_tensors(self.call, own)  # a call in place changes states of its own
        self.dims = with_sizes(validate(self.contract, self.call))
        self.sampler: Sampler = sampler_for(torch.device(device), "graph" if field(bucket, "launch") == "graph" else "eager")
        self.training = field(bucket, "regime") == "training"
        self.dtype = self.contract.tensors(self.call)[self.contract.operands[0]].dtype
        self._grads: Outputs | None = None
        self._saved: dict[str, tuple[Tensor, ...]] = {}
        self._warm: set[Candidate] = set()
        self._planned: dict[Candidate, Callable[[], object]] = {}
        if references:
            self._references()

    def _references(self) -> None:
        """Computes what every candidate is compared with now, so that none is blamed for its time.

        On one thread: they are thousands of tiny steps, which a second thread only slows down, on a busy machine by far.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            suite(suite_key(self.bucket), self.device)
            _ = self._forward_part
            if self.training and self._checks_timed_gradients:
                _ = self._backward_part
        finally:
            torch.set_num_threads(threads)

    @property
    def _checks_timed_gradients(self) -> bool:
        return self.bucket.op == "fused_uw" or self.bucket.seq_len <= _MOST_GRADIENT_TOKENS

    def check(self, candidate: Candidate, states_from: Candidate | None) -> Checked:
        """Everything that a candidate must pass before it is timed, and its peak."""
        where, ledger = f"the timed shape, seq_len {self.bucket.seq_len}", Ledger()
        compile_s, skipped = None, tuple[str, ...]()
        try:
            start = time.perf_counter()
            found = self._first_run(candidate, states_from, where)
            compile_s = time.perf_counter() - start
            result = _gated(suite_key(self.bucket), candidate, self.bucket, self.device, self.heads)
            if not result.ok:
                return Checked(result, compile_s=compile_s)
            ledger.errors |= dict(result.errors)
            skipped = result.skipped
            self._compare(candidate, found, ledger, where)
            peak = peak_mib(self._kernel(candidate), torch.device(self.device)) + self._held_mib(candidate)
        except Rejected as reason:
            return Checked(GateResult(str(reason), tuple(ledger.errors.items()), skipped), compile_s=compile_s)
        except Exception as error:  # the candidate's own failure is its result
            return Checked(GateResult(failure(error, where), tuple(ledger.errors.items()), skipped), compile_s=compile_s)
        self._warm.add(candidate)
        return Checked(GateResult("", tuple(ledger.errors.items()), skipped), peak, compile_s)

    def _held_mib(self, candidate: Candidate) -> float:
        """What is in memory for a backward's sake alone before it begins: the states that its forward saved."""
        saved = self._saved.get(candidate.residual, ()) if candidate.direction == "backward" and candidate.saves_states else ()
        return sum(one.nbytes for one in saved) / 2**20

    def _handed(self, candidate: Candidate) -> Handed:
        """What a backward is handed by a forward, by the name of what it takes."""
        saved = self._saved.get(candidate.residual) if candidate.saves_states else None
        return saved if saved is None or candidate.residual else saved[0]

    def sample(self, candidate: Candidate, states_from: Candidate | None) -> float:
        """What a run takes in microseconds, its plan made once, as a caller's is; a process that was started anew warms the candidate up first."""
        if candidate not in self._warm:
            self._prepare(candidate, states_from)
            self._kernel(candidate)()
            self.sampler.synchronize()
            self._warm.add(candidate)
        if candidate not in self._planned:
            self._planned[candidate] = self._kernel(candidate)
        return self.sampler.sample(candidate, self._planned[candidate])

    def reference(self, most_s: float) -> float | None:
        """One run of the contract's plain reference in microseconds, in training with its gradients; None where that takes over `most_s`."""
        if self.dims.get("T", 0) > 4 * _REFERENCE_TOKENS:
            short = heads_part(self.contract, self.call, self.dims, _REFERENCE_TOKENS).call
            start = time.perf_counter()
            self._run_reference(short)
            if (time.perf_counter() - start) * self.dims["T"] / _REFERENCE_TOKENS > most_s:
                return None
        return once(torch.device(self.device), lambda: self._run_reference(self.call))

    def _run_reference(self, call: Call) -> object:
        if not self.training:
            with torch.no_grad():
                return self.contract.reference(call)
        grads = self._cotangents() if call is self.call else None
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.contract.tensors(call).items() if tensor.is_floating_point()}
        outputs = self.contract.reference(self.contract.with_tensors(call, leaves))
        reached = [o for o in outputs if o is not None]
        given = [torch.ones_like(o) for o in reached] if grads is None else [grad for grad in grads if grad is not None]
        return torch.autograd.grad(reached, list(leaves.values()), given, allow_unused=True)

    def close(self) -> None:
        """Frees the inputs."""
        del self.call, self.timed, self.sampler
        self._grads = None
        self._saved.clear()
        self._planned.clear()
        gc.collect()
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()

    def _module(self, candidate: Candidate) -> OpModule | TrainableOpModule:
        module, reason = registry.module(registry.get(candidate.backend), self.bucket.op)
        if module is None:
            raise RuntimeError(f"{candidate.label}: {reason}")
        return module

    def _cotangents(self) -> Outputs:
        if self._grads is None:
            asked = self.contract.asked(self.call)
            self._grads = cotangents(self.contract, self.call, tuple(self._output_like(i) if there else None for i, there in enumerate(asked)))
        return self._grads

    def _output_like(self, index: int) -> Tensor:
        """A tensor of one output's shape and dtype."""
        spec = self.contract.outputs[index]
        leading = self.contract.tensors(self.call)[self.contract.operands[0]].shape[:-2]
        shape = [n for letter in spec.dims.split() for n in (leading if letter == "*" else (self.dims[letter],))]
        return torch.empty(shape, dtype=self.dtype if spec.like else state_dtype(self.dtype), device=self.device)

    def _prepare(self, candidate: Candidate, states_from: Candidate | None) -> None:
        """A backward that reads saved states gets those of a forward that passed its own check."""
        if candidate.direction == "backward" and candidate.saves_states and candidate.residual not in self._saved:
            if states_from is None:
                raise Rejected(f"it wants {'saved states' if not candidate.residual else candidate.residual}, but no forward that passed saves them")
            with torch.no_grad():
                saved = self._module(states_from).run(self.timed, states_from)[len(self.contract.outputs) :]
            if not saved or any(one is None for one in saved):
                raise Rejected(f"it wants what {states_from.label} saves, but that saved nothing")
            self._saved[candidate.residual] = cast("tuple[Tensor, ...]", saved)

    def _kernel(self, candidate: Candidate) -> Callable[[], object]:
        module, call = self._module(candidate), self.timed
        values = self.contract.values(call)
        if candidate.direction == "forward":
            remembering, again = registry.remembering(module), None
            if remembering is not None:  # what a plan's second call runs
                with torch.no_grad():
                    _, again = remembering.remember(call, candidate)

            def forward() -> object:
                with torch.no_grad():
                    return module.run(call, candidate) if again is None else again(values)

            return forward
        grads, states, needs = self._cotangents(), self._handed(candidate), self._needs()
        trainable = registry.trainable(module)
        assert trainable is not None
        repeating, repeat = registry.remembering_backward(trainable), None
        if repeating is not None:
            with torch.no_grad():
                _, repeat = repeating.remember_backward(call, grads, states, needs, candidate)

        def backward() -> object:
            with torch.no_grad():
                if repeat is None:
                    return trainable.run_backward(call, grads, states, needs, candidate)
                return repeat(values, grads, states)

        return backward

    def _needs(self) -> frozenset[str]:
        given = self.contract.tensors(self.call)
        return frozenset(name for name in self.contract.differentiable if name in given)

    @functools.cached_property
    def _forward_part(self) -> tuple[Part, Outputs]:
        part = heads_part(self.contract, self.call, self.dims, _MOST_TOKENS)
        with torch.no_grad():
            return part, self.contract.reference(self.contract.to(part.call, torch.float64))

    @functools.cached_property
    def _backward_part(self) -> tuple[Part, Outputs]:
        part = group_part(self.contract, self.call, self.dims)
        grads = tuple(None if grad is None else part.output(index, grad) for index, grad in enumerate(self._cotangents()))
        return part, wanted_gradients(self.contract, self.contract.to(part.call, torch.float64), grads)

    def _first_run(self, candidate: Candidate, states_from: Candidate | None, where: str) -> Outputs:
        """The timed call once, its inputs guarded; compilation happens here."""
        module = self._module(candidate)
        self._prepare(candidate, states_from)
        if candidate.direction == "forward":
            found = run_forward(self.contract, candidate, module, self.call, where)
        else:
            states = self._handed(candidate)
            found = run_backward(self.contract, candidate, module, self.call, self._cotangents(), states, where)
        self.sampler.synchronize()
        return found

    def _compare(self, candidate: Candidate, found: Outputs, ledger: Ledger, where: str) -> None:
        """What came out of the timed call, where the reference of a part of it is there to compare with."""
        limit = limits(self.dtype, self.machine, str(field(self.bucket, "float32")))
        if candidate.direction == "forward":
            part, wanted = self._forward_part
            check_forward_part(self.contract, part, found[: len(self.contract.outputs)], wanted, limit, ledger, where)
        elif self._checks_timed_gradients:
            part, wanted = self._backward_part
            check_backward_part(self.contract, part, found, wanted, limit, ledger, where)

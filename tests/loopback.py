"""A backend that answers with the contract's reference and writes down what it was asked: it tests the dispatcher, not a kernel.

`install` puts one into the registry by TITANS_BACKENDS_PLUGINS, with any functions exchanged, and returns the list of what ran.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch

import titans_backends as tb
from titans_backends import CONTRACT_VERSION, Backend, Candidate, Signature, Verdict
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.contract import Call


def install(patch: pytest.MonkeyPatch, name: str, *, rank: int = -1, ops: tuple[str, ...] = tuple(CONTRACTS), **functions: object) -> list[str]:
    """Registers a backend called `name`, first by rank on a CPU. `functions` replace those of every op module; returns the journal."""
    journal: list[str] = []
    for op in ops:
        module = ModuleType(f"loopback_{name}.{op}")
        for key, function in {**_functions(name, op, journal), **functions}.items():
            if function is not None:
                setattr(module, key, function)
        patch.setitem(sys.modules, module.__name__, module)
    package = ModuleType(f"loopback_{name}")
    package.BACKEND = Backend(  # type: ignore[attr-defined]
        name, "answers with the reference", CONTRACT_VERSION, {op: f"loopback_{name}.{op}" for op in ops}, simplicity=9, rank={"cpu": rank}
    )
    patch.setitem(sys.modules, package.__name__, package)
    before = os.environ.get("TITANS_BACKENDS_PLUGINS", "")
    patch.setenv("TITANS_BACKENDS_PLUGINS", ",".join(filter(None, [before, package.__name__])))
    tb.reset()
    return journal


def _functions(name: str, op: str, journal: list[str]) -> dict[str, Callable[..., object]]:
    contract = CONTRACTS[op]

    def run(call: Call, candidate: Candidate) -> tuple[torch.Tensor | None, ...]:
        journal.append("forward" if candidate.variant == "loop" else candidate.variant)
        wide = torch.float64 if contract.tensors(call)[contract.operands[0]].dtype == torch.float64 else torch.float32
        outputs = contract.reference(contract.to(call, wide))
        like = contract.tensors(call)
        return tuple(
            None if o is None else o.to(like[spec.like].dtype if spec.like else wide).contiguous().clone()
            for spec, o in zip(contract.outputs, outputs, strict=True)
        )

    def run_backward(call: Call, grads: object, states: object, needs: frozenset[str], candidate: Candidate) -> tuple[torch.Tensor | None, ...]:
        journal.append("backward")
        copy, given = contract.to(call, torch.float64), contract.tensors(call)
        leaves = {n: t for n, t in contract.tensors(copy).items() if n in needs}

        def differentiate() -> tuple[torch.Tensor | None, ...]:
            for leaf in leaves.values():
                leaf.requires_grad_()
            reached = [(o, g.double()) for o, g in zip(contract.reference(copy), grads, strict=True) if o is not None and g is not None]
            return torch.autograd.grad([o for o, _ in reached], list(leaves.values()), [g for _, g in reached], allow_unused=True)

        with ThreadPoolExecutor(1) as thread:  # a registered op's kernel runs below autograd, which is off for this thread only
            found = thread.submit(differentiate).result()
        by_name = {n: torch.zeros_like(given[n]) if g is None else g.to(given[n].dtype) for n, g in zip(leaves, found, strict=True)}
        return tuple(by_name.get(n) for n in contract.differentiable)

    return {
        "supports": lambda signature, machine: Verdict(),
        "candidates": lambda signature, machine: [Candidate(name, "loop")],
        "run": run,
        "backward_candidates": lambda signature, machine: [Candidate(name, "loop", direction="backward")],
        "run_backward": run_backward,
    }


def by_length(name: str) -> Callable[[Signature, object], list[Candidate]]:
    """Candidates whose variant depends on the length: short up to 32, middle up to 64, long."""

    def candidates(signature: Signature, machine: object) -> list[Candidate]:
        length = signature.dim("T")
        return [Candidate(name, "short" if length <= 32 else "middle" if length <= 64 else "long")]

    return candidates

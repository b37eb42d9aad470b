"""The token rule by its reference, and the ways to get it wrong. A variant's name says what it does."""

from __future__ import annotations

import os
import signal
import time

import torch

from titans_backends import ACCEPTED, Candidate
from titans_backends.contracts import contract

CONTRACT = contract("gated_delta_rule")
RUNS = [0]


def supports(signature, machine):
    return ACCEPTED


def _variants(direction):
    names = os.environ.get("FAULTY_VARIANTS", "good").split(",")
    return [name.removeprefix("backward:") for name in names if name.startswith("backward:") == (direction == "backward")]


def candidates(signature, machine):
    return [Candidate("faulty", name, sources=("faulty.late",) if name == "late" else ()) for name in _variants("forward")]


def backward_candidates(signature, machine):
    return [Candidate("faulty", name, direction="backward") for name in _variants("backward")]


def run(call, candidate):
    RUNS[0] += 1
    name = candidate.variant
    if name in ("late", "later"):
        time.sleep(0.004)
    if name == "raises":
        raise ValueError("no such instruction\nsecond line")
    if name == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "exits":
        os._exit(3)
    if name == "hangs" or (name == "hangs_at_16" and call.q.shape[:2] == (1, 16)):
        time.sleep(3600)
    if name == "memory_error":
        raise MemoryError
    if name == "huge":
        torch.empty(1 << 50, dtype=torch.int8)
    outputs = [None if o is None else o.contiguous().clone() for o in CONTRACT.reference(call)]
    if name == "nan":
        outputs[0].view(-1)[-1] = float("nan")
    if name == "wrong":
        outputs[0].view(-1)[-1] += 1e-3
    if name == "wrong_state" and outputs[1] is not None:
        outputs[1].mul_(1.001)
    if name == "shape":
        outputs[0] = outputs[0][:, :-1]
    if name == "dtype":
        outputs[0] = outputs[0].double()
    if name == "writes":
        call.k.add_(1)
    if name == "shares":
        outputs[0] = call.v.view_as(call.v)
    if name == "restless":
        outputs[0].mul_(1 + RUNS[0] % 2 * 1e-6)
    if name == "long_only" and call.q.shape[1] > 210:  # right on every hostile case, wrong at the timed shape
        outputs[0][:, -1] += 1
    return tuple(outputs)


def run_backward(call, grads, states, needs, candidate):
    name = candidate.variant
    given = CONTRACT.tensors(call)
    with torch.enable_grad():
        leaves = {key: given[key].detach().clone().requires_grad_() for key in needs}
        outputs = CONTRACT.reference(CONTRACT.with_tensors(call, leaves))
        reached = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None]
        found = torch.autograd.grad([o for o, _ in reached], list(leaves.values()), [g for _, g in reached], allow_unused=True)
    by_name = {key: torch.zeros_like(given[key]) if g is None else g for key, g in zip(leaves, found, strict=True)}
    if name == "wrong":
        by_name["k"] = 1.01 * by_name["k"]
    if name == "needs_all" and any(g is None for g in grads):
        by_name["v"] = torch.zeros_like(by_name["v"])
    if name == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    return tuple(by_name.get(key) for key in CONTRACT.differentiable)

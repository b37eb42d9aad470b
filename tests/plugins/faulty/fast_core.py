"""S_fast by its reference. Backward `cancels` differentiates it in float32, where dg holds the scores' diagonal twice; `late` in float64, and takes its time."""

from __future__ import annotations

import time

import torch

from titans_backends import ACCEPTED, Candidate
from titans_backends.contracts import contract
from titans_backends.tuning.suite import wanted_gradients

from .gated_delta_rule import _variants

CONTRACT = contract("fast_core")


def supports(signature, machine):
    return ACCEPTED


def candidates(signature, machine):
    return [Candidate("faulty", name) for name in _variants("forward")]


def backward_candidates(signature, machine):
    return [Candidate("faulty", name, direction="backward") for name in _variants("backward")]


def run(call, candidate):
    return tuple(None if o is None else o.float().contiguous() for o in CONTRACT.reference(CONTRACT.to(call, torch.float64)))


def run_backward(call, grads, states, needs, candidate):
    with torch.enable_grad():
        if candidate.variant == "cancels":
            return wanted_gradients(CONTRACT, call, grads)
        time.sleep(0.004)
        return tuple(None if grad is None else grad.float() for grad in wanted_gradients(CONTRACT, CONTRACT.to(call, torch.float64), grads))

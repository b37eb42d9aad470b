"""One job of benchmarks/odd_rows.py: a backend's candidates for one op on odd rows, each against float64. A process of its own runs it, and may die of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titans_backends import machine, registry
from titans_backends.backend import Candidate
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build, cotangents
from titans_backends.contracts.contract import Call, Contract
from titans_backends.contracts.validate import validate
from titans_backends.facts import Signature, signature_of

__all__ = ["ALLOWED", "Job", "run"]

ALLOWED = {"float16": 4e-3, "bfloat16": 2e-2, "float32": 1e-4}
"""Relative L2 error of each output."""
LENGTHS = ((15,), (111,), (500,), (1024,))
PACKED = ((15,), (111, 389), (15, 85, 200, 0, 700))
SMALL, SMALL_PACKED = ((5,), (20,)), ((5, 12),)
NARROW = (("block", 64), ("prepare_warps", 4), ("value_tile", 32), ("warps", 4), ("stages", 3), ("dot", "tf32"))
"""The tiles that ptxas 12.8 compiles wrong."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is run. `view`: contiguous, misaligned (tensors begin between 16 bytes) or sliced (heads begin every K + 8 numbers); `most` candidates.

    `wrong_tiles`: "own" or "12.9", the ptxas that compiles `NARROW`, which runs whatever is offered.
    """

    backend: str
    op: str
    dtype: str
    K: int
    V: int
    view: str = "contiguous"
    packed: bool = False
    direction: str = "forward"
    most: int = 4
    wrong_tiles: str = ""

    @property
    def name(self) -> str:
        """For its lines."""
        tiles = f"wrong-tiles ptxas-{self.wrong_tiles} " if self.wrong_tiles else ""
        return f"{tiles}{self.backend} {self.op} {self.dtype} {self.K}/{self.V} {self.view} {'packed' if self.packed else 'dense'} {self.direction}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A call of one length, what is right for it, in backward the gradients that arrive, and the candidates that it is offered."""

    lengths: tuple[int, ...]
    call: Call
    wanted: tuple[Tensor | None, ...]
    grads: tuple[Tensor | None, ...] | None
    offered: tuple[Candidate, ...]


def sliced(x: Tensor, room: int) -> Tensor:
    """The numbers of x with `room` unused ones behind each row."""
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + room)
    wide[..., : x.shape[-1]] = x.detach()
    return wide[..., : x.shape[-1]].requires_grad_(x.requires_grad)


def built(job: Job, contract: Contract, lengths: tuple[int, ...], device: str) -> Call:
    """Operands of one length, with states where the op has them."""
    variant = contract.variants[0]
    options = {**variant.options, **({"output_final_state": True} if "output_final_state" in contract.option_by_name else {})}
    given = tuple(dict.fromkeys((*variant.given, *(("initial_state",) if "initial_state" in contract.argument_by_name else ()))))
    case = Case(
        f"{lengths}",
        B=1 if job.packed else 2,
        T=sum(lengths),
        G=3,
        H=3,
        K=job.K,
        V=job.V,
        dtype=getattr(torch, job.dtype),
        options=options,
        given=given,
        view="contiguous" if job.view == "sliced" else job.view,
        lengths=lengths if job.packed else None,
    )
    call = build(contract, case, device, requires_grad=job.direction == "backward")
    if job.view == "sliced":
        held = {name: getattr(call, name, None) for name in ("q", "k", "v", "u", "w")}
        call = replace(call, **{name: sliced(x, 8) for name, x in held.items() if x is not None})
    return call


def exact(job: Job, contract: Contract, call: Call) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...] | None]:
    """Outputs in float64; of a backward the gradients in float64, and what arrives."""
    backward = job.direction == "backward"
    up = {name: getattr(call, name) for name in (*contract.argument_by_name, *contract.option_by_name)}
    for name, x in up.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            up[name] = x.detach().double().requires_grad_(backward)
    outputs = contract.reference(contract.make_call(**up))
    if not backward:
        return outputs, None
    grads = cotangents(contract, call, contract.reference(call))
    if job.view == "sliced" and grads[0] is not None:
        grads = (sliced(grads[0], 4), *grads[1:])
    total = sum((o * g.double()).sum() for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None)
    names = [name for name in contract.differentiable if up[name] is not None]
    found = dict(zip(names, torch.autograd.grad(total, [up[name] for name in names], allow_unused=True), strict=True))
    return tuple(found.get(name) for name in contract.differentiable), grads


def card_of(device: str) -> machine.Machine:
    """This machine's; on a CPU the H100's, whose candidates the interpreter runs."""
    if device != "cpu":
        return machine.detect("cuda")
    return machine.Machine("cuda", "NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3", sm=90, sms=132, shared_memory_bytes=227 * 1024)


def facts_of(job: Job, contract: Contract, call: Call) -> Signature:
    """Of a call on a GPU, wherever it lies."""
    facts = signature_of(contract, call, validate(contract, call), regime="training" if job.direction == "backward" else "inference")
    return replace(facts, device="cuda")


def chosen(job: Job, problems: list[Problem]) -> Iterator[Candidate]:
    """The first that each length is offered, then the longest's others."""
    if job.wrong_tiles:
        yield Candidate("triton", "scan", NARROW)
        return
    firsts = [one.offered[0] for one in problems if one.offered]
    yield from list(dict.fromkeys((*firsts, *problems[-1].offered)))[: job.most]


def run(job: Job, first: int, device: str) -> None:
    """Prints AT before a candidate runs, OK or BAD after; NONE where the backend has no such op. Candidates before `first` are passed over."""
    torch.backends.cuda.matmul.allow_tf32 = False
    contract = CONTRACTS[job.op]
    module, reason = registry.module(registry.get(job.backend), job.op)
    if module is None:
        print(f"NONE {reason}", flush=True)
        return
    ask, card, problems = module.candidates if job.direction == "forward" else module.backward_candidates, card_of(device), []
    every = (SMALL_PACKED if job.packed else SMALL) if device == "cpu" else (PACKED if job.packed else LENGTHS)
    for lengths in every:
        call = built(job, contract, lengths, device)
        offered = tuple(one for one in ask(facts_of(job, contract, call), card) if not one.saves_states)
        problems.append(Problem(lengths, call, *exact(job, contract, call), offered))
    for index, candidate in enumerate(chosen(job, problems)):
        if index < first:
            continue
        print(f"AT {index} {candidate.label}", flush=True)
        meant = [one for one in problems if job.wrong_tiles or candidate in one.offered]
        worst, where = 0.0, ""
        for problem in meant:
            with torch.no_grad():
                if problem.grads is None:
                    outputs = module.run(problem.call, candidate)
                else:
                    needs = frozenset(name for name in contract.differentiable if getattr(problem.call, name) is not None)
                    outputs = module.run_backward(problem.call, problem.grads, None, needs, candidate)
            if device != "cpu":
                torch.cuda.synchronize()
            for number, (got, want) in enumerate(zip(outputs, problem.wanted, strict=True)):
                if got is None or want is None or not want.numel() or math.isnan(worst):  # a NaN is worse than anything, and stays
                    continue
                e = float((got.double() - want).norm() / want.norm().clamp_min(1e-30))
                if math.isnan(e) or e > worst:
                    worst, where = e, f"T {problem.lengths} output {number}"
        at = ", ".join(str(sum(problem.lengths)) for problem in meant)
        print(f"{'OK' if worst < ALLOWED[job.dtype] else 'BAD'} {candidate.label} worst {worst:.1e} {where} of T {at}", flush=True)

"""One examination: the case goes through `get_op`, forced to the backend, and through every candidate that the backend offers for it.

The public call must run this backend and no other; every candidate must keep the contract's tolerance, shapes, dtypes and layout, leave its
inputs alone, share no memory with them and repeat its bits where it says so. Gradients are compared with autograd through the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from titans_backends import registry
from titans_backends.conformance.items import Item
from titans_backends.contracts import contract as contract_of
from titans_backends.contracts.case import build, cotangents
from titans_backends.contracts.contract import Call, Contract
from titans_backends.contracts.tolerance import Tolerance, tolerance
from titans_backends.dispatch import Choice
from titans_backends.errors import BackendRefusedError
from titans_backends.library import planner
from titans_backends.op import get_op
from titans_backends.precision import float32_precision
from titans_backends.request import request
from titans_backends.tuning.gate import check_backward, check_forward, failure
from titans_backends.tuning.ledger import Ledger, Rejected
from titans_backends.tuning.suite import Exam, exam_of

__all__ = ["Result", "examine"]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of an item. `detail` holds the refusal or the failure, `worst` the largest error, `limit` what it may be, `kernels` what ran."""

    item: Item
    status: Literal["passed", "refused", "failed"]
    detail: str = ""
    worst: float = 0.0
    limit: float = 0.0
    kernels: tuple[str, ...] = ()


def examine(item: Item) -> Result:
    """Runs one item. What a backend raises is its failure, with the candidate's name; a refusal is neither pass nor failure."""
    made, training = contract_of(item.op), item.regime == "training"
    call = build(made, item.case, item.device)
    try:
        choice = _choose(item, call, training)
    except BackendRefusedError as refusal:
        return Result(item, "refused", str(refusal))
    exam = exam_of(made, item.case, call, training=training)
    limit = _limit(item, training)
    ledger = Ledger()
    bound, ran = tolerance_of(item), list[str]()
    where = choice.pair.label
    try:
        ran.append(where)
        if choice.pair.forward.backend != item.backend or (choice.pair.backward or choice.pair.forward).backend != item.backend:
            raise Rejected(f"{where} was chosen although {item.backend} was forced")
        _public(made, item, exam, bound, ledger, where, training)
        for offer in choice.offers:
            for candidate in (*offer.forward, *offer.backward):
                where = f"{candidate.direction} {candidate.label}"
                where += f" saving {candidate.residual or 'states'}" if candidate.saves_states else ""
                ran.append(where)
                module, verdict = registry.module(offer.backend, item.op)
                if module is None:
                    raise Rejected(str(verdict))
                if candidate.direction == "forward":
                    check_forward(made, candidate, module, exam, bound, ledger, where)
                else:
                    maker = next((one for one in offer.forward if one.agrees(candidate)), None)
                    check_backward(made, candidate, module, exam, bound, ledger, where, maker=maker)
    except Rejected as reason:
        return Result(item, "failed", f"{item}: {reason}", max(ledger.errors.values(), default=0.0), limit, tuple(ran))
    except Exception as error:
        return Result(item, "failed", f"{item}: {failure(error, where)}", max(ledger.errors.values(), default=0.0), limit, tuple(ran))
    return Result(item, "passed", "", max(ledger.errors.values(), default=0.0), limit, tuple(ran))


def tolerance_of(item: Item) -> Tolerance:
    """The limits that bind: torch's matmul precision loosens float32 on a GPU only."""
    return tolerance(item.case.dtype, "highest" if torch.device(item.device).type == "cpu" else float32_precision(on_cuda=True))


def _limit(item: Item, training: bool) -> float:
    bound = tolerance_of(item)
    return bound.gradients if training else bound.outputs


def _choose(item: Item, call: Call, training: bool) -> Choice:
    return planner(item.op).plan(call, request(item.backend, training=training)).choice


def _public(made: Contract, item: Item, exam: Exam, bound: Tolerance, ledger: Ledger, where: str, training: bool) -> None:
    """The call as a user makes it, with autograd in training."""
    given = made.tensors(exam.call)
    fresh = {name: t.detach().clone(memory_format=torch.preserve_format) for name, t in given.items() if name in made.rewritten}
    leaves: dict[str, Tensor] = {}
    if training:
        leaves = {name: given[name].detach().requires_grad_() for name in made.differentiable if name in given}
    call = made.with_tensors(exam.call, {**fresh, **leaves})
    outputs = get_op(item.op)(**{name: getattr(call, name) for name in made.parameters}, backend=item.backend)
    for spec, got, want in zip(made.outputs, outputs, exam.outputs, strict=True):
        if (got is None) != (want is None):
            raise Rejected(f"{spec.name} {'is missing' if got is None else 'was not asked for'} on {where}, called through get_op")
        if got is not None and want is not None:
            ledger.compare(spec.name, got, want, bound.outputs, f"{where}, called through get_op")
    if training:
        grads = cotangents(made, call, outputs)
        reached = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None and o.requires_grad]
        found = torch.autograd.grad([o for o, _ in reached], list(leaves.values()), [g for _, g in reached], allow_unused=True)
        by_name = dict(zip(leaves, found, strict=True))
        for name, want in zip(made.differentiable, exam.grads[0][1], strict=True):
            got = by_name.get(name)
            if want is not None and name in by_name:
                ledger.compare(f"d{name}", torch.zeros_like(want) if got is None else got, want, bound.gradients, f"{where}, through autograd")

"""A training call that nobody traces, as one `torch.autograd.Function`: the formula of the registered op without the dispatcher's part of the way.

What `torch.library` does around a forward and its backward costs the host more than remembered launches do. What `watching` names gets the registered
op (`library`), in each direction for itself, and so does a gradient that is to be differentiated again, which refuses with its sentence.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from titans_backends import library
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.contract import Call
from titans_backends.plan import Outputs, Plan

__all__ = ["differentiated"]


def differentiated(op_name: str, plan: Plan, call: Call, backend: str | None, batch_invariant: bool) -> Outputs:
    """The contract's outputs of a plan, with what autograd needs; backend and batch_invariant choose the backward's plan, should the call change."""
    values = library.planner(op_name).values(call)
    outputs: Outputs = _function(op_name).apply(plan, call, backend, batch_invariant, *values)
    return outputs


_LEADING = 4


@functools.lru_cache(maxsize=64)
def _function(op_name: str) -> type[torch.autograd.Function]:
    """An op's forward and backward; one object per op, which compiles nothing and holds no tensor."""
    op, planner = CONTRACTS[op_name], library.planner(op_name)
    count, places = len(op.outputs), [_LEADING + op.parameters.index(name) for name in op.differentiable]

    def forward(ctx: torch.autograd.function.FunctionCtx, plan: Plan, call: Call, backend: str | None, invariant: bool, *values: object) -> Outputs:
        with torch._C._AutoDispatchBelowAutograd():  # where the registered op's kernels run too
            outputs = planner.execute(plan, call)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in values], *outputs[count:])  # type: ignore[arg-type]  # torch takes None
        ctx.others = [None if isinstance(x, Tensor) else x for x in values]  # type: ignore[attr-defined]
        ctx.asked = (backend, invariant, plan.choice.pair.forward.residual)  # type: ignore[attr-defined]
        return outputs[:count]

    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        others: Sequence[object] = ctx.others  # type: ignore[attr-defined]
        result: list[Tensor | None] = [None] * (_LEADING + len(others))
        if all(grad is None for grad in grads):
            return tuple(result)
        saved = ctx.saved_tensors  # type: ignore[attr-defined]
        values = [other if tensor is None else tensor for tensor, other in zip(saved, others, strict=False)]
        needed = ctx.needs_input_grad  # type: ignore[attr-defined]  # made anew each time it is asked for
        needs = [needed[place] for place in places]
        found = library.gradients(op, grads, values, saved[len(others) :], needs, *ctx.asked)  # type: ignore[attr-defined]
        for place, gradient in zip(places, found, strict=True):
            result[place] = gradient
        return tuple(result)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(op_name, (torch.autograd.Function,), members)

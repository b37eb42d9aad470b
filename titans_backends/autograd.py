"""A training call that nobody traces, as one `torch.autograd.Function`: the formula of the registered op without the dispatcher's part of the way.

What `torch.library` does around a forward and its backward costs the host more than remembered launches do. What `watching` names gets the registered
op (`library`), in each direction for itself, and so does a gradient that is to be differentiated again, which refuses with its sentence.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from titans_backends import library
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.contract import Call
from titans_backends.plan import Outputs, Plan

__all__ = ["differentiated"]


def differentiated(op_name: str, plan: Plan, call: Call, backend: str | None, batch_invariant: bool) -> Outputs:
    """The contract's outputs of a plan, with what autograd needs; backend, batch_invariant and the plan's launch choose the backward's plan, should the call
    change: a GPU's backwards run in a thread of autograd's, which sees no scope of the caller's."""
    asked = (plan, call, backend, batch_invariant)
    outputs: Outputs = _function(op_name).apply(asked, *library.planner(op_name).tensors(call))
    return outputs


_Asked = tuple[Plan, Call, str | None, bool]
_LEADING = 1


@functools.lru_cache(maxsize=64)
def _function(op_name: str) -> type[torch.autograd.Function]:
    """An op's forward and backward; one object per op, which compiles nothing and holds no tensor.

    Its arguments are what was asked and the call's tensors, since every further one costs time in each step. In a tensor's place may be a number.
    """
    op, planner = CONTRACTS[op_name], library.planner(op_name)
    names, options = [one.name for one in op.arguments], [one.name for one in op.options]
    count, width = len(op.outputs), len(names)
    places = [_LEADING + names.index(name) for name in op.differentiable]
    order = [[*names, *options].index(name) for name in op.parameters]

    def forward(ctx: torch.autograd.function.FunctionCtx, asked: _Asked, *tensors: object) -> Outputs:
        plan, call, backend, invariant = asked
        with torch._C._AutoDispatchBelowAutograd():  # where the registered op's kernels run too
            outputs = planner.execute(plan, call)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in tensors], *outputs[count:])  # type: ignore[arg-type]  # torch takes None
        ctx.others = [None if isinstance(x, Tensor) else x for x in tensors], planner.options(call)[0]  # type: ignore[attr-defined]
        ctx.asked = (backend, invariant, plan.choice.pair.forward.residual, plan.choice.signature.launch)  # type: ignore[attr-defined]
        return outputs[:count]

    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * (_LEADING + width)
        if all(grad is None for grad in grads):
            return tuple(result)
        saved, (others, chosen) = ctx.saved_tensors, ctx.others  # type: ignore[attr-defined]
        given = [other if tensor is None else tensor for tensor, other in zip(saved[:width], others, strict=True)]
        given += chosen
        values = tuple([given[place] for place in order])
        needed = ctx.needs_input_grad  # type: ignore[attr-defined]  # made anew each time it is asked for
        needs = [needed[place] for place in places]
        found = library.gradients(op, grads, values, saved[width:], needs, *ctx.asked)  # type: ignore[attr-defined]
        for place, gradient in zip(places, found, strict=True):
            result[place] = gradient
        return tuple(result)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(op_name, (torch.autograd.Function,), members)

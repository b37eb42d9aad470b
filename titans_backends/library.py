"""The ops as torch sees them: `torch.ops.titans_backends.<op>`, its fake, its autograd formula, and a backward op of its own.

A traced graph holds these ops; which kernel runs is looked up at the first run of each signature, on the far side of the
dispatcher. The forward op's last output are the chunk-start states that its backward reads, where the chosen pair saves them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import compress

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad

from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.contract import Call, Contract
from titans_backends.fakes import fake_backward, fake_forward
from titans_backends.op_schema import flatten, schema_of, unflatten
from titans_backends.plan import Handed, Outputs, Plan
from titans_backends.plans import Planner
from titans_backends.request import Request, asking, request
from titans_backends.signature import Launch
from titans_backends.transforms import NO_FORWARD_MODE, transformable
from titans_backends.watching import watched

__all__ = ["NAMESPACE", "call", "gradients", "planner", "register"]

NAMESPACE = "titans_backends"
_NO_TRACE = (
    "torch.jit.trace cannot record this call: TorchScript has no outputs that may be None. Use torch.export or torch.compile; "
    "of a swapped model, trace it after report.undo()"
)
_PLANNERS = {name: Planner(op) for name, op in CONTRACTS.items()}
_library: torch.library.Library | None = None


def planner(name: str) -> Planner:
    """The memo of one op, shared by its direct and its registered calls."""
    return _PLANNERS[name]


def call(op: Contract, values: Sequence[object], backend: str | None, batch_invariant: bool, training: bool, may_save: bool) -> Outputs:
    """The registered op, for autograd and tracers to see; returns the contract's outputs without the saved states."""
    _refuse_duals(op, values)
    namespace = torch.ops.titans_backends
    if "inplace" in op.parameters and values[op.parameters.index("inplace")]:
        o = getattr(namespace, f"{op.name}_")(*flatten(op, values, in_place=True), backend)
        return o, *(values[op.parameters.index(name)] for name in op.rewritten)
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(f"{op.name}: {_NO_TRACE}")
    flat = (*flatten(op, values), backend, batch_invariant, training, may_save)
    if torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=f"{op.name}: its torch.func transforms run eagerly; leave fullgraph=True out, or put the transform outside")
        return _transformed(op.name, flat)[: len(op.outputs)]
    outputs: Outputs = getattr(namespace, op.name)(*flat)
    return outputs[: len(op.outputs)]


@_disable_dynamo  # behind the broken graph Dynamo would take up this frame, and cannot; unlike torch.compiler.disable it imports nothing yet
def _transformed(name: str, flat: Sequence[object]) -> Outputs:
    outputs: Outputs = _functorch(name).apply(*flat)
    return outputs


def _refuse_duals(op: Contract, values: Sequence[object]) -> None:
    """Forward-mode differentiation would lose its tangents without a word."""
    if forward_ad._current_level < 0 or torch._C._are_functorch_transforms_active():  # torch.func.jvp is refused by `transformable`
        return
    if any(isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None for value in values):
        raise NotImplementedError(NO_FORWARD_MODE.format(op.name))


# --- what runs below the dispatcher


def _plan(op: Contract, made: Call, asked: Request) -> Plan:
    return _PLANNERS[op.name].plan(made, asked)


def _asked(
    backend: object, batch_invariant: object, *, training: bool, may_save: bool, must_save: str | None = None, launch: Launch = "eager"
) -> Request:
    """The request of a registered op: what its arguments say, and below that the scope at run time. A `launch` of "graph" stands against the scope."""
    scoped = request(backend if isinstance(backend, str) else None, training=training, may_save=may_save)
    invariant = scoped.batch_invariant or bool(batch_invariant)
    if not (training or invariant):
        return scoped
    launched = launch if launch == "graph" else scoped.launch
    return asking(scoped.backend, scoped.by, invariant, training, may_save, must_save, scoped.tune_budget_s, launched)


def _forward(op: Contract) -> Callable[..., Outputs]:
    def run(*flat: object) -> Outputs:
        *inputs, backend, batch_invariant, training, may_save = flat
        made = unflatten(op, inputs)
        plan = _plan(op, made, _asked(backend, batch_invariant, training=bool(training), may_save=bool(may_save)))
        outputs = _PLANNERS[op.name].execute(plan, made)
        if op.rewritten:  # a step's state may lie as the given one does; a graph was promised a contiguous one
            outputs = tuple(x if x is None else x.contiguous() for x in outputs)
        forward, count = plan.choice.pair.forward, len(op.outputs)
        keeps = forward.saves_states and not forward.residual  # a residual has no place in the schema
        return (*outputs[:count], outputs[count] if keeps else None)

    return run


def _backward(op: Contract) -> Callable[..., Outputs]:
    count = len(op.outputs)

    def run(*flat: object) -> Outputs:
        grads, inputs, (states, needs, backend, batch_invariant) = flat[:count], flat[count:-4], flat[-4:]
        made, must_save = unflatten(op, inputs), None if states is None else ""
        asked = _asked(backend, batch_invariant, training=True, may_save=states is not None, must_save=must_save)
        with torch.no_grad():
            return _run_backward(op, _plan(op, made, asked), made, grads, states, needs)  # type: ignore[arg-type]  # the schema has checked them

    return run


def gradients(
    op: Contract,
    grads: Outputs,
    values: Sequence[object],
    saved: tuple[Tensor, ...],
    needs: Sequence[bool],
    backend: str | None,
    batch_invariant: bool,
    residual: str = "",
    launch: Launch = "eager",
) -> Outputs:
    """A backward for autograd, of the call with these field values: by the registered op where its gradients are to be differentiated again, where
    compiled autograd traces it, and where torch must see it for what arrives or comes back from saved tensors. That takes no residual, and computes again.

    Otherwise by the plan of the call as it is now: what saved tensors come back as is their hooks' affair.
    """
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or watched((*grads, *saved))):
        asked = _asked(backend, batch_invariant, training=True, may_save=bool(saved), must_save=residual if saved else None, launch=launch)
        plan = _PLANNERS[op.name].known(tuple(values), asked)
        if plan is not None or not watched(values):
            call = op.make_call(**dict(zip(op.parameters, values, strict=True)))
            handed = None if not saved else saved if residual else saved[0]
            return _run_backward(op, _plan(op, call, asked) if plan is None else plan, call, grads, handed, needs)
    states = saved[0] if saved and not residual else None
    registered: Outputs = getattr(torch.ops.titans_backends, f"{op.name}_backward")(
        *grads, *flatten(op, values), states, needs, backend, batch_invariant
    )
    return registered


def _run_backward(op: Contract, plan: Plan, made: Call, grads: Outputs, states: Handed, needs: Sequence[bool]) -> Outputs:
    """A plan's backward, below autograd; gradients are off."""
    wanted = frozenset(compress(op.differentiable, needs))
    with torch._C._AutoDispatchBelowAutograd():
        return plan.run_backward(made, grads, states, wanted)


def _in_place(op: Contract) -> Callable[..., Tensor]:
    def run(*flat: object) -> Tensor:
        *inputs, backend = flat
        made = unflatten(op, inputs, in_place=True)
        plan = _plan(op, made, _asked(backend, False, training=False, may_save=False))
        o = _PLANNERS[op.name].execute(plan, made)[0]
        assert o is not None
        return o

    return run


# --- autograd


def _setup_context(op: Contract) -> Callable[..., None]:
    def setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Outputs) -> None:
        states = output[-1]
        if states is not None:
            ctx.mark_non_differentiable(states)
        ctx.set_materialize_grads(False)
        tensors = [x if isinstance(x, Tensor) else None for x in inputs[:-4]]
        ctx.save_for_backward(*tensors, states)  # type: ignore[arg-type]  # torch takes None too
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]  # type: ignore[attr-defined]

    return setup


def _autograd(op: Contract, backward_op: Callable[..., Outputs] | None = None) -> Callable[..., tuple[Tensor | None, ...]]:
    """The formula; `backward_op` stands in for the registered backward."""
    schema = schema_of(op)
    width, position = len(schema), {field.split()[-1]: index for index, field in enumerate(schema)}

    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, states = ctx.saved_tensors  # type: ignore[attr-defined]
        others = ctx.others  # type: ignore[attr-defined]
        inputs = [other if tensor is None else tensor for tensor, other in zip(tensors, others[:width], strict=True)]
        needs = [bool(ctx.needs_input_grad[position[name]]) for name in op.differentiable]  # type: ignore[attr-defined]
        backend, batch_invariant = others[width : width + 2]
        reached = grads[: len(op.outputs)]
        if all(grad is None for grad in reached):
            return (None,) * len(others)
        gradients = backward_op or getattr(torch.ops.titans_backends, f"{op.name}_backward")
        found = gradients(*reached, *inputs, states, needs, backend, batch_invariant)
        result: list[Tensor | None] = [None] * len(others)
        for name, gradient in zip(op.differentiable, found, strict=True):
            result[position[name]] = gradient
        return tuple(result)

    return backward


def _second_order(op: Contract) -> Callable[..., None]:
    def refuse(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor | None) -> None:
        raise RuntimeError(
            f"{op.name}: a gradient of its gradient was asked for; second order is not implemented. Drop create_graph=True, or detach the gradient"
        )

    return refuse


@functools.lru_cache(maxsize=64)
def _functorch(name: str) -> type[torch.autograd.Function]:
    """An op, and its backward, under `torch.func`."""
    op = CONTRACTS[name]
    back = transformable(f"{name}_backward", lambda ctx, inputs, output: None, _second_order(op))
    return transformable(name, _setup_context(op), _autograd(op, back.apply))


def register() -> None:
    """Defines every op with torch, once per process."""
    global _library
    if _library is not None:
        return
    library = _library = torch.library.Library(NAMESPACE, "DEF")
    for op in CONTRACTS.values():
        schema = schema_of(op)
        results = ", ".join(["Tensor" if o.when is None else "Tensor?" for o in op.outputs] + ["Tensor?"])
        tail = ["str? backend", "bool batch_invariant", "bool training", "bool may_save"]
        library.define(f"{op.name}({', '.join(schema + tail)}) -> ({results})")
        library.impl(op.name, _forward(op), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{op.name}", fake_forward(op), lib=library)
        torch.library.register_autograd(f"{NAMESPACE}::{op.name}", _autograd(op), setup_context=_setup_context(op), lib=library)

        grads = [f"Tensor? grad_{o.name}" for o in op.outputs]
        tail = ["Tensor? states", "bool[] needs", "str? backend", "bool batch_invariant"]
        back = f"{op.name}_backward"
        library.define(f"{back}({', '.join(grads + schema + tail)}) -> ({', '.join(['Tensor?'] * len(op.differentiable))})")
        library.impl(back, _backward(op), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{back}", fake_backward(op), lib=library)
        torch.library.register_autograd(f"{NAMESPACE}::{back}", _second_order(op), setup_context=lambda ctx, inputs, output: None, lib=library)
        if "inplace" in op.parameters:
            kept = [p for p in schema_of(op, mutates=op.rewritten) if p.split()[-1] != "inplace"]
            library.define(f"{op.name}_({', '.join([*kept, 'str? backend'])}) -> Tensor")
            library.impl(f"{op.name}_", _in_place(op), "CompositeExplicitAutograd")
            torch.library.register_fake(
                f"{NAMESPACE}::{op.name}_", lambda *flat: torch.empty_like(flat[2], memory_format=torch.contiguous_format), lib=library
            )


register()

"""The ops as torch sees them: opcheck, compile, export, autocast, functorch, retained graphs, second order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.utils.checkpoint

import titans_backends as tb
from tests import fresh
from titans_backends import library, plans
from titans_backends import op as ops
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import build, cases
from titans_backends.contracts.contract import Call
from titans_backends.contracts.tolerance import compare
from titans_backends.op_schema import flatten
from titans_backends.plan import Outputs, Plan


def small(name: str, *, requires_grad: bool = False, **changes: object) -> tuple[object, dict[str, object]]:
    contract = CONTRACTS[name]
    case = replace(next(iter(cases(contract))), **{"B": 1, "T": 3 if contract.max_tokens else 37, "K": 8, "V": 8, **changes})
    call = build(contract, case, requires_grad=requires_grad)
    return call, {name: getattr(call, name) for name in contract.parameters}


def registered_arguments(name: str, call: object, *, training: bool) -> tuple[object, ...]:
    contract = CONTRACTS[name]
    return (*flatten(contract, library.planner(name).values(call)), None, False, training, False)


@pytest.mark.parametrize("name", CONTRACTS)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_opcheck(name: str, requires_grad: bool) -> None:
    call, _ = small(name, requires_grad=requires_grad)
    torch.library.opcheck(getattr(torch.ops.titans_backends, name).default, registered_arguments(name, call, training=requires_grad))


@pytest.mark.parametrize("name", CONTRACTS)
def test_opcheck_of_the_backward_op(name: str) -> None:
    contract = CONTRACTS[name]
    call, keywords = small(name)
    outputs = tb.get_op(name)(**keywords)
    needs = [isinstance(getattr(call, n), torch.Tensor) for n in contract.differentiable]
    grads = [None if o is None else torch.ones_like(o) for o in outputs]
    arguments = (*grads, *flatten(contract, library.planner(name).values(call)), None, needs, None, False)
    torch.library.opcheck(getattr(torch.ops.titans_backends, f"{name}_backward").default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", [name for name, made in CONTRACTS.items() if made.rewritten])
def test_opcheck_of_the_in_place_step(name: str) -> None:
    made = CONTRACTS[name]
    call, _ = small(name)
    arguments = (*flatten(made, library.planner(name).values(call), in_place=True), None)
    torch.library.opcheck(getattr(torch.ops.titans_backends, f"{name}_").default, arguments)


def test_a_graph_gets_the_contiguous_state_that_it_was_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may lay the state as the given one lies, which its fake does not."""
    name = "gated_delta_step"
    execute = plans.Planner.execute

    def turning(self: plans.Planner, plan: Plan, call: Call) -> Outputs:
        o, state = execute(self, plan, call)
        assert state is not None
        return o, state.transpose(2, 3).contiguous().transpose(2, 3)

    monkeypatch.setattr(plans.Planner, "execute", turning)
    call, keywords = small(name, V=11)  # a size of its own: a repeated call runs without `execute`
    assert not tb.get_op(name)(**keywords)[1].is_contiguous()  # it is what the kernel made
    torch.library.opcheck(
        getattr(torch.ops.titans_backends, name).default, registered_arguments(name, call, training=False), test_utils="test_faketensor"
    )


def test_an_op_can_be_traced_before_it_was_ever_called() -> None:
    code = (
        "import torch, titans_backends as tb\n"
        "x = torch.randn(1, 20, 2, 8); op = tb.get_op('fast_core')\n"
        "got = torch.compile(lambda q: op(q, q, q)[0], fullgraph=True, backend='eager')(x)\n"
        "assert torch.equal(got, op(x, x, x)[0])\n"
    )
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("known", [False, True], ids=["first seen in the trace", "seen before"])
def test_get_op_can_stand_inside_a_traced_function(monkeypatch: pytest.MonkeyPatch, backend: str | None, known: bool) -> None:
    monkeypatch.setattr(ops, "_OPS", {})
    q = torch.randn(1, 20, 2, 8, requires_grad=True)
    want = ops.get_op("fast_core", backend=backend)(q, q, q)[0] if known else ops.Op(CONTRACTS["fast_core"], backend)(q, q, q)[0]
    got = torch.compile(lambda x: tb.get_op("fast_core", backend=backend)(x, x, x)[0], fullgraph=True, backend="aot_eager")(q)
    assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got.sum(), q)[0], torch.autograd.grad(want.sum(), q)[0])


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_compiled_call_equals_the_plain_one(name: str) -> None:
    _, keywords = small(name, requires_grad=True)
    op = tb.get_op(name)
    torch.compiler.reset()  # every op compiles the same lambda, and there are more ops than recompilations allowed
    compiled = torch.compile(lambda **kw: op(**kw), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(**keywords), op(**keywords), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert compare(name, got, want).maximum < 1e-6
    inputs = [t for t in keywords.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    mine = torch.autograd.grad(compiled(**keywords)[0].sum(), inputs, allow_unused=True)
    theirs = torch.autograd.grad(op(**keywords)[0].sum(), inputs, allow_unused=True)
    for got, want in zip(mine, theirs, strict=True):
        got, want = (torch.zeros(()) if g is None else g for g in (got, want))
        assert compare(name, got.expand_as(want), want).maximum < 1e-5


def test_inductor_compiles_a_block_around_the_op() -> None:
    op = tb.get_op("gated_delta_rule")
    _, kw = small("gated_delta_rule")

    def block(q, k, v, beta, g):
        return op(torch.nn.functional.normalize(q, dim=-1), k * 1.0, v, torch.sigmoid(beta), g, output_final_state=True)[0] * 2

    arguments = [kw[n] for n in ("q", "k", "v", "beta", "g")]
    assert compare("o", torch.compile(block, fullgraph=True)(*arguments), block(*arguments)).maximum < 1e-5


def test_one_dynamic_graph_runs_three_lengths_on_three_choices(plugin_backend) -> None:
    """The choice is looked up at the first run of each signature: no recompilation, and each length its own kernel."""
    ran = plugin_backend("by_length")
    op = tb.get_op("fast_core")
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda q, k, v: op(q, k, v, chunk_size=16)[0], fullgraph=True, dynamic=True, backend=count)
    for length in (32, 64, 128, 32, 64, 128):
        q, k, v = (torch.randn(1, length, 2, 8) for _ in range(3))
        got = compiled(q, k, v)
        want = CONTRACTS["fast_core"].reference(CONTRACTS["fast_core"].make_call(q, k, v, chunk_size=16))[0]
        assert compare("o", got, want).maximum < 1e-5
    assert len(graphs) == 1
    assert ran == ["short", "middle", "long"] * 2
    assert any("titans_backends" in str(node.target) for node in graphs[0].graph.nodes)


def test_export_holds_our_op() -> None:
    class Block(torch.nn.Module):
        def forward(self, q, k, v, beta, g):
            return tb.get_op("gated_delta_rule")(q, k, v, beta, g)[0]

    _, kw = small("gated_delta_rule")
    arguments = tuple(kw[n] for n in ("q", "k", "v", "beta", "g"))
    exported = torch.export.export(Block(), arguments)
    assert any("titans_backends.gated_delta_rule" in str(node.target) for node in exported.graph.nodes)
    assert compare("o", exported.module()(*arguments), Block()(*arguments)).maximum < 1e-6


def test_autocast_casts_the_operands_and_leaves_the_states() -> None:
    op = tb.get_op("gated_delta_rule")
    _, kw = small("gated_delta_rule")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = op(**kw)
        mixed, _ = op(**{**kw, "q": kw["q"].bfloat16()})
        assert torch.is_autocast_enabled("cpu")
    assert o.dtype == mixed.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    narrow = {n: t.bfloat16() if n in "qkv" else t for n, t in kw.items()}
    assert torch.equal(o, op(**narrow)[0])  # the same call, so arithmetic stayed in float32 inside


def test_autocast_leaves_float64_alone() -> None:
    _, kw = small("fast_core", dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tb.get_op("fast_core")(**kw)[0].dtype == torch.float64


def gradients(loss: torch.Tensor, kw: dict[str, object]) -> list[torch.Tensor]:
    """Those of every input that wants one, which a call of all variants' inputs reaches."""
    return list(torch.autograd.grad(loss, [t for t in kw.values() if isinstance(t, torch.Tensor) and t.requires_grad]))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["gated_delta_rule", "dual_core"])
def test_activation_checkpointing_changes_no_bit_of_a_gradient(name: str, use_reentrant: bool) -> None:
    _, kw = small(name, requires_grad=True)
    names = [n for n, t in kw.items() if isinstance(t, torch.Tensor)]

    def block(*tensors: torch.Tensor) -> torch.Tensor:
        o, state, *_ = tb.get_op(name)(**{**kw, **dict(zip(names, tensors, strict=True))})
        return o.square().sum() + state.sum()

    def backward(loss: torch.Tensor) -> list[torch.Tensor]:
        loss.backward()  # autograd.grad is what reentrant checkpointing refuses
        found = [kw[n].grad.clone() for n in names]
        for n in names:
            kw[n].grad = None
        return found

    given = [kw[n] for n in names]
    want = backward(block(*given))
    got = backward(torch.utils.checkpoint.checkpoint(block, *given, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradients_of_two_backward_calls_accumulate() -> None:
    _, kw = small("gated_delta_rule", requires_grad=True)
    op = tb.get_op("gated_delta_rule")
    losses = (lambda: op(**kw)[0].square().sum(), lambda: op(**kw)[1].square().sum())
    apart = [gradients(loss(), kw) for loss in losses]
    for loss in losses:
        loss().backward()
    leaves = [t for t in kw.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    for leaf, first, second in zip(leaves, *apart, strict=True):
        assert compare("grad", leaf.grad, first + second).maximum < 1e-6


def test_gradients_under_autocast_are_those_of_narrow_operands_in_the_leaves_dtype() -> None:
    _, kw = small("gated_delta_rule", requires_grad=True)
    op = tb.get_op("gated_delta_rule")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = op(**kw)[0].float().square().sum()
    got = gradients(loss, kw)
    narrow = {n: t.detach().bfloat16().requires_grad_() if n in "qkv" else t for n, t in kw.items()}
    want = gradients(op(**narrow)[0].float().square().sum(), narrow)
    assert {grad.dtype for grad in got} == {torch.float32}
    assert all(torch.equal(a, b.float()) for a, b in zip(got, want, strict=True))


def test_a_compiled_training_step_equals_the_plain_one() -> None:
    op = tb.get_op("gated_delta_rule")

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inward, self.outward = torch.nn.Linear(16, 50), torch.nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v, beta, g = self.inward(x).split((16, 16, 16, 1, 1), -1)
            q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
            heads = [t.unflatten(-1, (2, 8)) for t in (q, k, v)]
            beta, g = beta.sigmoid().expand(-1, -1, 2), torch.nn.functional.logsigmoid(g).expand(-1, -1, 2)
            return x + self.outward(op(*heads, beta, g)[0].flatten(-2))

    def steps(compiled: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        layer = Layer()
        run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            run(torch.randn(2, 37, 16)).square().mean().backward()
            optimizer.step()
        return layer.state_dict()

    plain = steps(compiled=False)
    for name, got in steps(compiled=True).items():
        assert compare(name, got, plain[name]).maximum < 1e-4


def test_functorch_grad_equals_autograd() -> None:
    _, kw = small("gated_delta_rule", dtype=torch.float64)
    op = tb.get_op("gated_delta_rule")

    def loss(q: torch.Tensor) -> torch.Tensor:
        return op(**{**kw, "q": q})[0].square().sum()

    q = kw["q"].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(q), q)
    assert compare("q", torch.func.grad(loss)(kw["q"]), want).maximum < 1e-9


@pytest.mark.parametrize("name", CONTRACTS)
def test_backward_twice_agrees_and_second_order_raises(name: str) -> None:
    _, kw = small(name, requires_grad=True, dtype=torch.float64)
    loss = tb.get_op(name)(**kw)[0].square().sum()
    inputs = [t for t in kw.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    first = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    gradient = torch.autograd.grad(loss, inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=f"{name}: a gradient of its gradient"):
        torch.autograd.grad(gradient.sum(), inputs[0])


def test_a_frozen_input_gets_no_gradient() -> None:
    _, kw = small("gated_delta_rule", requires_grad=True)
    kw["k"] = kw["k"].detach()
    tb.get_op("gated_delta_rule")(**kw)[0].sum().backward()
    assert kw["k"].grad is None
    assert kw["q"].grad is not None


def test_the_gradient_of_the_final_state_alone() -> None:
    _, kw = small("gated_delta_rule", requires_grad=True, dtype=torch.float64)
    contract = CONTRACTS["gated_delta_rule"]
    got = torch.autograd.grad(tb.get_op("gated_delta_rule")(**kw)[1].square().sum(), kw["v"])[0]
    want = torch.autograd.grad(contract.reference(contract.make_call(**kw))[1].square().sum(), kw["v"])[0]
    assert compare("v", got, want).maximum < 1e-9


def test_a_training_call_outside_its_policy_goes_back_with_the_backend_it_came_with(plugin_backend) -> None:
    ran = plugin_backend("trainable")
    _, kw = small("fast_core", requires_grad=True)
    with tb.use_backend("trainable"):
        loss = tb.get_op("fast_core")(**kw)[0].sum()
    loss.backward()
    assert ran == ["forward", "backward"]


def test_inplace_refuses_a_gradient() -> None:
    _, kw = small("gated_delta_step", requires_grad=True)
    with pytest.raises(ValueError, match="inplace=True takes no gradient"):
        tb.get_op("gated_delta_step")(**{**kw, "inplace": True})


def test_the_memo_answers_the_registered_op_too() -> None:
    _, kw = small("fast_core")
    plans.invalidate()
    op = tb.get_op("fast_core")
    torch.compile(lambda **a: op(**a), fullgraph=True, backend="aot_eager")(**kw)
    assert len(library.planner("fast_core")._memo) == 1


def test_autocast_is_the_same_for_a_plain_a_bound_and_a_compiled_call() -> None:
    op = tb.get_op("gated_delta_rule")
    _, kw = small("gated_delta_rule")
    mixed = {**kw, "q": kw["q"].bfloat16()}
    compiled = torch.compile(lambda **a: op(**a)[0], fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = op(**mixed)[0]
        bound = op.bind(**mixed)(**mixed)[0]
        assert op.explain(**mixed).as_dict()["key"]["dtype"] == "bfloat16"
        traced = compiled(**mixed)
    assert torch.equal(bound, want)
    assert torch.equal(traced, want)
    assert compiled(**kw).dtype == torch.float32


def test_inplace_refuses_a_gradient_under_a_tracer_and_a_transform_too() -> None:
    op = tb.get_op("gated_delta_step")
    _, kw = small("gated_delta_step", requires_grad=True)
    kw = {**kw, "state": kw["state"].detach(), "inplace": True}
    with pytest.raises(Exception, match="inplace=True takes no gradient"):
        torch.compile(lambda **a: op(**a)[0], fullgraph=True, backend="aot_eager")(**kw)
    plain = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in kw.items()}
    with pytest.raises(ValueError, match="inplace=True takes no gradient"):
        torch.func.grad(lambda v: op(**{**plain, "v": v})[0].sum())(plain["v"])

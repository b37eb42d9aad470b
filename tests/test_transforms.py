"""The ops and the layer under `torch.func`: vmap equals a loop, in every nesting with gradients; forward mode and changes in place are refused by a sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import titans_backends as tb
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import build, cases
from titans_backends.nn import TitansDualCore

N, B, T, H, D = 3, 2, 8, 2, 16


def small(name: str) -> dict[str, object]:
    """A call of an op, in float64."""
    contract = CONTRACTS[name]
    case = replace(next(iter(cases(contract))), B=1, T=3 if contract.max_tokens else 12, K=8, V=8, dtype=torch.float64)
    call = build(contract, case)
    return {parameter: getattr(call, parameter) for parameter in contract.parameters}


def rule(*given: Tensor) -> Tensor:
    o: Tensor = tb.get_op("gated_delta_rule")(*given)[0]
    return o


def loss(*given: Tensor) -> Tensor:
    return rule(*given).square().sum()


@pytest.fixture
def given() -> tuple[Tensor, ...]:
    """q, k, v, beta, each with a leading dimension to map."""
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(N, B, T, H, D, generator=source, dtype=torch.float64) for _ in range(3))
    return q, k / k.norm(dim=-1, keepdim=True), v, torch.rand(N, B, T, H, generator=source, dtype=torch.float64)


@pytest.mark.parametrize("name", CONTRACTS)
def test_vmap_equals_a_loop(name: str) -> None:
    """Every output, and every gradient for each slice by itself: also of weights, which a batch would add up."""
    op, keywords = tb.get_op(name), small(name)
    mapped = [key for key, value in keywords.items() if isinstance(value, Tensor) and value.is_floating_point()]
    stacks = tuple(torch.stack([keywords[key], keywords[key] * 0.5]) for key in mapped)  # type: ignore[list-item, operator]

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = op(**{**keywords, **dict(zip(mapped, tensors, strict=True))})
        return tuple(o for o in found if o is not None)

    def total(*tensors: Tensor) -> Tensor:
        return torch.stack([o.square().sum() for o in outputs(*tensors)]).sum()

    each = [outputs(*(stack[index] for stack in stacks)) for index in range(2)]
    for got, *parts in zip(vmap(outputs)(*stacks), *each, strict=True):
        assert torch.equal(got, torch.stack(parts))
    differentiable = tuple(place for place, key in enumerate(mapped) if key in CONTRACTS[name].differentiable)
    slopes = [grad(total, differentiable)(*(stack[index] for stack in stacks)) for index in range(2)]
    for got, *parts in zip(vmap(grad(total, differentiable))(*stacks), *slopes, strict=True):
        torch.testing.assert_close(got, torch.stack(parts))


def test_any_dimension_may_be_mapped_and_what_is_not_mapped_is_shared(given: tuple[Tensor, ...]) -> None:
    q, k, v, beta = given
    want = torch.stack([rule(q[i], k[0], v[i], beta[i]) for i in range(N)], dim=1)
    assert torch.equal(vmap(rule, in_dims=(2, None, 0, 0), out_dims=1)(q.movedim(0, 2), k[0], v, beta), want)
    unmapped = vmap(lambda x: rule(q[0], k[0], v[0], beta[0]).sum() + x)(torch.zeros(N, dtype=torch.float64))
    assert torch.equal(unmapped, rule(q[0], k[0], v[0], beta[0]).sum().expand(N))


def test_gradients_through_vmap_and_vmap_in_vmap(given: tuple[Tensor, ...]) -> None:
    q, *rest = given
    want = torch.stack([grad(loss)(*(x[i] for x in given)) for i in range(N)])
    torch.testing.assert_close(grad(lambda q: vmap(rule)(q, *rest).square().sum())(q), want)
    leaf = q.clone().requires_grad_()
    vmap(rule)(leaf, *rest).square().sum().backward()
    torch.testing.assert_close(leaf.grad, want)
    nested = vmap(vmap(lambda *one: rule(*(x[None] for x in one))[0]))(*given)
    torch.testing.assert_close(nested, torch.stack([rule(*(x[i] for x in given)) for i in range(N)]))


def test_jacrev_is_the_jacobian(given: tuple[Tensor, ...]) -> None:
    q, *rest = (x[0, :1, :3, :1].contiguous() for x in given)
    want = torch.autograd.functional.jacobian(lambda q: rule(q, *rest), q)
    torch.testing.assert_close(jacrev(lambda q: rule(q, *rest))(q), want)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: jvp(f, (x,), (x,)),
        lambda f, x: jacfwd(f)(x),
        lambda f, x: jvp(grad(lambda y: f(y).sum()), (x,), (x,)),
        lambda f, x: hessian(f)(x),
    ],
    ids=["jvp", "jacfwd", "jvp of grad", "hessian"],
)
def test_forward_mode_is_refused_with_what_to_use(transform: Callable[..., object], given: tuple[Tensor, ...]) -> None:
    q, *rest = (x[0, :1, :3, :1].contiguous() for x in given)
    with pytest.raises(NotImplementedError, match=r"gated_delta_rule: it has no forward-mode derivative .* use reverse mode"):
        transform(lambda q: rule(q, *rest), q)


def test_what_no_tangent_reaches_runs_in_forward_mode(given: tuple[Tensor, ...]) -> None:
    one = [x[0] for x in given]
    assert torch.equal(jvp(lambda x: rule(*one) * x, (torch.ones((), dtype=torch.float64),), (torch.ones((), dtype=torch.float64),))[1], rule(*one))


def test_second_order_and_changes_in_place_are_refused(given: tuple[Tensor, ...]) -> None:
    one = [x[0] for x in given]
    with pytest.raises(RuntimeError, match="a gradient of its gradient"):
        grad(lambda q: grad(lambda p: loss(p, *one[1:]))(q).sum())(one[0])
    step, state = tb.get_op("gated_delta_step"), torch.zeros(B, H, D, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"no other transform of torch.func; pass inplace=False"):
        vmap(lambda *x: step(*x, state=state, inplace=True)[0])(*(x[:, :, :1] for x in given))
    with pytest.raises(ValueError, match="over a dimension of size 0"):
        vmap(rule)(*(x[:0] for x in given))


@pytest.mark.parametrize("transform", [vmap, grad], ids=["vmap", "grad"])
def test_compiled_a_transform_runs_eagerly_and_a_full_graph_is_refused(
    transform: Callable[..., Callable[..., Tensor]], given: tuple[Tensor, ...]
) -> None:
    asked, tensors = (rule, given) if transform is vmap else (loss, tuple(x[0] for x in given))
    torch._dynamo.reset()
    got = torch.compile(transform(asked), backend="aot_eager")(*tensors)
    torch.testing.assert_close(got, transform(asked)(*tensors))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"its torch\.func transforms run eagerly; leave fullgraph=True out"):
        torch.compile(transform(asked), backend="aot_eager", fullgraph=True)(*tensors)
    torch._dynamo.reset()


def test_a_compiled_function_that_maps_runs_the_ops_eagerly(given: tuple[Tensor, ...]) -> None:
    torch._dynamo.reset()
    got = torch.compile(lambda *x: vmap(lambda *one: rule(*one) * 2)(*x) + 1, backend="aot_eager")(*given)
    torch.testing.assert_close(got, vmap(rule)(*given) * 2 + 1)
    once = torch.compiler.disable(grad(loss))  # behind a broken graph torch cannot go on inside of grad
    got = torch.compile(lambda *x: once(*x) * 2, backend="aot_eager")(*(x[0] for x in given))
    torch.testing.assert_close(got, grad(loss)(*(x[0] for x in given)) * 2)
    torch._dynamo.reset()


def test_gradients_for_each_sample_of_a_layer() -> None:
    torch.manual_seed(0)
    layer = TitansDualCore(64, num_heads=2).eval()
    parameters, x = {name: weight.detach() for name, weight in layer.named_parameters()}, torch.randn(2, 1, 12, 64)

    def of_sample(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        total: Tensor = functional_call(layer, weights, (sample,))[0].square().sum()
        return total

    found = vmap(grad(of_sample), in_dims=(None, 0))(parameters, x)
    for index in range(2):
        for name, want in grad(of_sample)(parameters, x[index]).items():
            torch.testing.assert_close(found[name][index], want, atol=1e-5, rtol=1e-4)


def test_explain_inside_a_transform_tells_the_slices_call(given: tuple[Tensor, ...]) -> None:
    """As without the transform, in any nesting and for any mapped dimension; the signature is that of the call that runs."""
    op, told = tb.get_op("gated_delta_rule"), []

    def asked(*tensors: Tensor) -> Tensor:
        told.append(op.explain(*tensors))
        return tensors[0].sum()

    q, k, v, beta = given
    vmap(asked)(*given)
    vmap(asked, in_dims=(2, None, 0, 0))(q.movedim(0, 2), k[0], v, beta)
    vmap(grad(asked))(*given)
    grad(lambda q: vmap(asked)(q, k, v, beta).sum())(q)
    vmap(vmap(asked))(*(x[None] for x in given))
    grad(asked)(*(x[0] for x in given))
    plain = op.explain(*(x[0] for x in given))
    assert len(told) == 6
    assert {found.kernel for found in told} == {plain.kernel}
    assert {found.signature.dims for found in told} == {plain.signature.dims}
    with pytest.raises(ValueError, match=r"gated_delta_rule: torch\.func\.vmap over a dimension of size 0"):
        vmap(asked)(*(x[:0] for x in given))


def test_bind_inside_a_transform_says_to_bind_outside(given: tuple[Tensor, ...]) -> None:
    op = tb.get_op("gated_delta_rule")
    with pytest.raises(RuntimeError, match=r"inside torch\.func .* nothing can be bound; bind it outside"):
        vmap(lambda *x: op.bind(*x)(*x)[0])(*given)
    bound = op.bind(*(x[0] for x in given))
    assert torch.equal(vmap(lambda *x: bound(*x)[0])(*given), vmap(rule)(*given))  # as the sentence says

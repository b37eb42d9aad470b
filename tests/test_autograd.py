"""Training in plain eager mode: what runs when nobody traces, what it agrees with, and when a backward is repeated from memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import titans_backends as tb
from titans_backends import library
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import build, cases


def small(name: str, **changes: object) -> dict[str, object]:
    op = CONTRACTS[name]
    case = replace(next(iter(cases(op))), **{"B": 1, "T": 3 if op.max_tokens else 37, "K": 8, "V": 8, **changes})
    call = build(op, case, requires_grad=True)
    return {parameter: getattr(call, parameter) for parameter in op.parameters}


def gradients(name: str, keywords: dict[str, object], run: Callable[..., tuple[Tensor | None, ...]]) -> list[Tensor | None]:
    leaves = [x for x in keywords.values() if isinstance(x, Tensor) and x.requires_grad]
    outputs = [o for o in run(**keywords) if o is not None]
    return list(torch.autograd.grad(outputs, leaves, [torch.cos(o.detach()) for o in outputs], allow_unused=True))


class Seen(TorchDispatchMode):
    """The registered ops that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == library.NAMESPACE:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CONTRACTS)
def test_eager_gradients_are_those_of_the_registered_op(name: str) -> None:
    keywords, op = small(name), CONTRACTS[name]

    def watched(**given: object) -> tuple[Tensor | None, ...]:
        return library.call(op, [given[parameter] for parameter in op.parameters], None, False, True, True)

    for got, want in zip(gradients(name, keywords, tb.get_op(name)), gradients(name, keywords, watched), strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


def test_a_number_in_a_tensors_place_reaches_the_backward() -> None:
    keywords = small("dual_core")
    assert isinstance(keywords["alpha"], Tensor)
    alike = {**keywords, "alpha": torch.full_like(keywords["alpha"], 0.25)}
    op = tb.get_op("dual_core")
    for got, want in zip(gradients("dual_core", {**keywords, "alpha": 0.25}, op), gradients("dual_core", alike, op), strict=True):
        torch.testing.assert_close(got, want)


def test_a_dispatch_mode_sees_the_registered_ops_and_plain_training_does_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    keywords = small("fast_core")
    with Seen() as seen:
        gradients("fast_core", keywords, tb.get_op("fast_core"))
    assert seen.names == ["fast_core", "fast_core_backward"]
    monkeypatch.setattr(library, "call", lambda *args: pytest.fail("the registered op ran"))
    gradients("fast_core", keywords, tb.get_op("fast_core"))


def test_a_dispatch_mode_around_the_backward_alone_sees_it() -> None:
    o = tb.get_op("fast_core")(**small("fast_core"))[0]
    with Seen() as seen:
        o.backward(torch.ones_like(o))
    assert seen.names == ["fast_core_backward"]


def test_what_arrives_as_a_subclass_is_seen_by_torch() -> None:
    keywords = small("fast_core")
    o = tb.get_op("fast_core")(**keywords)[0]
    one = torch.autograd.grad(o, keywords["v"], torch.ones_like(o), retain_graph=True)[0]
    both = torch.autograd.grad(o, keywords["v"], TwoTensor(torch.ones_like(o), 2 * torch.ones_like(o)))[0]
    assert isinstance(both, TwoTensor)
    torch.testing.assert_close((both.a, both.b), (one, 2 * one))


def test_compiled_autograd_traces_the_registered_backward() -> None:
    keywords = small("fast_core")
    want = gradients("fast_core", keywords, tb.get_op("fast_core"))
    o = tb.get_op("fast_core")(**keywords)[0]
    loss = (o * torch.cos(o.detach())).sum()
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward()
    leaves = [x for x in keywords.values() if isinstance(x, Tensor) and x.requires_grad]
    for leaf, grad in zip(leaves, want, strict=True):
        assert grad is not None
        torch.testing.assert_close(leaf.grad, grad)


class Spy:
    """A backend that says whether anything reached it lazily negated, and whether autograd's keys are on."""

    def __init__(self, plugin_backend, op: str = "fused_uw") -> None:
        self.negated: list[bool] = []
        plugin_backend("spy", ops=(op,), run=self.run, run_backward=self.run_backward)

    def run(self, call, candidate):
        self.negated.append(any(x.is_neg() for x in (call.attn_const, call.v_beta, call.k_beta)))
        return call.attn_const @ call.v_beta, call.attn_const @ call.k_beta

    def run_backward(self, call, grads, states, needs, candidate):
        self.negated.append(any(x.is_neg() for x in grads if x is not None))
        probe = torch.ones(1, requires_grad=True)
        with torch.enable_grad():
            assert (2 * probe).grad_fn is None, "a backward runs below autograd"
        return tuple(torch.ones_like(getattr(call, name)) if name in needs else None for name in CONTRACTS["fused_uw"].differentiable)


def test_a_lazily_negated_tensor_reaches_no_kernel(plugin_backend) -> None:
    spy, a, x = Spy(plugin_backend), torch.eye(4), torch.randn(4, 4, requires_grad=True)
    lazy = torch.complex(x, x).conj().imag
    assert lazy.is_neg()
    op = tb.get_op("fused_uw", backend="spy")
    u, _ = op(a, lazy, x)
    torch.testing.assert_close(u, -x)
    torch.complex(x.detach(), u).conj().imag.sum().backward()
    with torch.no_grad():
        op(a, lazy.detach(), x)
    assert spy.negated == [False] * 3


def test_a_bound_op_refuses_a_lazily_negated_tensor() -> None:
    a, x = torch.eye(4), torch.randn(4, 4)
    lazy = torch.complex(x, x).conj().imag
    with pytest.raises(tb.BoundCallMismatchError, match=r"v_beta is a lazily negated view; pass v_beta.resolve_neg\(\)"):
        tb.get_op("fused_uw").bind(a, x.T.contiguous(), x)(a, lazy, x)
    with pytest.raises(TypeError, match=r"fused_uw: v_beta is a lazily negated view.*resolve_neg"):
        tb.get_op("fused_uw").bind(a, lazy, x)


def test_what_a_saved_tensors_hook_changes_is_computed_as_it_came_back() -> None:
    keywords = small("gated_delta_rule")
    want = gradients("gated_delta_rule", keywords, tb.get_op("gated_delta_rule"))

    def turned(x: Tensor) -> Tensor:
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 2 else x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, turned):
        got = gradients("gated_delta_rule", keywords, tb.get_op("gated_delta_rule"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_changed_input_is_refused_in_backward() -> None:
    keywords = small("gated_delta_rule")
    keywords["v"] = keywords["v"] * 1.0
    o = tb.get_op("gated_delta_rule")(**keywords)[0]
    keywords["v"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


class Repeating:
    """A backend's memory of backwards that writes down what it was asked."""

    def __init__(self, *, repeats: bool = True) -> None:
        self.said: list[str] = []
        self.repeats = repeats

    def run_backward(self, call, grads, states, needs, candidate):
        self.said.append("run")
        return self._zeros(call, needs)

    def remember_backward(self, call, grads, states, needs, candidate):
        self.said.append("remember")

        def again(later, arriving, saved):
            self.said.append("again")
            return self._zeros(CONTRACTS["fast_core"].make_call(**dict(zip(CONTRACTS["fast_core"].parameters, later, strict=True))), needs)

        return self._zeros(call, needs), again if self.repeats else None

    def _zeros(self, call, needs):
        return tuple(torch.zeros_like(getattr(call, name)) if name in needs else None for name in CONTRACTS["fast_core"].differentiable)


def repeating(plugin_backend, **options: bool) -> Repeating:
    made = Repeating(**options)
    plugin_backend("repeating", run_backward=made.run_backward, remember_backward=made.remember_backward)
    return made


def step(keywords: dict[str, object], **changes: object) -> None:
    o = tb.get_op("fast_core", backend="repeating")(**{**keywords, **changes})[0]
    o.backward(torch.ones_like(o))


def test_a_backward_like_one_before_is_repeated_from_memory(plugin_backend) -> None:
    made, keywords = repeating(plugin_backend), small("fast_core")
    for _ in range(3):
        step(keywords)
    assert made.said == ["remember", "again", "again"]


def test_other_needs_and_other_gradients_are_remembered_apart(plugin_backend) -> None:
    made, keywords = repeating(plugin_backend), small("fast_core")
    step(keywords)
    step(keywords, k=keywords["k"].detach())
    o = tb.get_op("fast_core", backend="repeating")(**keywords)[0]
    o.sum().backward()  # an expanded gradient, of no stride
    assert made.said == ["remember"] * 3
    step(keywords)
    assert made.said[3:] == ["again"]


def test_what_cannot_be_repeated_is_run_and_not_asked_again(plugin_backend) -> None:
    made, keywords = repeating(plugin_backend, repeats=False), small("fast_core")
    for _ in range(3):
        step(keywords)
    assert made.said == ["remember", "run", "run"]

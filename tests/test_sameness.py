"""A bound op's comparison in one call: what is the same passes, whatever differs does not, and without torch's guard the answer is "unknown"."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import titans_backends as tb
from titans_backends import precision, sameness
from titans_backends.contracts.fast_core import FastCore
from titans_backends.errors import BoundCallMismatchError
from titans_backends.plan import Plan
from titans_backends.request import request


def values() -> tuple[object, ...]:
    return torch.zeros(2, 6, 4), torch.zeros(2, 6), None, 16, True


def _misaligned(x: Tensor) -> Tensor:
    return torch.zeros(x.numel() + 1)[1:].view(x.shape)


class Other(Tensor):
    """A subclass."""


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "dtype": lambda x: x.double(),
    "shape": lambda x: torch.zeros(2, 6, 5),
    "stride": lambda x: torch.zeros(6, 2, 4).transpose(0, 1),
    "alignment": _misaligned,
    "lazily negated": lambda x: torch._neg_view(x),
    "requires_grad": lambda x: x.clone().requires_grad_(),
    "device": lambda x: x.to("meta"),
    "subclass": lambda x: x.as_subclass(Other),
    "absent": lambda x: None,
    "a number": lambda x: 1.0,
}


def test_other_tensors_of_the_same_facts_are_the_same() -> None:
    """The point of the guard: without it every bound call compares fact by fact."""
    assert sameness.same_as(values())(values())


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_tensor_that_differs_is_not_the_same(change: str) -> None:
    first, *rest = values()
    assert isinstance(first, Tensor)
    assert not sameness.same_as(values())((CHANGES[change](first), *rest))


def test_a_tensor_where_there_was_none_is_not_the_same() -> None:
    first, second, _, *options = values()
    assert not sameness.same_as(values())((first, second, torch.zeros(1), *options))
    assert not sameness.same_as(values())((first, second, None, torch.zeros(2), True))


@pytest.mark.parametrize("options", [(17, True), (16.0, True), (16, 1), (16, False), (None, True), ("16", True)], ids=str)
def test_an_option_that_differs_in_value_or_type_is_not_the_same(options: tuple[object, ...]) -> None:
    first, second, absent, *_ = values()
    assert not sameness.same_as(values())((first, second, absent, *options))


def _bound() -> tuple[tb.BoundOp, list[Tensor]]:
    given = [torch.randn(1, 20, 2, 8) for _ in range(3)]
    return tb.get_op("fast_core").bind(*given, chunk_size=16), given


@pytest.mark.parametrize("guarded", [True, False])
def test_a_bound_op_answers_the_same_with_and_without_the_guard(guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not guarded:
        monkeypatch.setattr(sameness, "_guard", lambda tensors: None)
    bound, (q, k, v) = _bound()
    want = tb.get_op("fast_core")(q, k, v, chunk_size=16)[0]
    assert want is not None
    for given in ((q, k, v), (q.clone(), k.clone(), v.clone())):
        got = bound(*given, chunk_size=16)[0]
        assert got is not None
        assert torch.equal(got, want)
    with torch.inference_mode():  # other dispatch keys: compared fact by fact, and the same
        got = bound(q, k, v, chunk_size=16)[0]
        assert got is not None
        assert torch.equal(got, want)
    for wrong, what in (
        ((q, k.double(), v), "k has dtype"),
        ((q, k, v[:, :10]), "v has shape"),
        ((q, torch._neg_view(k), v), "k is a lazily negated"),
    ):
        with pytest.raises(BoundCallMismatchError, match=what):
            bound(*wrong, chunk_size=16)
    with pytest.raises(BoundCallMismatchError, match="chunk_size is 8"):
        bound(q, k, v, chunk_size=8)
    with pytest.raises(BoundCallMismatchError, match="bound without gradients"):
        bound(q.clone().requires_grad_(), k, v, chunk_size=16)
    with torch.no_grad():
        assert bound(q.clone().requires_grad_(), k, v, chunk_size=16)[0] is not None


def test_a_bound_op_that_trains_gives_gradients_with_the_guard_and_none_without_grad() -> None:
    given = [torch.randn(1, 20, 2, 8, requires_grad=True) for _ in range(3)]
    bound = tb.get_op("fast_core").bind(*given, chunk_size=16)
    out = bound(*given, chunk_size=16)[0]
    assert out is not None
    out.sum().backward()
    assert all(x.grad is not None for x in given)
    with torch.no_grad():
        out = bound(*given, chunk_size=16)[0]
        assert out is not None
        assert not out.requires_grad


def test_calls_like_the_last_few_get_their_plans_without_a_key_and_another_call_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tb.reset()
    op = tb.get_op("fast_core")
    planner = op._planner
    first, second = ([torch.randn(1, length, 2, 8) for _ in range(3)] for length in (20, 24))
    calls: list[Callable[[], object]] = [
        lambda: op(*first, chunk_size=16),
        lambda: op(*second, chunk_size=16),
        lambda: op(*first, chunk_size=8),
    ]
    for call in calls:
        call()
    assert len({id(entry.plan) for entry in planner._recent}) == len(calls)
    with monkeypatch.context() as patch:
        patch.setattr(type(planner), "_key", lambda *_: pytest.fail("a key was built"))
        for call in (*calls, *reversed(calls), lambda: op(*(x.clone() for x in first), chunk_size=16)):
            call()
    plans = {id(entry.plan) for entry in planner._recent}
    op(*first, chunk_size=16, backend="eager")
    assert id(planner._recent[0].plan) not in plans, "a forced call has a plan of its own"


def test_a_training_step_like_the_last_few_builds_no_key_in_either_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    tb.reset()
    op = tb.get_op("fast_core")
    layers = [[torch.randn(1, length, 2, 8, requires_grad=True) for _ in range(3)] for length in (20, 24, 28, 32)]

    def step() -> None:
        for given in layers:
            out = op(*given, chunk_size=16)[0]
            assert out is not None
            out.sum().backward()

    step()
    monkeypatch.setattr(type(op._planner), "_key", lambda *_: pytest.fail("a key was built"))
    step()


def trained(*given: torch.Tensor, **options: object) -> tuple[torch.Tensor, list[torch.Tensor]]:
    out = tb.get_op("fast_core")(*given, chunk_size=16, **options)[0]
    assert out is not None
    return out, list(torch.autograd.grad(out, given, torch.ones_like(out)))


def test_a_training_step_known_from_before_is_cast_under_autocast() -> None:
    tb.reset()
    given = [torch.randn(1, 20, 2, 8, requires_grad=True) for _ in range(3)]
    for _ in range(2):
        assert trained(*given)[0].dtype == torch.float32
    halves = [x.detach().bfloat16().requires_grad_() for x in given]
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            for leaves in (given, halves):
                out, gradients = trained(*leaves)
                assert out.dtype == dtype
                assert {one.dtype for one in gradients} == {leaves[0].dtype}


def test_a_training_step_known_from_before_is_seen_by_transforms_and_tracers() -> None:
    tb.reset()
    given = [torch.randn(1, 20, 2, 8, requires_grad=True) for _ in range(3)]
    for _ in range(2):
        want, _ = trained(*given)
    op = tb.get_op("fast_core")
    many = torch.func.vmap(lambda x: x * op(*given, chunk_size=16)[0])(torch.ones(2))  # the op's tensors are not mapped
    torch.testing.assert_close(many, torch.stack([want, want]))
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record this call"):
        torch.jit.trace(lambda x: op(*given, chunk_size=16)[0] * x, (torch.ones(1),), check_trace=False)


def test_a_training_step_known_from_before_is_forced_or_refused_as_it_is_asked() -> None:
    tb.reset()
    given = [torch.randn(1, 20, 2, 8, requires_grad=True) for _ in range(3)]
    for _ in range(2):
        trained(*given)
    with pytest.raises(tb.UnknownNameError, match="nobody"):
        trained(*given, backend="nobody")
    with pytest.raises(tb.BackendRefusedError), tb.use_backend("numba"):
        trained(*given)
    trained(*given)


def test_offsets_of_a_training_step_known_from_before_are_checked_in_every_call() -> None:
    tb.reset()
    op = tb.get_op("gated_delta_rule")
    q, k, v = (torch.randn(1, 12, 2, 8, requires_grad=True) for _ in range(3))
    beta, offsets = torch.rand(1, 12, 2), torch.tensor([0, 5, 12])
    for _ in range(2):
        out = op(q, k, v, beta, cu_seqlens=offsets)[0]
        assert out is not None
        out.sum().backward()
    offsets[1] = 13
    with pytest.raises(ValueError, match="cu_seqlens"):
        op(q, k, v, beta, cu_seqlens=offsets)


def test_a_step_in_place_is_refused_its_gradient_every_time() -> None:
    tb.reset()
    op = tb.get_op("gated_delta_step")
    q, k, v = (torch.randn(1, 1, 2, 8, requires_grad=True) for _ in range(3))
    for _ in range(3):
        with pytest.raises(ValueError, match="inplace=True takes no gradient"):
            op(q, k, v, torch.rand(1, 1, 2), state=torch.zeros(1, 2, 8, 8), inplace=True)


def test_what_is_asked_twice_is_one_request() -> None:
    with tb.policy(batch_invariant=True):
        scoped = request("eager", training=True)
        assert request("eager", training=True) is scoped
    assert request("eager", training=True) is not scoped
    assert request("eager", training=True) is request("eager", training=True, may_save=True)
    assert request("eager", training=True).may_save
    assert not request("eager", training=True, may_save=False).may_save


@pytest.mark.parametrize("odd", ["inference_mode", "no_grad", "parameter"])
def test_a_first_call_in_a_mode_of_its_own_does_not_slow_the_later_ones(odd: str, plugin_backend: Callable[..., list[str]]) -> None:
    said: list[str] = []

    def remember(call: FastCore, candidate: object) -> object:
        return (call.q.detach().clone(), None), lambda values: (said.append("again"), (values[0].clone(), None))[1]

    plugin_backend("remembering", remember=remember)
    op = tb.get_op("fast_core", backend="remembering")
    q, k, v = (torch.randn(1, 20, 2, 8) for _ in range(3))
    if odd == "inference_mode":
        with torch.inference_mode():
            op(q, k, v, chunk_size=16)
    elif odd == "no_grad":
        with torch.no_grad():
            op(q.clone().requires_grad_(), k, v, chunk_size=16)
    else:
        op(torch.nn.Parameter(q.clone(), requires_grad=False), k, v, chunk_size=16)
    op(q, k, v, chunk_size=16)
    said.clear()
    asked = request("remembering", training=False)
    seen = [op._planner._like(op._planner.values(op._call((q, k, v), {"chunk_size": 16})), asked) for _ in range(2)]
    assert None not in seen
    op(q, k, v, chunk_size=16)
    assert said == ["again"]


def test_one_tensor_for_two_inputs_does_not_end_remembering(plugin_backend: Callable[..., list[str]]) -> None:
    said: list[str] = []

    def remember(call: FastCore, candidate: object) -> object:
        said.append("remember")
        outputs = (call.q.detach().clone(), None)
        return outputs, None if call.q is call.k else lambda values: (said.append("again"), outputs)[1]

    plugin_backend("remembering", remember=remember)
    op = tb.get_op("fast_core", backend="remembering")
    q, k, v = (torch.randn(1, 20, 2, 8) for _ in range(3))
    op(q, q, v, chunk_size=16)
    for _ in range(2):
        op(q, k, v, chunk_size=16)
    op(q, q, v, chunk_size=16)
    assert said == ["remember", "remember", "again", "again"]


def test_torchs_newer_precision_settings_are_read_where_the_older_question_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> str:
        raise RuntimeError("PyTorch is checking the matmul precision without a specific backend name")

    given = [torch.randn(1, 20, 2, 8) for _ in range(3)]
    op = tb.get_op("fast_core")
    want = op(*given, chunk_size=16)[0]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", refused)
    got = op(*given, chunk_size=16)[0]
    assert got is not None
    assert want is not None
    assert torch.equal(got, want)
    for newer, older in (("ieee", "highest"), ("tf32", "high"), ("bf16", "medium"), ("none", "highest")):
        monkeypatch.setattr(precision, "_setting", lambda on_cuda, newer=newer: newer)
        assert precision.float32_precision(False) == older


def test_a_bound_op_can_be_traced_whole() -> None:
    bound, given, want = _rule()
    run = torch.compile(lambda *x: bound(*x)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(run(*given), want)


def test_a_tensor_on_meta_among_others_is_refused_where_torch_must_see_the_call() -> None:
    _, (q, k, v, beta), _ = _rule()
    for first in (q, torch._neg_view(-q)):
        with pytest.raises(ValueError, match="g is on meta, but q is on cpu"):
            tb.get_op("gated_delta_rule")(first, k, v, beta, (-beta).to("meta"))


def _rule() -> tuple[tb.BoundOp, list[Tensor], Tensor]:
    q, k, v = torch.nn.functional.normalize(torch.randn(3, 2, 8, 2, 16), dim=-1).unbind(0)
    given = [q, k, v, torch.rand(2, 8, 2)]
    bound = tb.get_op("gated_delta_rule").bind(*given)
    out = bound(*given)[0]
    assert out is not None
    return bound, given, out


def test_a_nested_tensor_is_refused_with_the_contracts_sentence_also_after_a_call_that_was_remembered() -> None:
    """torch's own guard ends the process there."""
    bound, (q, k, v, beta), _ = _rule()
    nested = torch.nested.nested_tensor([q[0], q[1]])
    tb.get_op("gated_delta_rule")(q, k, v, beta)
    for call in (tb.get_op("gated_delta_rule"), bound):
        with pytest.raises(TypeError, match="q must be an ordinary tensor, got a nested one"):
            call(nested, k, v, beta)


@pytest.mark.parametrize("bind", [False, True])
def test_what_was_remembered_is_repeated_for_calls_just_like_it_and_for_no_others(bind: bool, plugin_backend: Callable[..., list[str]]) -> None:
    said: list[str] = []

    def outputs(q: Tensor) -> tuple[Tensor, None]:
        return q.detach().clone(), None

    def run(call: FastCore, candidate: object) -> tuple[Tensor, None]:
        said.append("run")
        return outputs(call.q)

    def remember(call: FastCore, candidate: object) -> object:
        said.append("remember")
        return outputs(call.q), lambda values: (said.append("again"), outputs(values[0]))[1]

    plugin_backend("remembering", run=run, remember=remember)
    op = tb.get_op("fast_core", backend="remembering")
    given = [torch.randn(1, 20, 2, 8) for _ in range(3)]
    call = op.bind(*given, chunk_size=16) if bind else op
    for _ in range(3):
        fresh = [x.clone() for x in given]
        out = call(*fresh, chunk_size=16)
        assert len(out) == 2
        assert out[0] is not None
        assert torch.equal(out[0], fresh[0])
    assert said == ["remember", "again", "again"]
    said.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16), contextlib.suppress(BoundCallMismatchError):
        call(*given, chunk_size=16)
    assert "again" not in said
    if not bind:
        said.clear()
        call(*given, chunk_size=8)
        call(*(x.double() for x in given), chunk_size=16)
        with tb.policy(batch_invariant=True), contextlib.suppress(tb.BackendRefusedError):
            call(*given, chunk_size=16)
        assert "again" not in said
    if bind:
        with pytest.raises(BoundCallMismatchError):
            call(*given, chunk_size=8)


def test_a_bound_op_takes_its_arguments_by_place_and_by_name_and_refuses_what_the_op_refuses() -> None:
    bound, (q, k, v, beta), want = _rule()
    for args, kwargs in (
        ((q, k), {"v": v, "beta": beta}),
        ((), {"beta": beta, "v": v, "k": k, "q": q}),
        ((q, k, v, beta), {"g": None, "scale": None}),
    ):
        assert torch.equal(bound(*args, **kwargs)[0], want)  # type: ignore[arg-type]
    for args, kwargs, what in (
        ((q, k, v), {}, "beta"),
        ((q, k, v, beta), {"beta": beta}, "beta"),
        ((q, k, v, beta), {"betta": beta}, "betta"),
        ((q, k, v, beta, *[None] * 20), {}, "argument"),
    ):
        with pytest.raises(TypeError, match=what):
            bound(*args, **kwargs)


def test_a_bound_op_is_shared_by_a_copied_module_and_says_what_to_pickle_instead() -> None:
    bound, given, want = _rule()
    assert torch.equal(copy.deepcopy({"step": bound})["step"](*given)[0], want)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"store get_op\('gated_delta_rule'\)"):
        pickle.dumps(bound)
    with pytest.raises(TypeError, match=r"a bound op has its backend, .*bind\(\.\.\., backend=\.\.\.\)"):
        bound(*given, backend="eager")


def test_a_bound_op_is_seen_by_what_traces_and_intercepts() -> None:
    bound, given, want = _rule()
    with FakeTensorMode() as mode:
        assert isinstance(bound(*(mode.from_tensor(x) for x in given))[0], FakeTensor)
    traced = make_fx(lambda *x: bound(*x)[0])(*given)
    assert "titans_backends.gated_delta_rule" in traced.code
    assert torch.equal(traced(*given), want)
    assert type(bound(given[0].as_subclass(Other), *given[1:])[0]) is Other
    shorter = [x[:, :5] for x in given]
    with pytest.raises(BoundCallMismatchError, match="q has shape"), FakeTensorMode() as mode:
        bound(*(mode.from_tensor(x) for x in shorter))


def test_a_dual_tensor_is_refused_and_loses_no_tangent_without_a_word() -> None:
    bound, (q, k, v, beta), _ = _rule()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(v, torch.ones_like(v))
        for call in (tb.get_op("gated_delta_rule"), bound):
            assert call(q, k, v, beta)[0] is not None, "a level that is open touches no plain call"
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                call(q, k, dual, beta)


@pytest.mark.parametrize("bind", [False, True])
def test_autograd_knows_of_a_state_that_was_changed_in_place(bind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 2, 1, 2, 16).unbind(0)
    given, state = {"q": q, "k": k, "v": v, "beta": torch.rand(2, 1, 2)}, torch.randn(2, 2, 16, 16)
    weight = torch.randn_like(state, requires_grad=True)
    kept = (weight * state).sum()
    monkeypatch.setattr(Plan, "run", lambda self, call: (call.v, call.state))  # as a kernel that torch does not see, and eager's operations are
    step = tb.get_op("gated_delta_step")
    call = step.bind(**given, state=state, inplace=True) if bind else step
    before = state._version
    call(**given, state=state, inplace=True)
    assert state._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
    with torch.inference_mode():
        frozen = torch.randn(2, 2, 16, 16)
        step(**given, state=frozen, inplace=True)
    with pytest.raises(RuntimeError, match="inference tensor outside"):
        step(**given, state=frozen, inplace=True)

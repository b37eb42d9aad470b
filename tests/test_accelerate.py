"""`accelerate`: what it swaps, that the new forward runs, that everything else about the model stays, and the way back."""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import pickle
import re
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import titans_backends as tb
from tests.lam_layer import LamAfter, LamBefore, LamModel, randomized
from titans_backends import registry, switches
from titans_backends.integrations import known
from titans_backends.integrations.lam_forward import LamForward
from titans_backends.integrations.raw_weights import raw_weights
from titans_backends.integrations.report import Entry
from titans_backends.verdict import Verdict, refused

X = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(0))


def model_of(kind: type[nn.Module] = LamAfter, **more: int) -> LamModel:
    torch.manual_seed(0)
    return randomized(LamModel(kind, **more))


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def old_calls(model: nn.Module) -> int:
    return sum(layer.calls for layer in model.modules() if isinstance(layer, LamAfter | LamBefore))


class Doubled(nn.Module):
    """Somebody's own layer, and what it becomes here: 2 x, by another way."""

    def __init__(self, refuses: str = "") -> None:
        super().__init__()
        self.weight, self.refuses = nn.Parameter(torch.tensor(2.0)), refuses

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class Added(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.marks.append("new")
        return self.weight / 2 * x + self.weight / 2 * x


def doubled(marks: list[str], name: str = "doubled", **more: object) -> known.KnownLayer:
    def convert(module: nn.Module, backend: str | None) -> known.Conversion | Verdict:
        return refused(*module.refuses.split("+")) if module.refuses else tb.Conversion(Added, {"marks": marks, "forced": backend}, **more)

    return tb.KnownLayer(name, f"Doubled, for the test of {name}", lambda module: isinstance(module, Doubled), convert)


@pytest.fixture(autouse=True)
def only_built_in() -> Iterator[None]:
    """The registry as it was, after a test that registers."""
    before = {layer.name: layer for layer in reversed(tb.integrations.known.known_layers())}
    yield
    known._KNOWN.clear()
    known._KNOWN.update(before)


@pytest.fixture
def marks() -> list[str]:
    """What the new forward of `Doubled` writes when it runs; the layer is registered."""
    written: list[str] = []
    tb.register_layer(doubled(written))
    return written


# --- swap and undo


@pytest.mark.parametrize("kind", [LamAfter, LamBefore])
def test_a_swapped_model_computes_the_same_by_the_new_forward_and_is_itself_again_after_undo(kind: type[nn.Module]) -> None:
    model = model_of(kind)
    want, ran, before = model(X), old_calls(model), [(type(m), set(m.__dict__)) for m in model.modules()]
    report = tb.accelerate(model)
    same(model(X), want)
    assert old_calls(model) == ran
    assert all(isinstance(layer, kind) and isinstance(layer, LamForward) for layer in model.layers)
    assert [entry.path for entry in report.swapped] == ["layers.0", "layers.1"]
    assert {(entry.old, entry.new.__name__) for entry in report.swapped} == {(kind, f"Titans{kind.__name__}")}
    report.undo()
    assert [(type(m), set(m.__dict__)) for m in model.modules()] == before
    assert torch.equal(model(X), want)
    assert old_calls(model) == ran + 2
    assert report.undone
    tb.accelerate(model)
    report.undo()
    assert isinstance(model.layers[0], LamForward), "a second undo took back what another report did"


def test_as_a_context_manager_it_undoes_at_the_end_and_on_an_error() -> None:
    model = model_of()
    within = []

    def used() -> None:
        with tb.accelerate(model):
            within.append(type(model.layers[1]).__name__)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        used()
    assert within == ["TitansLamAfter"]
    assert type(model.layers[1]) is LamAfter


def test_of_a_model_swapped_in_part_the_rest_is_swapped_and_each_report_undoes_its_own() -> None:
    model = model_of(layers=3)
    first = tb.accelerate(model.layers[1])
    second = tb.accelerate(model)
    assert [(entry.path, entry.status, entry.old) for entry in second.entries] == [
        ("layers.0", "swapped", LamAfter), ("layers.1", "already", LamAfter), ("layers.2", "swapped", LamAfter),
    ]  # fmt: skip
    third = tb.accelerate(model)
    assert not third.swapped
    assert len(third.already) == 3
    third.undo()
    first.undo()
    assert [isinstance(layer, LamForward) for layer in model.layers] == [True, False, True]
    second.undo()
    assert {type(layer) for layer in model.layers} == {LamAfter}


def test_layers_of_the_library_itself_are_there_already() -> None:
    model = nn.Sequential(tb.nn.TitansDualCore(32, 2))
    assert [entry.status for entry in tb.accelerate(model).entries] == ["already"]
    with pytest.raises(tb.AccelerateError, match=r"say use_backend\('eager'\) around its calls"):
        tb.accelerate(model, backend="eager")


def test_a_shared_layer_is_swapped_once_under_all_its_names_and_a_model_may_be_the_layer(marks: list[str]) -> None:
    inner = nn.Sequential(Doubled())
    model = nn.ModuleDict({"a": inner, "b": nn.Sequential(inner, inner[0])})
    (entry,) = tb.accelerate(model).entries
    assert entry.paths == ("a.0", "b.0.0", "b.1")
    assert model["b"](torch.ones(())) == 4
    assert marks == ["new", "new"]
    root = Doubled()
    root.itself = nn.Sequential(root)  # a cycle ends
    report = tb.accelerate(root)
    assert report.entries[0].paths == ("",)
    assert repr(report) == "<Doubled: 1 swapped>"  # its name before


def test_threads_that_accelerate_one_model_swap_each_layer_once() -> None:
    def slow(module: nn.Module, backend: str | None) -> known.Conversion:
        time.sleep(0.1)  # long enough for the other to plan the same
        return tb.Conversion(Added, {"marks": []})

    tb.register_layer(tb.KnownLayer("slow", "Doubled", lambda module: isinstance(module, Doubled), slow))
    model, reports = nn.Sequential(Doubled()), []
    threads = [threading.Thread(target=lambda: reports.append(tb.accelerate(model))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry.status for report in reports for entry in report.entries) == ["already", "swapped"]
    for report in reports:
        report.undo()
    assert type(model[0]) is Doubled


@pytest.mark.parametrize("how", ["copied", "from a file"])
def test_a_report_that_a_model_holds_is_copied_with_it_as_a_record_that_undoes_nothing(how: str) -> None:
    model = model_of()
    model.report = tb.accelerate(model)
    other = copy.deepcopy(model) if how == "copied" else pickle.loads(pickle.dumps(model))
    assert str(other.report) == str(model.report)
    assert other.report.swapped == model.report.swapped
    with pytest.raises(RuntimeError, match=r"this report is a copy and undoes nothing.*undo the report that accelerate returned"):
        other.report.undo()
    assert all(isinstance(layer, LamForward) for layer in (*model.layers, *other.layers))
    model.report.undo()
    assert [type(layer) is LamAfter for layer in (*model.layers, *other.layers)] == [True, True, False, False]


def test_a_swap_in_inference_mode_leaves_parameters_that_train() -> None:
    model, want = model_of(), model_of()
    with torch.inference_mode():
        tb.accelerate(model)
        model(X)
    assert not [name for name, parameter in model.named_parameters() if parameter.is_inference()]
    model(X).sum().backward()
    want(X).sum().backward()
    for got, was in zip(model.parameters(), want.parameters(), strict=True):
        assert (got.grad is None) == (was.grad is None)
        if got.grad is not None:
            assert (got.grad - was.grad).norm() <= 1e-4 * was.grad.norm() + 1e-6
    with torch.no_grad():
        model.layers[0].q_proj.weight.mul_(0.5)


def test_replicas_as_data_parallel_makes_them_run_on_our_ops_with_parameters_of_their_own() -> None:
    model = model_of().eval()
    want = model(X)
    tb.accelerate(model)
    model(X)
    modules = list(model.modules())
    made = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:  # as torch.nn.parallel.replicate does, which wants GPUs
        replica = made[id(module)]
        for name, child in module._modules.items():
            setattr(replica, name, made[id(child)])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.detach().clone())
    ran = old_calls(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    same(made[id(model)](X), want)
    assert old_calls(model) == ran


def test_a_graph_compiled_while_swapped_runs_the_old_forward_after_undo() -> None:
    model = model_of().eval()
    want, report = model(X), tb.accelerate(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        same(compiled(X), want)
        ran = old_calls(model)
        report.undo()
        same(compiled(X), want)
    assert old_calls(model) == ran + 2


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_a_swapped_model_says_what_to_type() -> None:
    model = model_of().eval()
    report = tb.accelerate(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record this call.*Use torch\.export.*after report\.undo\(\)"):
        torch.jit.trace(model, X, check_trace=False)
    report.undo()
    with torch.no_grad():  # what it says
        assert torch.equal(torch.jit.trace(model, X, check_trace=False)(X), model(X))


def test_a_projection_whose_bias_is_no_tensor_is_told() -> None:
    class Quantized(nn.Identity):
        out_features = 32

        def bias(self) -> None:
            """A method, as of torch's dynamically quantized Linear."""

    model = model_of().eval()
    tb.accelerate(model)
    model.layers[0].g_proj = Quantized()
    with pytest.raises(TypeError, match=r"g_proj is a .*Quantized, whose bias is no tensor but a method; leave the layer's projections"):
        model(X)


def test_a_layer_that_got_another_class_since_is_not_undone_and_neither_are_the_others() -> None:
    model = model_of()
    report = tb.accelerate(model)
    parametrize.register_parametrization(model.layers[1], "slow_decay_bias", nn.Identity())
    with pytest.raises(RuntimeError, match=r"layers\.1 was TitansLamAfter and is ParametrizedTitansLamAfter.*nothing was undone"):
        report.undo()
    assert isinstance(model.layers[0], LamForward)
    parametrize.remove_parametrizations(model.layers[1], "slow_decay_bias")
    report.undo()
    assert {type(layer) for layer in model.layers} == {LamAfter}


def test_a_step_that_raises_leaves_the_model_as_it_was(marks: list[str]) -> None:
    def settle(module: nn.Module) -> None:
        if len(marks) == 1:
            raise ZeroDivisionError
        marks.append("settled")

    tb.register_layer(doubled(marks, settle=settle))
    model = nn.Sequential(Doubled(), Doubled())
    with pytest.raises(ZeroDivisionError):
        tb.accelerate(model)
    assert [(type(layer), "marks" in layer.__dict__) for layer in model] == [(Doubled, False)] * 2
    assert marks == ["settled"]


# --- what the report and the errors say


def test_where_nothing_is_known_strict_says_what_was_looked_for_and_what_is_there() -> None:
    class EnhancedHierarchicalDeltaNet2(nn.Module):
        pass

    model = nn.Sequential(EnhancedHierarchicalDeltaNet2(), nn.Linear(2, 2), nn.Sequential(Doubled()))
    with pytest.raises(tb.AccelerateError) as raised:
        tb.accelerate(model)
    told = str(raised.value)
    assert all(f"{layer.name}: {layer.seeks}" in told for layer in known.known_layers())
    assert "EnhancedHierarchicalDeltaNet2 (1, like EnhancedHierarchicalDeltaNet), Doubled (1)" in told
    assert "Linear" not in told.split("Its own classes")[1]
    report = tb.accelerate(model, strict=False)
    assert report.entries == ()
    assert str(report) == "Sequential: nothing swapped."


def test_strict_swaps_all_or_nothing_and_otherwise_the_report_has_every_reason(marks: list[str]) -> None:
    model = nn.Sequential(Doubled(), Doubled("too wide+too old"), Doubled("too wide+too old"), Doubled("blue"))
    with pytest.raises(tb.AccelerateError) as raised:
        tb.accelerate(model)
    assert "1 other layer could be" in str(raised.value)
    assert "1, 2, Doubled: too wide; too old" in str(raised.value)
    assert "3, Doubled: blue" in str(raised.value)
    assert {type(layer) for layer in model} == {Doubled}
    report = tb.accelerate(model, strict=False)
    assert [entry.reasons for entry in report.refused] == [("too wide", "too old"), ("too wide", "too old"), ("blue",)]
    assert isinstance(model[0], Added)
    assert repr(report) == "<Sequential: 1 swapped, 3 refused>"


def raw(part: nn.Module, dtype: torch.dtype = torch.int8) -> Tensor:
    """Its weight as a quantizer leaves it, without the scale, which comes back."""
    scale = part.weight.detach().abs().max() / 100
    part.weight = nn.Parameter((part.weight.detach() / scale).round().to(dtype), requires_grad=False)
    return scale


def test_a_layer_of_raw_weights_is_refused_with_their_names() -> None:
    model = model_of().eval()
    for part in model.layers[0].modules():
        if isinstance(part, nn.Linear):
            raw(part)
    model.layers[1].slow_decay_bias = nn.Parameter(torch.ones_like(model.layers[1].slow_decay_bias, dtype=torch.int32), requires_grad=False)
    raw(model.layers[1].q_proj, torch.float8_e4m3fn)
    held = model.layers[1].k_proj.weight.detach().to(torch.int8)
    del model.layers[1].k_proj.weight
    model.layers[1].k_proj.register_buffer("weight", held)
    with pytest.raises(tb.AccelerateError, match=r"layers\.0, LamAfter: q_proj\.weight, k_proj\.weight, .* and \d+ more are raw torch\.int8"):
        tb.accelerate(model)
    first, second = tb.accelerate(model, strict=False).refused
    assert len(first.reasons) == 1
    assert "by a quantizer that leaves these parts out or puts modules of its own in the projections' place" in first.reasons[0]
    assert [reason.split(", and nothing")[0] for reason in second.reasons] == [
        "slow_decay_bias is raw torch.int32", "q_proj.weight is raw torch.float8_e4m3fn", "k_proj.weight is raw torch.int8"
    ]  # fmt: skip
    assert {type(layer) for layer in model.layers} == {LamAfter}


def test_a_script_inside_a_layer_has_no_forward_of_torchs_to_look_at() -> None:
    layer = nn.Sequential(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), nn.Linear(2, 2))
    assert raw_weights(layer) == ()
    raw(layer[1])
    assert raw_weights(layer)[0].startswith("1.weight is raw torch.int8")


def test_raw_weights_that_are_scaled_by_what_calls_them_are_swapped() -> None:
    class Scaled(nn.Linear):
        """As a quantizer's module."""

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight * self.scale)

    model = model_of().eval()
    by_class, by_hook = model.layers[0].q_proj, model.layers[0].o_proj
    by_class.__class__ = Scaled
    by_class.scale, scale = raw(by_class), raw(by_hook)
    by_hook.forward = lambda x: nn.functional.linear(x, by_hook.weight * scale)
    with torch.no_grad():
        want = model(X)
        assert len(tb.accelerate(model).swapped) == 2
        same(model(X), want)


def test_the_table_names_every_layer_its_classes_and_what_to_know(marks: list[str]) -> None:
    tb.register_layer(doubled(marks, notes=("it is halved in between",)))
    model = nn.Sequential(*(Doubled() for _ in range(5)), Doubled("blue"))
    tb.accelerate(model[4])
    first, titles, *rows = str(tb.accelerate(model, strict=False)).splitlines()
    assert first == "Sequential: 4 swapped, 1 already, 1 refused."
    assert titles.split() == ["where", "was", "is", "what", "to", "know"]
    assert [row.split("  ")[0] for row in rows] == ["0 ... 3 (4 layers)", "4", "5"]
    assert [word in row for row, word in zip(rows, ("it is halved in between", "TitansDoubled (already)", "refused"), strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"model": [nn.Linear(2, 2)]}, TypeError, "got list"),
        ({"strick": True}, TypeError, r"unknown keyword 'strick'; known: 'strict', 'backend'"),
        ({"strict": 1}, TypeError, "strict must be True or False"),
        ({"backend": "trition"}, tb.UnknownNameError, "triton"),
        ({"backend": ["eager"]}, tb.UnknownNameError, r"unknown backend \['eager'\]"),
    ],
)
def test_wrong_arguments_are_told_at_once(given: dict[str, object], error: type[Exception], told: str) -> None:
    model = nn.Sequential(Doubled())
    with pytest.raises(error, match=told):
        tb.accelerate(**{"model": model, **given})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("triton",), "got 'triton' besides; type accelerate(model, backend='triton')"),
        ((False,), "got False besides; type accelerate(model, strict=False)"),
        ((False, "eager"), "got False, 'eager' besides; type accelerate(model, strict=False, backend='eager')"),
        ((nn.Linear(2, 2),), "got a Linear besides; type accelerate(model, strict=..., backend=...)"),
        (("eager", "triton"), "got 'eager', 'triton' besides; type accelerate(model, strict=..., backend=...)"),
    ],
)
def test_what_is_given_by_place_is_told_its_keyword(marks: list[str], given: tuple[object, ...], told: str) -> None:
    model = nn.Sequential(Doubled())
    with pytest.raises(TypeError, match=re.escape(f"accelerate: it takes model by place and nothing else, {told}")):
        tb.accelerate(model, *given)
    assert type(model[0]) is Doubled


# --- a backend that has not everything


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets TITANS_BACKENDS_FORCE; an empty name takes it away."""

    def forced(name: str) -> None:
        monkeypatch.setenv("TITANS_BACKENDS_FORCE", name)
        tb.reset()

    yield forced
    monkeypatch.undo()
    tb.reset()


@pytest.mark.slow
def test_a_switch_that_would_make_every_call_raise_is_told_at_the_swap_and_by_the_call(force: Callable[[str], None]) -> None:
    pytest.importorskip("numba", reason="numba is not installed")
    model, x = model_of().eval(), X[:, :64]
    with torch.no_grad():
        want = model(x)
    force("numba_cpu")
    told = "TITANS_BACKENDS_FORCE=numba_cpu forces every op, and 'numba_cpu' has no qkv_prepare, gated_rms_norm, chunk_flux, which this layer calls; "
    with pytest.raises(tb.AccelerateError, match=re.escape(f"{told}unset it, and type accelerate(model, backend='numba_cpu')")):
        tb.accelerate(model)
    assert "qkv_prepare" in str(tb.accelerate(model, strict=False))
    assert [type(layer) for layer in model.layers] == [LamAfter] * 2
    force("")
    with torch.no_grad(), tb.accelerate(model, backend="numba_cpu"):  # what the error says to type
        same(model(x), want)
    tb.accelerate(model)
    ran = old_calls(model)
    force("numba_cpu")
    told = "TITANS_BACKENDS_FORCE forces every op; accelerate(model, backend='numba_cpu') and get_op(name, backend='numba_cpu') force those that it has. "
    with torch.no_grad(), pytest.raises(tb.BackendRefusedError, match=re.escape(told)):
        model(x)
    force("eager")
    with torch.no_grad():
        same(model(x), want)
    assert old_calls(model) == ran
    assert len(tb.accelerate(model_of()).swapped) == 2, "eager has every op"


def test_a_layer_forced_past_the_switch_is_swapped(force: Callable[[str], None], marks: list[str]) -> None:
    tb.register_layer(doubled(marks, ops=("gated_rms_norm",)))
    force("numba_cpu")
    with pytest.raises(tb.AccelerateError, match="'numba_cpu' has no gated_rms_norm"):
        tb.accelerate(nn.Sequential(Doubled()))
    assert tb.accelerate(nn.Sequential(Doubled()), backend="eager").swapped  # a call's own backend goes before the switch


@pytest.mark.parametrize(
    ("backend", "lost", "told"),
    [
        ("fla", "packages", "the package fla is not installed: pip install 'fla-core"),
        ("cupy", "device", "it runs on cuda alone, and torch sees no such device here"),
        ("numba_cpu", "switch", "it is disabled by TITANS_BACKENDS_DISABLE"),
        ("eager", "module", "importing titans_backends.backends.eager"),
    ],
)
def test_a_backend_that_no_call_could_run_on_is_refused_at_the_swap(monkeypatch: pytest.MonkeyPatch, backend: str, lost: str, told: str) -> None:
    monkeypatch.setattr(registry, "_installed", lambda package: lost != "packages")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: lost != "device")
    if lost == "module":
        monkeypatch.setattr(registry, "_import", lambda name: (None, f"importing {name} raised ImportError: half of it is missing", ""))
    if lost == "switch":
        monkeypatch.setenv("TITANS_BACKENDS_DISABLE", backend)
        switches.reload()
    try:
        model = nn.Sequential(Doubled())
        tb.register_layer(doubled([], ops=("gated_delta_rule",)))
        with pytest.raises(tb.AccelerateError) as raised:
            tb.accelerate(model[0], backend=backend)
        assert f"backend {backend!r} cannot run here: {told}" in str(raised.value)
        assert "name another that could (" in str(raised.value)
        assert not tb.accelerate(model[0], backend=backend, strict=False).swapped
        assert type(model[0]) is Doubled
    finally:
        monkeypatch.undo()
        switches.reload()


def test_a_switch_that_names_what_is_not_there_is_told_at_the_swap(monkeypatch: pytest.MonkeyPatch, force: Callable[[str], None]) -> None:
    tb.register_layer(doubled([], ops=("gated_delta_rule",)))
    force("fla")
    monkeypatch.setattr(registry, "_installed", lambda package: package != "einops")
    told = "TITANS_BACKENDS_FORCE=fla forces every op, and 'fla' cannot run here: .*the package einops is not installed.*; unset it"
    with pytest.raises(tb.AccelerateError, match=told):
        tb.accelerate(nn.Sequential(Doubled()))
    assert tb.accelerate(nn.Sequential(Doubled()), backend="eager").swapped  # its only op goes before the switch


def test_training_on_a_backend_without_a_backward_says_what_to_type() -> None:
    pytest.importorskip("numba", reason="numba is not installed")
    model = model_of()
    tb.accelerate(model, backend="numba_cpu")
    with pytest.raises(
        tb.BackendRefusedError, match=r"it has only forward\. Without gradients it runs: with torch\.no_grad\(\): .* to train, force another"
    ):
        model(X)
    with torch.no_grad():  # what it says
        assert model.eval()(X[:, :64]).isfinite().all()
    with pytest.raises(tb.BackendRefusedError) as raised:  # not of a call that runs nowhere on it
        tb.get_op("gated_rms_norm", backend="numba_cpu")(*torch.ones(2, 1, 2, 2, 4), torch.ones(4, requires_grad=True))
    assert "no_grad" not in str(raised.value)


# --- a swap that something takes off


def test_a_layer_that_another_forward_was_put_on_since_is_lost_and_told(marks: list[str]) -> None:
    model = nn.Sequential(Doubled(), Doubled())
    report = tb.accelerate(model)
    assert (report.lost, "lost" in str(report)) == ((), False)

    def tripled(self: nn.Module, x: Tensor) -> Tensor:
        return 3 * x

    model[1].forward = types.MethodType(tripled, model[1])  # as kernels.kernelize does
    assert model(torch.ones(1)).item() == 6
    (lost,) = report.lost
    assert (lost.path, lost.status) == ("1", "lost")
    assert "tripled (as transformers' kernelize() gives), which is called in place of ours; `del module.forward` takes it off" in lost.reasons[0]
    assert repr(report) == "<Sequential: 2 swapped, 1 lost since>"
    assert "TitansDoubled (lost)" in str(report)
    with pytest.raises(tb.AccelerateError, match="it was swapped already, and since then its instance got a `forward` of its own"):
        tb.accelerate(model)
    del model[1].forward
    assert not report.lost
    assert model(torch.ones(1)).item() == 4
    assert [entry.status for entry in tb.accelerate(model).entries] == ["already", "already"]
    model[1].__class__ = type("Again", (type(model[1]),), {"forward": tripled})
    assert "Again, whose forward is called in place of ours" in report.lost[0].reasons[0]


def test_what_is_hung_on_a_part_that_is_not_called_is_told_by_the_table() -> None:
    model = model_of()
    report = tb.accelerate(model)
    clean, called = str(report), []
    model.layers[1].q_conv1d.register_forward_hook(lambda *args: called.append(1))
    model(X)
    assert not called
    told = " ".join(str(report).split())
    assert "q_conv1d has 1 of _forward_hooks" in told
    assert "it was put there since, and is not called" in told
    assert not report.lost
    report.undo()
    assert clean.splitlines()[1:] == str(report).splitlines()[1:]


def test_what_wraps_our_forward_and_says_so_has_not_lost_it(marks: list[str]) -> None:
    model = nn.Sequential(*(Doubled() for _ in range(4)))
    report = tb.accelerate(model)
    ours = [layer.forward for layer in model]
    model[0].forward = functools.wraps(ours[0])(lambda *args: ours[0](*args))
    model[1].forward = functools.partial(ours[1])
    model[2].forward = torch.compile(ours[2], backend="eager")
    model[3].__class__ = type("Sharded", (type(model[3]),), {})
    assert not report.lost
    assert len(tb.accelerate(model).already) == 4


# --- layers of one's own


def test_the_latest_that_accepts_is_taken_and_a_layer_of_a_built_in_name_replaces_it() -> None:
    first, second = [], []
    tb.register_layer(doubled(first, "first"))
    tb.register_layer(doubled(second, "second"))
    model = nn.Sequential(Doubled())
    assert tb.accelerate(model).entries[0].layer == "second"
    tb.register_layer(tb.KnownLayer("second", "", lambda module: isinstance(module, Doubled), lambda module, backend: refused("never")))
    assert tb.accelerate(nn.Sequential(Doubled())).entries[0].layer == "first"
    tb.register_layer(tb.KnownLayer("lam", "", lambda module: False, lambda module, backend: refused("never")))
    assert not tb.accelerate(model_of(), strict=False).entries


def test_a_layer_that_is_none_and_a_conversion_that_is_none_are_told() -> None:
    with pytest.raises(TypeError, match=r"KnownLayer\(name"):
        tb.register_layer(Doubled)
    tb.register_layer(tb.KnownLayer("odd", "", lambda module: isinstance(module, Doubled), lambda module, backend: None))
    with pytest.raises(TypeError, match="odd's convert returned None"):
        tb.accelerate(Doubled())


def test_what_the_new_forward_would_overwrite_or_could_not_be_is_refused(marks: list[str]) -> None:
    held, own, parametrized = Doubled(), Doubled(), Doubled()
    held.marks = "mine"
    own.forward = lambda x: x
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    report = tb.accelerate(nn.ModuleList([held, own, parametrized]), strict=False)
    for entry, told in zip(
        report.refused, ("names that the new forward uses: marks", "holds a `forward` of its own", "has parametrizations"), strict=True
    ):
        assert told in entry.reasons[0]


# --- what stays: hooks, parameters, copies, dtypes


def test_odd_classes_are_swapped_or_refused_and_never_half(marks: list[str]) -> None:
    class Aside(Doubled):
        def __call__(self, x: Tensor) -> Tensor:
            return Doubled.forward(self, x)

    class Around(Doubled):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x)

    class Final(Doubled):
        def __init_subclass__(cls) -> None:
            raise RuntimeError("nobody derives from me")

    class Frozen(Doubled):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "__class__":
                raise AttributeError(name)
            super().__setattr__(name, value)

    model = nn.Sequential(Aside(), Around(), Final(), Frozen())
    report = tb.accelerate(model, strict=False)
    assert [(entry.path, entry.status) for entry in report.entries] == [("0", "refused"), ("1", "swapped"), ("2", "refused"), ("3", "swapped")]
    (aside,), (final,) = report.entries[0].reasons, report.entries[2].reasons
    assert re.search(r"a `__call__` of its own, .*Aside\.__call__, which does not go through .*super\(\)\.__call__", aside)
    assert "RuntimeError: nobody derives from me" in final
    assert model(torch.ones(())) == 16
    assert len(marks) == 2
    report.undo()
    assert [type(layer) for layer in model] == [Aside, Around, Final, Frozen]


def test_hooks_on_the_layer_stay_and_run() -> None:
    model, seen = model_of(), []
    model.layers[0].register_forward_hook(lambda module, args, out: seen.append("after"))
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.append("before"))
    with tb.accelerate(model):
        model.layers[0].register_full_backward_hook(lambda module, grads, outs: seen.append("backward"))
        model(X).sum().backward()
    assert seen == ["before", "after", "backward"]


def test_parameters_stay_the_same_objects_under_the_same_names_and_an_optimizer_moves_them() -> None:
    model = model_of().double().train()
    twin = copy.deepcopy(model)
    before, values = dict(model.named_parameters()), {name: t.clone() for name, t in model.state_dict().items()}
    optimizers = [torch.optim.AdamW(each.parameters(), 1e-2) for each in (model, twin)]  # made before
    tb.accelerate(model)
    assert list(model.state_dict()) == list(values)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in values.items())
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    for _ in range(3):
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            each(X.double()).square().mean().backward()
            optimizer.step()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {name for name, p in twin.named_parameters() if p.grad is None}
    for name, got in model.named_parameters():
        torch.testing.assert_close(got, dict(twin.named_parameters())[name], rtol=1e-6, atol=1e-8, msg=lambda told, name=name: f"{name}: {told}")
    assert not torch.equal(before["layers.0.q_proj.weight"], values["layers.0.q_proj.weight"])
    assert old_calls(model) == 0
    torch.testing.assert_close(model.eval()(X.double()), twin.eval()(X.double()), rtol=1e-6, atol=1e-8)


def test_parameters_that_are_views_of_one_memory_stay_there() -> None:
    model, twin = model_of(), model_of()
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(flat, model.parameters())
    tb.accelerate(model)
    flat.mul_(1.25)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.25)
        same(model(X), twin(X))


@pytest.mark.parametrize("when", ["before", "after"])
def test_it_works_before_and_after_to(when: str) -> None:
    model = model_of()
    want = copy.deepcopy(model).double()(X.double())
    if when == "before":
        tb.accelerate(model)
    model.to(torch.float64)
    if when == "after":
        tb.accelerate(model)
    ran = old_calls(model)
    with torch.no_grad():
        torch.testing.assert_close(model(X.double()), want, rtol=1e-10, atol=1e-10)
        standing = [layer._standing.joint for layer in model.layers]
    assert all(joint is not None and joint.dtype == torch.float64 for joint in standing), "the projections are no longer one product"
    assert old_calls(model) == ran


def test_a_layer_whose_projection_is_wrapped_after_the_swap_runs_the_wrapper() -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
            self.down = nn.Parameter(torch.randn(4, base.in_features))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + nn.functional.linear(x, self.base.weight[:, :4] @ self.down)

    model, plain = model_of(), model_of()
    tb.accelerate(model)
    torch.manual_seed(1)
    model.layers[0].k_proj = Adapter(model.layers[0].k_proj)
    torch.manual_seed(1)
    plain.layers[0].k_proj = Adapter(plain.layers[0].k_proj)
    same(model(X), plain(X))
    assert tb.accelerate(plain).swapped, "a wrapped projection is one of a LAM layer's"
    same(model(X), plain(X))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_swapped_and_has_its_own_parameters(how: str) -> None:
    model = model_of()
    tb.accelerate(model)
    if how == "deepcopy":
        made = copy.deepcopy(model)
    elif how == "pickle":
        made = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        made = torch.load(file, weights_only=False)
    assert type(made.layers[0]) is type(model.layers[0])
    with torch.no_grad():
        same(made(X), model(X))
        assert made.layers[0]._standing.of([made.layers[0].q_proj.weight, made.layers[0].k_proj.weight]) is not None
        made.layers[0].q_proj.weight.zero_()
    assert model.layers[0].q_proj.weight.any()
    assert old_calls(made) == 0


# --- accelerate-the-library's hooks


@pytest.mark.parametrize("when", ["before", "after"])
def test_device_maps_of_accelerate(when: str) -> None:
    library = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = model_of()
    want, ran = model(X), old_calls(model)
    report = tb.accelerate(model) if when == "before" else None
    places = {"layers.0": "cpu", "layers.1": "cpu", "norms": "cpu", "head": "cpu"}
    library.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    report = report or tb.accelerate(model)
    assert hasattr(model.layers[0], "_hf_hook")
    same(model(X), want)
    assert old_calls(model) == ran
    for hooked in (True, False):
        if not hooked:
            library.hooks.remove_hook_from_submodules(model)
            report = tb.accelerate(model)
            same(model(X), want)
            assert old_calls(model) == ran
        report.undo()
        same(model(X), want)
        ran += 2
        assert old_calls(model) == ran


def test_offloaded_parts_that_an_op_stands_in_for_are_refused_or_told() -> None:
    library = pytest.importorskip("accelerate", reason="accelerate is not installed")
    offloaded = library.cpu_offload(model_of(), "cpu")
    report = tb.accelerate(offloaded, strict=False)
    assert not report.swapped
    assert all("q_conv1d.conv has a hook of accelerate's" in " ".join(entry.reasons) for entry in report.refused)
    model = model_of()
    want = model(X)
    tb.accelerate(model)
    with pytest.raises(RuntimeError, match=r"preload_module_classes=\['TitansLamAfter'\]"):
        library.cpu_offload(copy.deepcopy(model), "cpu")(X)
    preloaded = library.cpu_offload(model, "cpu", preload_module_classes=["TitansLamAfter"])
    same(preloaded(X), want)
    assert old_calls(preloaded) == 2  # of the first call


# --- compilers


@pytest.mark.parametrize("when", ["before", "after", "in place"])
def test_one_graph_under_torch_compile(when: str) -> None:
    model = model_of(layers=1)
    want, calls = model(X), []
    if when == "before":
        tb.accelerate(model)
    if when == "in place":
        model.compile(fullgraph=True, backend="eager")
        compiled = model
        compiled(X)
    else:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if when == "before" else "eager")
    if when != "before":
        report = tb.accelerate(compiled)
        assert [entry.path for entry in report.swapped] == [f"{'_orig_mod.' if when == 'after' else ''}layers.0"]
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, out: calls.append(type(module).__name__))
    ran = old_calls(model)
    same(compiled(X), want)
    assert old_calls(model) == ran
    assert calls
    assert set(calls) == {"TitansLamAfter"}
    compiled(X).sum().backward()
    assert model.layers[0].q_proj.weight.grad.any()
    if when == "in place":
        report.undo()
        same(compiled(X), want)
        assert old_calls(model) > ran, "the graph of the new forward ran after undo"


def test_a_swapped_model_is_exported() -> None:
    model = model_of(layers=1)
    want = model(X)
    tb.accelerate(model)
    same(torch.export.export(model, (X,)).module()(X), want)
    assert old_calls(model) == 1


def test_a_compiled_layer_is_swapped_inside_of_its_wrapper(marks: list[str]) -> None:
    tb.register_layer(replace(doubled(marks), recognise=lambda module: hasattr(module, "refuses")))  # the wrapper has it too
    model = nn.Sequential(torch.compile(Doubled(), backend="eager"))
    (entry,) = tb.accelerate(model).entries
    assert (entry.path, entry.status) == ("0._orig_mod", "swapped")
    assert model(torch.ones(())) == 2
    assert marks == ["new"]


# --- processes


@pytest.mark.slow
def test_ddp_and_fsdp2_on_two_processes_train_as_one() -> None:
    script = Path(__file__).with_name("accelerated_on_two_processes.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["lam", *(["qwen3_5"] if importlib.util.find_spec("transformers") else [])]


def test_no_package_is_imported_for_a_model_that_has_nothing_of_it() -> None:
    program = """
import sys
import titans_backends as tb
assert not any(name.startswith(("titans_backends.integrations", "titans_backends.nn")) for name in sys.modules), "the import is not light"
from tests.lam_layer import LamModel
report = tb.accelerate(LamModel())
assert len(report.swapped) == 2
print(sorted({name.split(".")[0] for name in sys.modules} & {"transformers", "fla", "accelerate", "triton", "cupy", "rich"}), "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).parent.parent)
    assert done.stdout.split("\n")[0] == "[] False", done.stdout + done.stderr


def test_what_the_page_shows_runs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "drop-in.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    model = model_of()
    scope: dict[str, object] = {"model": model, "x": X}
    for block in blocks:
        exec(compile(block, "drop-in.md", "exec"), scope)
    same(scope["y"], model(X))
    assert scope["report"].swapped[0].layer == "mine"
    assert scope["report"].undone
    for field in fields(Entry):
        assert f"`{field.name}`" in page

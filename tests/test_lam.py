"""The original LAM layer, swapped: its numbers, its calling convention, its cache; which version it is, and who only looks like it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import titans_backends as tb
from tests.golden_table import Ledger
from tests.lam_layer import LamAfter, LamBefore, LamLayer, randomized
from tests.test_accelerate import only_built_in as only_built_in  # a fixture of these tests too
from titans_backends.integrations.lam import lam_layer

KINDS = pytest.mark.parametrize("kind", [LamAfter, LamBefore])


def layer_of(kind: type[LamLayer] = LamAfter, seed: int = 0, **more: object) -> LamLayer:
    torch.manual_seed(seed)
    return randomized(kind(32, 2, **more).double())


def tokens(seq_len: int, seed: int = 1) -> Tensor:
    return torch.randn(2, seq_len, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def refusal(layer: nn.Module) -> str:
    (entry,) = tb.accelerate(layer, strict=False).refused
    return "; ".join(entry.reasons)


@pytest.mark.golden("lam_*_layer_*")
def test_a_layer_of_the_golden_files_is_the_original_before_and_after(golden_file: Path) -> None:
    stored = load_file(golden_file)
    layer = (LamAfter if "after" in golden_file.name else LamBefore)(64, 2).eval()
    layer.load_state_dict({name.removeprefix("sd."): t for name, t in stored.items() if name.startswith("sd.")}, strict=True)
    for dtype in (torch.float64, torch.float32):
        layer.to(dtype)
        ledger = Ledger.of("layer", dtype)
        for swapped in (False, True):
            report = tb.accelerate(layer) if swapped else None
            with torch.no_grad():
                y, _, past, loss = layer(stored["x"].to(dtype), use_cache=True)
            ledger.add(f"y, {swapped=}", y, stored["y"])
            ledger.add(f"S_slow, {swapped=}", past[0]["recurrent_state"][1], stored["S_slow"])
            ledger.add(f"loss, {swapped=}", loss.reshape(1), stored["ortho_loss"])
            if report is not None:
                report.undo()
        ledger.settle()
    assert layer.calls == 2


@KINDS
@pytest.mark.parametrize("seq_len", [5, 63, 64, 100, 129, 192, 256])
def test_every_length_gives_the_layers_own_outputs_returns_and_cache(kind: type[LamLayer], seq_len: int) -> None:
    layer, x = layer_of(kind, layer_idx=2, expand_v=2.0), tokens(seq_len)
    mask = torch.ones(2, seq_len)
    for use_cache, past in ((False, None), (True, None), (True, "list"), (True, "dict")):
        found = []
        for swapped in (False, True):
            given = {"list": [{"kept": 1}], "dict": {"conv_state": (1, 2, 3)}}.get(past)
            with torch.no_grad():
                if swapped:
                    with tb.accelerate(layer):
                        found.append((layer(x, mask, given, use_cache, anything="ignored"), given))
                else:
                    found.append((layer(x, mask, given, use_cache, anything="ignored"), given))
        (want, want_given), (got, got_given) = found
        assert type(got) is type(want) is tuple
        torch.testing.assert_close(got[0], want[0], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(got[1:], want[1:], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(got_given, want_given, rtol=1e-8, atol=1e-10)
        assert got_given is None or got[2] is got_given


def gradients(layer: LamLayer, x: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    torch.manual_seed(5)
    y, _, _, loss = layer(x)
    (y.square().mean() + 0.3 * loss).backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def test_the_current_version_trains_by_the_new_forward() -> None:
    layer, x = layer_of(LamAfter).train(), tokens(130)
    want = gradients(layer, x)
    ran = layer.calls
    tb.accelerate(layer)
    torch.testing.assert_close(gradients(layer, x), want, rtol=1e-7, atol=1e-10)
    assert layer.calls == ran


def test_the_earlier_version_keeps_its_dropout_unless_told_otherwise() -> None:
    layer, x = layer_of(LamBefore).train(), tokens(192)
    want = gradients(layer, x)
    report = tb.accelerate(layer)
    assert "in training its own forward runs" in str(report)
    torch.testing.assert_close(gradients(layer, x), want, rtol=1e-9, atol=1e-12)
    assert layer.calls == 2
    report.undo()
    tb.register_layer(lam_layer(train_without_dropout=True))
    assert "trains without the original's dropout" in str(tb.accelerate(layer))
    got = gradients(layer, x)
    assert layer.calls == 2
    assert got.keys() == want.keys()
    assert (got["o_proj.weight"] - want["o_proj.weight"]).abs().max() > 1e-6


@KINDS
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_forced_backend_reaches_every_op(kind: type[LamLayer], use_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = layer_of(kind), []

    def recording(name: str, backend: str | None = None) -> object:
        seen.append((name, backend))
        return tb.get_op(name, backend=backend)

    report = tb.accelerate(layer, backend="eager")
    for name, where in list(sys.modules.items()):
        if name.startswith(("titans_backends.nn.", "titans_backends.integrations.")) and hasattr(where, "get_op"):
            monkeypatch.setattr(where, "get_op", recording)
    layer(tokens(70), use_cache=use_cache)
    assert {backend for _, backend in seen} == {"eager"}
    assert {"qkv_prepare", "gated_rms_norm", "dual_core" if kind is LamAfter else "coupled_core"} <= {name for name, _ in seen}
    assert tb.accelerate(layer, backend="eager").already
    with pytest.raises(tb.AccelerateError, match="already, with backend='eager'; undo the report that swapped it first"):
        tb.accelerate(layer, backend="triton")
    report.undo()


def test_a_backend_without_some_of_the_ops_gets_those_it_has_and_the_report_says_which_it_has_not() -> None:
    layer = layer_of()
    report = tb.accelerate(layer, backend="numba_cpu")
    assert "backend 'numba_cpu' has no qkv_prepare, gated_rms_norm, chunk_flux: those are chosen as ever" in " ".join(str(report).split())
    assert (layer.ops.op("dual_core").backend, layer.ops.op("qkv_prepare").backend) == ("numba_cpu", None)
    (entry,) = tb.accelerate(layer_of(LamBefore), backend="numba_cpu", strict=False).refused
    assert "has no coupled_core, which is its memory; eager, triton have" in entry.reasons[0]


# --- which version, and who only looks like it


def test_each_class_is_compared_once_and_neither_the_layer_nor_the_random_state_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fresh(LamAfter):
        compared = 0

        def memory(self, *args: Tensor, wanted: bool) -> object:
            type(self).compared += 1
            return super().memory(*args, wanted=wanted)

    model = nn.ModuleList(layer_of(Fresh, seed=seed) for seed in range(3))
    model[0].q_conv1d.register_forward_pre_hook(lambda *_: pytest.fail("a hook of the module ran"))
    before, random = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    with torch.device("meta"):
        report = tb.accelerate(model[1:])
    assert Fresh.compared > 0
    compared = Fresh.compared
    assert [entry.notes[0].startswith("mode='flat', told by its outputs") for entry in report.swapped] == [True, True]
    assert "q_conv1d has 1 of _forward_pre_hooks" in refusal(model[0])
    model[0].q_conv1d._forward_pre_hooks.clear()
    tb.accelerate(model)
    assert Fresh.compared == compared
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert sum(layer.calls for layer in model) == 0


def test_a_class_that_computes_something_else_is_refused_with_how_far_it_is_and_what_is_odd() -> None:
    class Another(LamAfter):
        def memory(self, *args: Tensor, wanted: bool) -> object:
            o, states = super().memory(*args, wanted=wanted)
            return 1.001 * o + 0.001, states

    told = refusal(layer_of(Another))
    assert "computes neither of the original's versions" in told
    assert "use_delta_rule=False" in refusal(layer_of(LamBefore, use_delta_rule=False))
    assert tb.accelerate(layer_of(LamAfter, use_delta_rule=False)).swapped, "the current version accepts the option and ignores it"


def test_a_class_that_cannot_be_compared_is_refused_and_may_be_named() -> None:
    class OnCards(LamBefore):
        def memory(self, *args: Tensor, wanted: bool) -> object:
            if args[0].device.type == "cpu" and not self.allowed:
                raise RuntimeError("this runs on cards only")
            return super().memory(*args, wanted=wanted)

    layer, x = layer_of(OnCards), tokens(130)
    layer.allowed = True
    want = layer(x)[0]
    layer.allowed = False
    told = refusal(layer)
    assert "this runs on cards only" in told
    assert "lam_layer(mode='flat')" in told
    tb.register_layer(lam_layer(mode="loop"))
    assert "as lam_layer(mode=...) says; not compared" in str(tb.accelerate(layer))
    torch.testing.assert_close(layer(x)[0], want, rtol=1e-8, atol=1e-10)
    assert "use_delta_rule=False" in refusal(layer_of(OnCards, use_delta_rule=False))
    with pytest.raises(tb.UnknownNameError, match="flat, loop"):
        lam_layer(mode="dual")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda layer: setattr(layer, "q_proj", nn.Linear(32, 32).double()), "q_proj has (in_features, out_features, bias) = (32, 32, True)"),
        (lambda layer: setattr(layer, "extra", nn.Parameter(torch.ones(3))), "it has extra [3], which the original has not"),
        (lambda layer: layer.register_buffer("table", torch.ones(3)), "it has table [3], which the original has not"),
        (lambda layer: delattr(layer, "fast_decay_bias"), "it has no fast_decay_bias"),
        (lambda layer: setattr(layer.resonance_flux, "temp", nn.Parameter(torch.ones(3))), "resonance_flux.temp has shape [3], the original [2]"),
        (lambda layer: setattr(layer, "num_heads", 4), "its num_heads is 4 beside 2 rows of b_proj"),
        (lambda layer: layer.resonance_flux.flux_net[0].register_forward_hook(print), "resonance_flux.flux_net.0 has 1 of _forward_hooks"),
    ],
)
def test_another_structure_is_told_in_what(change: object, told: str) -> None:
    layer = layer_of()
    change(layer)
    assert told in refusal(layer)


def test_a_norm_with_a_hook_is_called_and_a_mask_of_another_shape_refused() -> None:
    layer, seen = layer_of(), []
    want = layer(tokens(70))[0]
    tb.accelerate(layer)
    layer.o_norm.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(layer(tokens(70))[0], want, rtol=1e-8, atol=1e-10)
    assert seen == [(2, 96, 2, 16)]
    original = layer.o_norm
    layer.o_norm = nn.Module()
    layer.o_norm.forward = lambda o, gate: 2 * original(o, gate)  # as an adapter wraps it
    torch.testing.assert_close(layer(tokens(70))[0], 2 * want, rtol=1e-8, atol=1e-10)
    wrapper = type("Wrapper", (nn.Module,), {"forward": lambda self, o, gate: 3 * original(o, gate), "weight": original.weight, "eps": original.eps})
    layer.o_norm = wrapper()
    torch.testing.assert_close(layer(tokens(70))[0], 3 * want, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[B, T\], got \(2, 1, 70\)"):
        layer(tokens(70), torch.ones(2, 1, 70))
    with pytest.raises(TypeError, match="past_key_values must be a list of dictionaries or a dictionary, got tuple"):
        layer(tokens(70), past_key_values=(), use_cache=True)


def test_a_plain_sixteen_bit_layer_runs_and_a_layer_without_memory_is_swapped_before_it_has_any() -> None:
    layer, x = layer_of(), tokens(100)
    want = layer(x)[0]
    tb.accelerate(layer)
    got = layer.bfloat16()(x.bfloat16())[0]
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).norm() < 0.1 * want.norm()
    with torch.device("meta"):
        empty = LamAfter(32, 2).eval()
    tb.accelerate(empty)
    empty.to_empty(device="cpu").double().load_state_dict(layer_of().state_dict())
    torch.testing.assert_close(empty(x)[0], want, rtol=1e-8, atol=1e-10)
    assert empty.calls == 0

"""Our ops as a backend of FLA's dispatch: which calls it takes, which it leaves to FLA with what reason, and that it can be undone.

FLA's modules are stood in for (`tests/fla_likeness.py`), so that its own functions can be seen to run; the last test asks the real one, where it is installed.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import titans_backends as tb
from tests import fla_likeness
from titans_backends import registry
from titans_backends.integrations import fla as ours

OWN = "chunk_gated_delta_rule"
"""What the stand-in's own function returns."""


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    made = fla_likeness.modules()
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield made
    for registration in registrations():
        registration.undo()


def registrations() -> list[ours.Registration]:
    from titans_backends.integrations.fla import registration

    return [] if registration._ACTIVE is None else [registration._ACTIVE]


def call(**changes: object) -> dict[str, object]:
    made = torch.Generator().manual_seed(0)
    x = {name: torch.randn(1, 12, 2, 8, generator=made) for name in "qkv"}
    x |= {"g": -torch.rand(1, 12, 2, generator=made), "beta": torch.rand(1, 12, 2, generator=made)}
    return {**x, "use_qk_l2norm_in_kernel": True, **changes}


def flas(**changes: object) -> object:
    return importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule(**call(**changes))


def test_flas_function_runs_on_us_until_undone(fla: dict[str, object]) -> None:
    assert flas() == OWN
    with ours.register_with_fla() as registration:
        o, state = flas(output_final_state=True)
        expected, after = ours.chunk_gated_delta_rule(**call(output_final_state=True))
        assert torch.equal(o, expected)
        assert torch.equal(state, after)
        assert dict(registration.calls) == {"chunk_gated_delta_rule": 1}
        assert not registration.refusals
        with ours.register_with_fla() as same:
            assert same is registration
        assert not isinstance(flas(), str)  # who asked first still has it
    assert flas() == OWN
    assert "undone" in str(registration)
    again = ours.register_with_fla()
    flas()
    assert (dict(registration.calls), dict(again.calls)) == ({OWN: 2}, {OWN: 1})


def test_it_says_what_fla_asks_nobody_for(fla: dict[str, object]) -> None:
    registration = ours.register_with_fla()
    assert registration.functions == ("chunk_gated_delta_rule",)
    assert registration.left == ("fused_recurrent_gated_delta_rule", "chunk_delta_rule", "fused_recurrent_delta_rule")
    assert "accelerate" in str(registration)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cp_context": object()}, "cp_context"),
        ({"typo": 1}, "unexpected keyword 'typo'"),
        ({"head_first": True}, "head_first"),
        ({"initial_state": torch.zeros(2, 2, 8, 8)}, "initial_state has shape"),
        ({"v": torch.zeros(1, 12, 3, 8)}, "v has H = 3"),
        (
            {"q": torch.zeros(1, 12, 2, 8, dtype=torch.int32), "k": torch.zeros(1, 12, 2, 8, dtype=torch.int32), "v": torch.zeros(1, 12, 2, 8).int()},
            "dtype",
        ),
    ],
)
def test_what_we_refuse_is_left_to_fla_with_our_reason(fla: dict[str, object], changes: dict[str, object], says: str) -> None:
    registration = ours.register_with_fla()
    assert flas(**changes) == OWN
    assert flas(**changes) == OWN
    ((reason, count),) = registration.refusals.items()
    assert says in reason
    assert count == 2
    assert fla["fla.backends"].gated.reasons == [reason, reason]
    assert not registration.calls


def test_a_backend_that_refuses_leaves_the_call_to_fla(fla: dict[str, object], plugin_backend) -> None:
    ran = plugin_backend("picky", supports=lambda signature, machine: tb.refused("not today") if signature.dim("T") > 20 else tb.ACCEPTED)
    registration = ours.register_with_fla(backend="picky")
    assert flas() != OWN
    assert len(ran) == 1
    long = {name: torch.randn(1, 24, 2, 8) for name in "qkv"} | {name: -torch.rand(1, 24, 2) for name in ("g", "beta")}
    assert flas(**long) == OWN
    assert "not today" in next(iter(registration.refusals))
    with pytest.raises(ValueError, match="undo"):
        ours.register_with_fla(backend="eager")
    assert ours.register_with_fla(backend="picky") is registration


def test_a_backend_that_could_take_no_call_is_refused_at_once(fla: dict[str, object], monkeypatch: pytest.MonkeyPatch, plugin_backend) -> None:
    plugin_backend("other", ops=("gated_rms_norm",))
    with pytest.raises(
        tb.BackendRefusedError, match=r"'other' can take none of FLA's calls here: it has neither .* \(it has gated_rms_norm\).*name another"
    ):
        ours.register_with_fla(backend="other")
    monkeypatch.setattr(registry, "_installed", lambda package: package != "cupy")
    with pytest.raises(tb.BackendRefusedError, match=r"'cupy' .*the package cupy is not installed: pip install"):
        ours.register_with_fla(backend="cupy")
    assert flas() == OWN, "FLA is asked nothing after the refusal"


def test_a_verdict_runs_nothing(fla: dict[str, object], plugin_backend) -> None:
    ran = plugin_backend("watched")
    registration = ours.register_with_fla(backend="watched")
    gates = {"use_gate_in_kernel": True, "A_log": torch.zeros(2), "use_beta_sigmoid_in_kernel": True}
    for changes in ({}, gates, {"initial_state": torch.zeros(1, 2, 8, 8, dtype=torch.float64)}, {"q": torch.zeros(1, 12, 2, 8).half()}):
        assert registration.verify(OWN, (), call(**changes)) == (True, None)
    assert not ran
    assert not registration.calls


def test_where_only_eager_would_take_it_on_a_gpu_fla_keeps_it() -> None:
    from dataclasses import replace

    from titans_backends.integrations.fla.functions import READERS
    from titans_backends.integrations.fla.verdicts import _choice, _on_choice

    choice = _choice(READERS[OWN](**{name: value.double() if isinstance(value, torch.Tensor) else value for name, value in call().items()}), None)
    assert choice.pair.forward.backend == "eager"
    assert _on_choice(choice)
    on_gpu = replace(choice, machine=replace(choice.machine, kind="cuda"))
    assert "on a GPU only eager takes this call" in str(_on_choice(on_gpu))
    assert _on_choice(replace(on_gpu, origin="forced"))
    assert _on_choice(replace(on_gpu, origin="tuned"))


def test_training_runs_on_us_too(fla: dict[str, object]) -> None:
    ours.register_with_fla()
    g = (-torch.rand(1, 12, 2)).requires_grad_()
    o, _ = flas(g=g)
    o.sum().backward()
    assert g.grad is not None
    assert g.grad.abs().sum() > 0


def test_a_dispatch_that_is_switched_off_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fla_likeness.modules(dispatched=False).items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(RuntimeError, match="FLA_DISABLE_BACKEND_DISPATCH"):
        ours.register_with_fla()
    assert not registrations()


def test_without_fla_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setitem(sys.modules, "fla.backends", None)
    with pytest.raises(ImportError, match=r"pip install 'flash-linear-attention>=0.6'"):
        ours.register_with_fla()


def test_an_fla_whose_import_raises_is_told_as_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").write_text("raise OSError('libgone.so')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"installed and cannot be imported: OSError: libgone\.so"):
        ours.register_with_fla()


def test_one_call_is_one_call(fla: dict[str, object]) -> None:
    registration = ours.register_with_fla()
    flas()
    flas(head_first=True)
    told = str(registration)
    assert told.splitlines()[-2] == "  ran here: chunk_gated_delta_rule, 1 call"
    assert "  left to FLA once: " in told
    flas()
    flas(head_first=True)
    assert "chunk_gated_delta_rule, 2 calls" in str(registration)
    assert "  left to FLA 2 times: " in str(registration)


def test_wrong_arguments_say_what_to_type(fla: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=r"it takes nothing by place, got 'triton'; type register_with_fla\(backend='triton'\)"):
        ours.register_with_fla("triton")
    with pytest.raises(TypeError, match=r"got True; type register_with_fla\(backend=\.\.\.\)"):
        ours.register_with_fla(True)
    with pytest.raises(TypeError, match="register_with_fla: unknown keyword 'bakend'; known: 'backend'"):
        ours.register_with_fla(bakend="triton")
    assert not registrations()


def test_what_the_page_shows_runs(fla: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "drop-in-fla.md").read_text(encoding="utf-8")
    functions, models, swap = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    scope: dict[str, Any] = {}
    exec(compile(functions, "drop-in-fla.md", "exec"), scope)
    assert scope["o"].shape == (2, 100, 4, 32)
    assert scope["state"].shape == (2, 4, 32, 32)

    class Model(torch.nn.Module):
        """FLA's function, and one of its layers."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = fla_likeness.GatedDeltaNet()

        def forward(self, ids: torch.Tensor) -> Any:
            return types.SimpleNamespace(logits=flas()[0])

    scope |= {"model": Model(), "input_ids": torch.zeros(1, 12, dtype=torch.long)}
    exec(compile(models, "drop-in-fla.md", "exec"), scope)
    assert "ran here: chunk_gated_delta_rule, 1 call\n" in capsys.readouterr().out
    assert [entry.path for entry in scope["report"].swapped] == ["layer"]

    fla["fla.utils"] = sys.modules["fla.utils"] = types.ModuleType("fla.utils")
    try:
        for name, module in list(fla.items()):
            parent, _, leaf = name.rpartition(".")
            if parent:
                setattr(fla[parent], leaf, module)
        exec(compile(swap, "drop-in-fla.md", "exec"), {})
    finally:
        del sys.modules["fla.utils"]
    assert fla["fla.ops.delta_rule"].chunk_delta_rule is ours.chunk_delta_rule
    assert fla["fla.ops.gated_delta_rule"].fused_recurrent_gated_delta_rule is ours.fused_recurrent_gated_delta_rule


def test_an_unknown_backend_is_named_with_the_known_ones(fla: dict[str, object]) -> None:
    with pytest.raises(tb.UnknownNameError, match="eager"):
        ours.register_with_fla(backend="warp")
    assert not registrations()


def test_the_real_fla_asks_us() -> None:
    pytest.importorskip("fla.backends", reason="FLA is not installed: pip install flash-linear-attention")
    with ours.register_with_fla() as registration:
        o, _ = flas()  # on a CPU FLA's own kernels could not run
        assert torch.equal(o, ours.chunk_gated_delta_rule(**call())[0])
    assert registration.calls[OWN] == 1


def test_a_transformers_model_that_calls_flas_function_runs_on_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own way to FLA, with what stands in for FLA at its end: registered, the model is what it is in plain torch; without us FLA's own runs."""
    pytest.importorskip("transformers", minversion="5.23", reason="before 5.23 transformers asks for FLA otherwise")
    hub = importlib.import_module("transformers.integrations.hub_kernels")
    modeling, model, ids = qwen3_next()
    plain = inspect.unwrap(modeling.torch_chunk_gated_delta_rule)
    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", plain)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
    for name, module in fla_likeness.modules(signature=inspect.signature(ours.chunk_gated_delta_rule)).items():
        monkeypatch.setitem(sys.modules, name, module)
    through_fla = hub.use_kernel_func_from_hub_with_fallback(OWN, "fla")(plain)
    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", through_fla)
    with torch.no_grad(), ours.register_with_fla() as registration:
        logits = model(ids, use_cache=False).logits
        assert registration.calls == {OWN: 3}  # of four layers one is attention
        model(ids, use_cache=False)
        assert registration.calls == {OWN: 6}
    assert not registration.refusals
    torch.testing.assert_close(logits, before, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), pytest.raises(ValueError, match="too many values to unpack"):  # FLA's own: a name in place of two tensors
        model(ids, use_cache=False)
    assert registration.calls == {OWN: 6}


def test_a_model_of_flas_runs_on_us_where_fla_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLA's own GatedDeltaNet model, which calls its function in every layer: as with FLA's written-out recurrence in that place."""
    pytest.importorskip("fla.models", reason="FLA is not installed: pip install flash-linear-attention")
    models, layers, norms = (importlib.import_module(name) for name in ("fla.models", "fla.layers.gated_deltanet", "fla.modules.fused_norm_gate"))
    naive = importlib.import_module("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule

    def written_out(q, k, v, g, beta, A_log, dt_bias, **options):
        asked = {name: value for name, value in options.items() if value not in (None, False)}
        assert asked.keys() == {"use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "state_v_first", "use_gate_in_kernel"}
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        return naive(q, k, v, beta=beta.sigmoid(), g=-A_log.exp() * torch.nn.functional.softplus(g + dt_bias), output_final_state=False)

    def gated(self, x, g):  # FLA's kernels for it have no CPU
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps) * torch.nn.functional.silu(g)

    monkeypatch.setattr(norms.FusedRMSNormGated, "forward", gated)
    monkeypatch.setattr(importlib.import_module("fla.modules.mlp"), "swiglu", lambda gate, y: torch.nn.functional.silu(gate) * y)
    plain = dict.fromkeys(("use_short_conv", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy"), False)
    config = models.GatedDeltaNetConfig(hidden_size=32, num_hidden_layers=2, num_heads=2, head_dim=8, vocab_size=50, **plain)
    torch.manual_seed(0)
    model, ids = models.GatedDeltaNetForCausalLM(config).eval(), torch.randint(0, 50, (2, 70))  # up to 64 tokens it takes the recurrent function
    with torch.no_grad(), ours.register_with_fla() as registration:
        logits = model(ids, use_cache=False).logits
    assert registration.calls == {OWN: 2}
    assert not registration.refusals
    monkeypatch.setattr(layers, "chunk_gated_delta_rule", written_out)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, logits, rtol=1e-4, atol=1e-5)


def test_a_transformers_model_runs_on_us_where_fla_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where FLA can be imported, transformers calls it on a CPU too, where it raises; ours runs, and equals transformers' own function."""
    pytest.importorskip("fla.ops", reason="FLA is not installed: pip install flash-linear-attention")
    pytest.importorskip("transformers", minversion="5.23", reason="before 5.23 transformers asks for FLA otherwise")
    modeling, model, ids = qwen3_next()
    with torch.no_grad(), ours.register_with_fla() as registration:
        logits = model(ids, use_cache=False).logits
    assert registration.calls[OWN] == 3  # of four layers one is attention
    assert not registration.refusals
    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", inspect.unwrap(modeling.torch_chunk_gated_delta_rule))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, logits, rtol=1e-4, atol=1e-5)


def qwen3_next() -> tuple[Any, Any, torch.Tensor]:
    """transformers' modeling module, a small model of four layers, one of them attention, and tokens for it."""
    transformers = importlib.import_module("transformers")
    modeling = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    sizes = {f"linear_{name}_head_dim": 16 for name in ("key", "value")} | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    config = transformers.Qwen3NextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    return modeling, transformers.Qwen3NextForCausalLM(config).eval(), torch.randint(0, 50, (2, 20))

"""transformers' gated delta layers, swapped: the same function in every use that transformers makes of it, and none of transformers' own code run."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import re
import subprocess
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import titans_backends as tb
from titans_backends.errors import AccelerateError
from titans_backends.integrations.transformers.versions import FAMILIES as KNOWN
from titans_backends.integrations.transformers.versions import names_used

from .scripts import script

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -c constraints.txt transformers")
models = script("benchmarks/drop_in_models.py")
small_model, delta_layers = models.small_model, models.delta_layers

FORMS = ("qwen3_5", "qwen3_next", "olmo_hybrid")
"""One family of each form."""
THEIRS = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn", "causal_conv1d_update")
LIMIT = 1e-4
TOKENS = 100


@pytest.fixture(autouse=True)
def quiet() -> None:
    """transformers says that it falls back to torch, and that is what is compared with."""
    transformers.logging.set_verbosity_error()


@pytest.fixture
def without_the_original(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """From its call on, each of transformers' own functions raises."""

    def broken(*args: object, **kwargs: object) -> None:
        raise AssertionError("transformers' own function ran")

    def forbid(family: str) -> None:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for name in THEIRS:
            monkeypatch.setattr(module, name, broken)
        for name, kind in vars(module).items():
            if name.endswith("RMSNormGated"):
                monkeypatch.setattr(kind, "forward", broken)

    return forbid


def tokens(rows: int = 2, length: int = 40) -> Tensor:
    return torch.randint(1, models.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


def mask(ids: Tensor, left: int = 0, right: int = 0) -> Tensor:
    """Row 0 is padded on the left, row 1 on the right."""
    made = torch.ones_like(ids)
    made[0, :left] = 0
    made[1, ids.shape[1] - right :] = 0
    return made


def logits(model: Any, ids: Tensor, **inputs: object) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, **inputs).logits
    return found


def gradients(model: Any, ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()
    model(ids, attention_mask=attention_mask, labels=ids.masked_fill(attention_mask == 0, -100)).loss.backward()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def pair(family: str, **how: Any) -> tuple[Any, Any]:
    """The model as transformers has it, and its swapped copy."""
    before = small_model(family, **how)
    after = copy.deepcopy(before)
    assert len(tb.accelerate(after).swapped) == len(delta_layers(after))
    return before, after


def in_pieces(model: Any, ids: Tensor, ends: tuple[int, ...], cache: Any = None, forward: Callable[..., Any] | None = None) -> Tensor:
    cache = transformers.DynamicCache(config=model.config) if cache is None else cache
    found, start = [], 0
    with torch.no_grad():
        for end in ends:
            found.append((forward or model.forward)(ids[:, start:end], past_key_values=cache, position_ids=torch.arange(start, end)[None]).logits)
            start = end
    return torch.cat(found, 1)


def close(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and float((a.detach() - b.detach()).abs().max()) <= LIMIT


# --- every family


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_computes_the_same_on_our_ops_alone(
    family: str, without_the_original: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = small_model(family), tokens()
    padded = {"none": None, "left": mask(ids, left=7), "right": mask(ids, right=9), "both": mask(ids, left=7, right=9)}
    how = {"attention_mask": padded["both"], "max_new_tokens": TOKENS, "do_sample": False}
    before = {side: logits(model, ids, attention_mask=m) for side, m in padded.items()}
    written, grads = model.generate(ids, **how), gradients(model, ids, padded["both"])
    assert len(written[0, 40:].unique()) > 10  # or it would be the same whatever a layer did

    report = tb.accelerate(model)
    assert [entry.path for entry in report.swapped] == ["model.layers.0.linear_attn"]
    assert report.swapped[0].notes == ()
    without_the_original(family)
    for side, m in padded.items():
        assert close(logits(model, ids, attention_mask=m), before[side]), side
    assert torch.equal(model.generate(ids, **how), written)
    ours = gradients(model, ids, padded["both"])
    assert ours.keys() == grads.keys()
    for name, grad in grads.items():
        assert float((ours[name] - grad).norm()) <= 1e-4 * float(grad.norm()), name
    report.undo()
    with pytest.raises(AssertionError, match="own function ran"):  # so the forbidden functions are those that it had run
        logits(model, ids)
    monkeypatch.undo()
    assert torch.equal(logits(model, ids), before["none"])


def test_the_layers_are_known_by_name_and_nothing_is_imported() -> None:
    code = "import sys, titans_backends.integrations.transformers; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    for family in KNOWN:
        assert not family.differences(getattr(importlib.import_module(family.module), family.layer))


# --- caches


@pytest.mark.parametrize("family", FORMS)
def test_a_prompt_in_pieces_and_tokens_after_it_give_the_same_states(family: str) -> None:
    before, after = pair(family)
    ids, ends = tokens(), (2, 3, 8, 9, 26, 27, 40)
    caches = [transformers.DynamicCache(config=before.config) for _ in range(2)]
    theirs, ours = (in_pieces(m, ids, ends, c) for m, c in zip((before, after), caches, strict=True))
    assert close(ours, theirs)
    assert close(ours, logits(before, ids))
    for name in ("conv_states", "recurrent_states"):
        a, b = (getattr(cache.layers[0], name)[0] for cache in caches)
        assert close(a, b)
        assert a.shape == b.shape
    for cache in caches:
        cache.reset()
    assert close(*(in_pieces(m, ids, (5, 6), c) for m, c in zip((before, after), caches, strict=True)))


def test_a_cache_goes_on_where_the_model_is_swapped_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small_model("qwen3_5"), tokens()
    whole, cache = logits(model, ids), transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        held = cache.layers[0].recurrent_states[0]
        with tb.accelerate(model), monkeypatch.context() as without:
            without.setattr(cache, "update_recurrent_state", None)  # a token is written where the state lies
            assert close(model(ids[:, 20:21], past_key_values=cache).logits, whole[:, 20:21])
            assert cache.layers[0].recurrent_states[0] is held  # a captured graph knows its address
        assert close(model(ids[:, 21:], past_key_values=cache).logits, whole[:, 21:])


def test_beams_are_reordered() -> None:
    before, after = pair("qwen3_5")
    ids = tokens()
    how = {"attention_mask": mask(ids, left=7), "max_new_tokens": 12, "do_sample": False, "num_beams": 3}
    assert torch.equal(after.generate(ids, **how), before.generate(ids, **how))


def test_a_cache_that_records_its_past() -> None:
    before, after = pair("qwen3_5")
    caches = [transformers.DynamicCache(config=before.config) for _ in range(2)]
    for cache in caches:
        cache.activate_past_recording()
    ids, ends = tokens(), (2, 3, 20, 21, 25, 40)
    assert close(*(in_pieces(m, ids, ends, c) for m, c in zip((before, after), caches, strict=True)))
    assert torch.equal(*(cache.layers[0].conv_states[0] for cache in caches))


def test_a_gradient_runs_through_a_continued_cache() -> None:
    before, after = pair("qwen3_5")
    ids = tokens()
    before(ids, use_cache=False).logits.square().mean().backward()
    cache = transformers.DynamicCache(config=after.config)
    parts = [after(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 3), (3, 4), (4, 6), (6, 25), (25, 40))]
    torch.cat(parts, 1).square().mean().backward()
    for (name, theirs), (_, ours) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert float((ours.grad - theirs.grad).norm()) <= 1e-4 * float(theirs.grad.norm()), name


# --- packed batches


@pytest.mark.parametrize("family", FORMS)
def test_packed_sequences_are_kept_apart(family: str) -> None:
    before, after = pair(family)
    layer, own = delta_layers(after)[0], delta_layers(before)[0]
    x, ends = torch.randn(1, 40, 64), torch.tensor([0, 2, 17, 17, 40], dtype=torch.int32)
    apart = torch.cat([own(x[:, a:b]) for a, b in ((0, 2), (2, 17), (17, 40))], 1)
    with suppress(ValueError):  # without FLA transformers refuses; before 5.23 it went on
        assert not close(own(x, cu_seq_lens_q=ends), apart)
    packed = layer(x, cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=23, max_length_k=23)
    assert close(packed, apart)
    for y, module in ((packed, layer), (apart, own)):
        y.square().sum().backward()
        assert module.A_log.grad is not None
    for (name, ours), (_, theirs) in zip(layer.named_parameters(), own.named_parameters(), strict=True):
        assert float((ours.grad - theirs.grad).norm()) <= 1e-4 * float(theirs.grad.norm()), name


def test_a_packed_training_step_of_a_whole_model() -> None:
    before, after = pair("qwen3_5")
    ids, ends = tokens(1), torch.tensor([0, 13, 40], dtype=torch.int32)
    places = torch.cat([torch.arange(13), torch.arange(27)])[None]
    packed = after(ids, position_ids=places, cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=27, max_length_k=27, use_cache=False).logits
    assert close(packed, torch.cat([before(ids[:, :13]).logits, before(ids[:, 13:]).logits], 1))


def test_packing_that_has_no_meaning_is_refused() -> None:
    _, after = pair("qwen3_5")
    layer, x, ends = delta_layers(after)[0], torch.randn(1, 8, 64), torch.tensor([0, 3, 8])
    with pytest.raises(ValueError, match="cu_seq_lens_q, by which the memory is kept apart, is missing"):
        layer(x, seq_idx=torch.zeros(1, 8, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor or None, got list"):
        layer(x, cu_seq_lens_q=[0, 8])
    cache = transformers.DynamicCache(config=after.config)
    layer(x, cache_params=cache)
    with pytest.raises(ValueError, match="the cache holds one that goes on"):
        layer(x, cache_params=cache, cu_seq_lens_q=ends)


# --- dtypes


@pytest.mark.parametrize("family", FORMS)
def test_bfloat16_is_no_further_from_float64_than_before(family: str) -> None:
    before = small_model(family).bfloat16()
    after, exact = copy.deepcopy(before), copy.deepcopy(before).double()
    tb.accelerate(after)
    x, squares = torch.randn(4, 60, 64).bfloat16(), []
    with torch.no_grad():
        for model in (before, after):
            layer, cache = delta_layers(model)[0], transformers.DynamicCache(config=before.config)
            found = torch.cat([layer(x[:, :50], cache_params=cache), *(layer(x[:, t : t + 1], cache_params=cache) for t in range(50, 60))], 1)
            assert found.dtype == torch.bfloat16
            assert cache.layers[0].recurrent_states[0].dtype == torch.float32
            assert cache.layers[0].conv_states[0].dtype == torch.bfloat16
            squares.append((found.double() - delta_layers(exact)[0](x.double())).square().sum())
    assert squares[1] <= 1.1**2 * squares[0]


def test_autocast_float64_and_a_float32_norm_beside_bfloat16() -> None:
    before, after = pair("qwen3_5")
    ids, x = tokens(), torch.randn(2, 20, 64)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = logits(before, ids), logits(after, ids)
        assert torch.equal(after.generate(ids, max_new_tokens=1, do_sample=False)[:, -1], ours[:, -1].argmax(-1))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert float((ours - logits(before, ids)).norm()) <= 1.3 * float((theirs - logits(before, ids)).norm())
    for model in (before, after):
        model.bfloat16()
        delta_layers(model)[0].norm.float()
        delta_layers(model)[0].A_log.data = delta_layers(model)[0].A_log.data.float()
    a, b = (delta_layers(model)[0](x.bfloat16()) for model in (before, after))
    assert a.dtype == b.dtype == torch.bfloat16
    for model in (before, after):
        model.double()
    assert float((logits(after, ids) - logits(before, ids)).abs().max()) < LIMIT


def test_gradient_checkpointing() -> None:
    before, after = pair("qwen3_5")
    ids = tokens()
    theirs = gradients(before, ids, mask(ids, left=7))
    enable = getattr(after, "activation_checkpointing_enable", None) or after.gradient_checkpointing_enable  # its name before 5.23
    enable()
    for name, grad in gradients(after, ids, mask(ids, left=7)).items():
        assert float((grad - theirs[name]).norm()) <= 1e-4 * float(theirs[name].norm()), name


# --- graphs


@pytest.mark.parametrize("family", FORMS)
def test_a_layer_compiles_whole_before_it_has_run(family: str) -> None:
    before, after = pair(family)
    torch._dynamo.reset()
    layer, own = delta_layers(after)[0], delta_layers(before)[0]
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(2, 12, 64)
    caches = [transformers.StaticCache(config=before.config, max_cache_len=32) for _ in range(2)]
    with torch.no_grad():
        for part, padding in ((x[:, :10], mask(x[:, :10, 0], left=3)), (x[:, 10:11], None), (x[:, 11:], None)):
            theirs = own(part, cache_params=caches[1], attention_mask=padding)
            assert close(compiled(part, cache_params=caches[0], attention_mask=padding), theirs)


def test_generation_with_a_static_cache_in_one_graph() -> None:
    before, after = pair("qwen3_5")
    torch._dynamo.reset()
    ids, ends = tokens(1, 23), (20, 21, 22, 23)
    cache = transformers.StaticCache(config=after.config, max_cache_len=32)
    compiled = torch.compile(after.forward, fullgraph=True, backend="eager")
    assert close(in_pieces(after, ids, ends, cache, compiled), logits(before, ids))
    how = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(after.generate(ids, cache_implementation="static", **how), before.generate(ids, **how))


def test_a_swapped_model_is_exported() -> None:
    before, after = pair("qwen3_5")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = after

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.model(ids, use_cache=False).logits
            return found

    ids = tokens()
    program = torch.export.export(Logits(), (ids,))
    held = [str(node.target) for node in program.graph.nodes if "titans_backends" in str(node.target)]
    assert held == [f"titans_backends.{op}.default" for op in ("qkv_prepare", "gated_delta_rule", "gated_rms_norm")]
    assert close(program.module()(ids), logits(before, ids))


# --- forms that a config can ask for


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("qwen3_5", {"heads": (4, 4), "head_dims": (16, 32)}),
        ("qwen3_next", {"heads": (4, 4), "head_dims": (16, 32)}),
        ("qwen4_exp", {"output_gate_type": "sigmoid"}),
        ("qwen4_exp", {"ple_layer_ids": [1], "eos_token_id": 63, "ngram_vocab_size_base": 50, "heads_per_ngram": 2, "split_ngram_parts": 1}),
        ("olmo_hybrid", {"linear_allow_neg_eigval": False}),
        ("qwen3_5", {"linear_conv_kernel_dim": 3}),
        ("olmo_hybrid", {"linear_conv_kernel_dim": 5}),
    ],
)
def test_what_a_config_can_ask_for(family: str, how: dict[str, Any]) -> None:
    before = small_model(family, **how)
    after = copy.deepcopy(before)
    (entry,) = tb.accelerate(after).swapped
    assert bool(entry.notes) == ("linear_conv_kernel_dim" in how)
    ids = tokens()
    padding = mask(ids, left=5, right=6)
    assert close(logits(after, ids, attention_mask=padding), logits(before, ids, attention_mask=padding))
    written = {"attention_mask": padding, "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(after.generate(ids, **written), before.generate(ids, **written))


def test_a_convolution_with_a_bias() -> None:
    before = small_model("qwen3_next")
    conv = delta_layers(before)[0].conv1d
    conv.bias = nn.Parameter(torch.linspace(-1, 1, conv.weight.shape[0]))
    after, ids = copy.deepcopy(before), tokens()
    tb.accelerate(after)
    assert close(in_pieces(after, ids, (6, 7, 20, 40)), logits(before, ids))


def test_a_packed_batch_needs_the_taps_that_the_op_has() -> None:
    _, after = pair("qwen3_5", linear_conv_kernel_dim=3)
    with pytest.raises(NotImplementedError, match="needs a convolution of 4 taps, and this layer's has 3"):
        delta_layers(after)[0](torch.randn(1, 8, 64), cu_seq_lens_q=torch.tensor([0, 3, 8]))


# --- what hangs on a part of the layer


def test_a_norm_with_a_hook_is_called() -> None:
    before, after = pair("qwen3_5")
    calls: list[int] = []
    delta_layers(after)[0].norm.register_forward_hook(lambda *found: calls.append(1))
    assert close(logits(after, tokens()), logits(before, tokens()))
    assert calls == [1]


def test_offloaded_weights_come_when_they_are_needed() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
    before, after = pair("qwen3_5")
    accelerate.cpu_offload(after, execution_device="cpu")
    layer = delta_layers(after)[0]
    assert layer.conv1d.weight.device.type == layer.norm.weight.device.type == layer.A_log.device.type == "meta"
    assert close(logits(after, tokens()), logits(before, tokens()))
    assert layer.conv1d.weight.device.type == "meta"


def test_a_copy_is_swapped_too_and_a_forced_backend_reaches_what_it_has() -> None:
    model = small_model("qwen3_5")
    tb.accelerate(model, backend="eager")
    layer = delta_layers(copy.deepcopy(model))[0]
    assert [op.backend for op in (layer.titans_rule, layer.titans_step, layer.titans_prepare, layer.titans_norm)] == ["eager"] * 4
    model = small_model("qwen3_5")
    (entry,) = tb.accelerate(model, backend="numba_cpu").swapped
    assert entry.notes == ("backend 'numba_cpu' has no qkv_prepare, gated_rms_norm: those are chosen as ever",)
    layer = delta_layers(model)[0]
    assert [op.backend for op in (layer.titans_rule, layer.titans_step, layer.titans_prepare, layer.titans_norm)] == ["numba_cpu"] * 2 + [None] * 2


def test_what_the_page_shows_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "drop-in-transformers.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```\n```\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    scope: dict[str, Any] = {}
    exec(compile(block[0], "drop-in-transformers.md", "exec"), scope)
    assert torch.equal(scope["before"], scope["after"])
    assert scope["before"].shape == (1, 120)
    assert scope["report"].undone
    assert capsys.readouterr().out == block[1]


# --- refusals


def refusal(model: Any, backend: str | None = None) -> str:
    with pytest.raises(AccelerateError) as caught:
        tb.accelerate(model, backend=backend)
    return str(caught.value)


def test_a_version_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("qwen3_5")
    layer = delta_layers(model)[0]
    kind = type(layer)
    original = kind.forward

    def longer(
        self: Any, hidden_states: Tensor, cache_params: object = None, attention_mask: object = None, scale: float = 1.0, **kwargs: object
    ) -> Tensor:
        found: Tensor = original(self, self.k_norm(hidden_states) * scale)
        return found

    monkeypatch.setattr(kind, "forward", longer)
    told = refusal(model)
    assert "takes (self, hidden_states, cache_params, attention_mask, scale, kwargs)" in told
    assert "uses k_norm, original, which this integration does not know" in told
    assert "does not use A_log, " in told
    assert names_used(longer) == {"original", "k_norm"}
    monkeypatch.undo()
    monkeypatch.setattr(kind, "forward", functools.wraps(original)(lambda *args, **kwargs: 2 * original(*args, **kwargs)))
    assert f"{kind.__name__}.forward is wrapped by {__name__}, whose code a swap would pass by" in refusal(model)
    monkeypatch.undo()
    source = inspect.unwrap(original)
    copied = types.FunctionType(source.__code__, {"__name__": "theirs"}, "forward")  # every name is known, what it does with them is not
    copied.__signature__ = inspect.signature(original)
    layer.__class__ = type("Mine", (kind,), {"forward": copied})
    assert "Mine.forward is from theirs, whose code a swap would pass by" in refusal(model)
    layer.__class__ = kind
    del layer.dt_bias
    layer.num_v_heads = 3
    assert "it has no tensor dt_bias" in refusal(model)


def test_a_method_that_the_forward_calls_and_another_class_overrides_is_refused() -> None:
    """qwen3_next's forward asks a method of its own how the projection's channels lie; the swapped one knows it."""
    model = small_model("qwen3_next")
    layer, ids = delta_layers(model)[0], tokens()
    kind = type(layer)
    before = logits(model, ids)

    def turned(self: Any, mixed_qkvz: Tensor, mixed_ba: Tensor) -> tuple[Tensor, ...]:
        q, k, *rest = kind.fix_query_key_value_ordering(self, mixed_qkvz, mixed_ba)
        return k, q, *rest

    layer.__class__ = type("Turned", (kind,), {"fix_query_key_value_ordering": turned})
    assert not close(logits(model, ids), before)  # it is another function
    assert f"Turned.fix_query_key_value_ordering is from {__name__}, whose code a swap would pass by" in refusal(model)
    layer.__class__ = kind
    layer.fix_query_key_value_ordering = types.MethodType(turned, layer)
    assert "its instance holds a fix_query_key_value_ordering of its own, which a swap would pass by" in refusal(model)
    del layer.fix_query_key_value_ordering
    layer.__class__ = type("Told", (kind,), {"extra_repr": lambda self: "mine", "to": lambda self, *args: self})  # what the forward does not call
    tb.accelerate(model)
    assert close(logits(model, ids), before)


class Saved(nn.Module):
    """As PEFT's wrapper of a module in modules_to_save: two copies, and attributes of the one that is active."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module, self.saved, self.active = module, copy.deepcopy(module), True

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.saved if self.active else self.original_module, name)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_wrapped_convolution_is_read_as_transformers_reads_it(when: str) -> None:
    before, ids = small_model("qwen3_5"), tokens()
    after = copy.deepcopy(before)
    for model in (before, after):
        if model is after and when == "after":
            tb.accelerate(after)
        layer = delta_layers(model)[0]
        layer.conv1d = Saved(layer.conv1d)
        with torch.no_grad():
            layer.conv1d.saved.weight.mul_(2.0)
    if when == "before":
        (entry,) = tb.accelerate(after).swapped
        assert entry.notes == (f"conv1d is a {__name__}.Saved: its weight and bias are read at each call, and it is not called, as in transformers",)
    saved = logits(before, ids)
    assert close(logits(after, ids), saved)
    for model in (before, after):
        delta_layers(model)[0].conv1d.active = False
    assert close(logits(after, ids), logits(before, ids))
    assert not close(logits(after, ids), saved)


def test_sizes_and_activations_that_the_ops_lack_are_refused() -> None:
    assert "its convolution's activation is 'gelu'; the op has silu" in refusal(small_model("qwen3_5", hidden_act="gelu"))
    model = small_model("qwen3_5")
    layer = delta_layers(model)[0]
    layer.num_k_heads, layer.conv1d = 3, nn.Conv1d(128, 128, 4)
    told = refusal(model)
    assert "key_dim is 32, not num_k_heads * head_k_dim = 48" in told
    assert "num_v_heads is 4, no multiple of num_k_heads = 3" in told
    assert "conv1d is a Conv1d with a weight of (128, 128, 4); expected is a depthwise Conv1d with (128, 1, 4)" in told
    assert "backend 'inductor' has no gated_delta_step" in refusal(small_model("qwen3_5"), "inductor")


def test_raw_weights_that_are_read_or_called_are_refused() -> None:
    model = small_model("qwen3_5")
    layer = delta_layers(model)[0]
    for part in (layer.conv1d, layer.norm, layer.out_proj):
        part.weight = nn.Parameter(part.weight.to(torch.int8), requires_grad=False)
    assert "conv1d.weight, norm.weight, out_proj.weight are raw torch.int8, and nothing here knows the scale; " in refusal(model)
    (entry,) = tb.accelerate(model, strict=False).refused
    assert len(entry.reasons) == 1


def test_a_norm_that_is_not_known_stays() -> None:
    class Halved(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.inner = norm

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            found: Tensor = self.inner(x, gate)
            return found / 2

    before = small_model("qwen3_5")
    layer = delta_layers(before)[0]
    layer.norm = Halved(layer.norm)
    after = copy.deepcopy(before)
    (entry,) = tb.accelerate(after).swapped
    assert entry.notes == ("its gated norm, Halved, is none that this integration knows, and stays as it is",)
    assert close(logits(after, tokens()), logits(before, tokens()))
    before, after = pair("qwen3_5")
    for model in (before, after):
        norm = delta_layers(model)[0].norm
        delta_layers(model)[0].norm = wrapped = Halved(norm)
        wrapped.weight, wrapped.variance_epsilon = norm.weight, norm.variance_epsilon  # as adapters pass them on
    assert close(logits(after, tokens()), logits(before, tokens()))

"""FLA's DeltaNet and GatedDeltaNet on our ops: against the layer's formula in float64 written here, with its cache and its masks, and every refusal.

The layers are likenesses (`tests/fla_likeness.py`) whose own forward raises, so that it is known who ran; FLA's real ones are tried where it is installed.
"""

from __future__ import annotations

import functools
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

import titans_backends as tb
from tests import fla_likeness
from tests.test_integrations_fla import recurrence
from titans_backends.integrations import fla as ours
from titans_backends.integrations.fla import padding
from titans_backends.integrations.known import KnownLayer
from titans_backends.verdict import Verdict

LAYERS: dict[str, KnownLayer] = {"GatedDeltaNet": ours.GATED_DELTA_NET, "DeltaNet": ours.DELTA_NET}
VARIANTS = [
    ("GatedDeltaNet", {}),
    ("GatedDeltaNet", {"num_v_heads": 4, "expand_v": 2, "allow_neg_eigval": True, "conv_bias": True, "output_gate_activation": "sigmoid"}),
    ("GatedDeltaNet", {"use_gate": False}),
    ("GatedDeltaNet", {"use_short_conv": False}),
    ("DeltaNet", {}),
    ("DeltaNet", {"use_gate": True, "conv_bias": True, "allow_neg_eigval": True}),
    ("DeltaNet", {"qk_activation": "relu", "use_beta": False}),
    ("DeltaNet", {"qk_activation": "elu", "qk_norm": "sum", "use_beta": False, "allow_neg_eigval": True}),
    ("DeltaNet", {"qk_norm": "sum"}),
    ("DeltaNet", {"use_short_conv": False, "qk_activation": "identity"}),
    ("DeltaNet", {"use_short_conv": False, "qk_norm": "sum"}),
]
NAMES = [f"{name}-{'-'.join(changes) or 'plain'}" for name, changes in VARIANTS]


@pytest.fixture(autouse=True)
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLA's version, which is asked of its module."""
    if "flas_own" not in request.node.name:
        monkeypatch.setitem(sys.modules, "fla", fla_likeness.modules()["fla"])


def made(name: str, dtype: torch.dtype = torch.float64, **changes: object) -> nn.Module:
    """A layer with weights that no default hides."""
    torch.manual_seed(3)
    layer = getattr(fla_likeness, name)(**changes)
    with torch.no_grad():
        layer.o_norm.weight.uniform_(0.5, 1.5)
    return layer.to(dtype).eval()


def swapped(layer: nn.Module, backend: str | None = None) -> nn.Module:
    """The layer on our ops."""
    tb.accelerate(layer, backend=backend)
    return layer


def convolved(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """`[1, T, D]`: causal, then the convolution's activation."""
    taps = conv.kernel_size[0]
    y = nn.functional.conv1d(nn.functional.pad(x.mT, (taps - 1, 0)), conv.weight, conv.bias, groups=conv.groups).mT
    return y if conv.activation is None else y * y.sigmoid()


def expected_of(name: str, layer: nn.Module, x: Tensor) -> Tensor:
    """The layer on one sequence `[1, T, D]`, from its formula."""
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    activation = getattr(layer, "qk_activation", "silu")
    if layer.use_short_conv:
        q, k, v = convolved(q, layer.q_conv1d), convolved(k, layer.k_conv1d), convolved(v, layer.v_conv1d)
    else:
        v = v * v.sigmoid()
        q, k = (y * y.sigmoid() if activation == "silu" else y for y in (q, k))
    q, k = (y.unflatten(-1, (-1, layer.head_k_dim)) for y in (q, k))
    v = v.unflatten(-1, (-1, layer.head_v_dim))
    if activation == "relu":
        q, k = q.clamp_min(0), k.clamp_min(0)
    elif activation == "elu":
        q, k = (torch.where(y > 0, y, y.exp() - 1) + 1 for y in (q, k))
    norm = getattr(layer, "qk_norm", "l2")
    if norm == "sum":
        q, k = (y / y.abs().sum(-1, keepdim=True).clamp_min(1e-6) for y in (q, k))
    beta = layer.b_proj(x).sigmoid() if getattr(layer, "use_beta", True) else x.new_ones(v.shape[:3])
    beta = 2 * beta if layer.allow_neg_eigval else beta
    g = -layer.A_log.exp() * (1 + (layer.a_proj(x) + layer.dt_bias).exp()).log() if name == "GatedDeltaNet" else None
    o, _ = recurrence(q, k, v, beta, g, l2norm=norm == "l2")
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.o_norm.weight
    if layer.use_gate:
        gate = layer.g_proj(x).unflatten(-1, (-1, layer.head_v_dim))
        o = o * gate.sigmoid() * (1 if layer.o_norm.activation == "sigmoid" else gate)
    return layer.o_proj(o.flatten(-2))


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=NAMES)
def test_the_layer_equals_its_formula_and_the_formulas_gradients(name: str, changes: dict[str, object]) -> None:
    layer = made(name, **changes)
    x = torch.randn(2, 11, 64, dtype=torch.float64, requires_grad=True)
    expected = torch.cat([expected_of(name, layer, x[n : n + 1]) for n in range(2)])
    weights = torch.linspace(-1, 1, 64, dtype=torch.float64)
    given = [x, *layer.parameters()]
    theirs = torch.autograd.grad((expected * weights).sum(), given)
    y, attentions, cache = swapped(layer)(x)
    assert attentions is None
    assert cache is None
    torch.testing.assert_close(y, expected, rtol=1e-8, atol=1e-9)
    for left, right in zip(torch.autograd.grad((y * weights).sum(), given), theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=NAMES)
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_is_as_if_each_row_were_alone_also_through_the_cache(name: str, changes: dict[str, object], side: str) -> None:
    layer = swapped(made(name, layer_idx=0, **changes))
    original = made(name, **changes)
    rows, lengths = torch.randn(3, 9, 64, dtype=torch.float64), (9, 4, 6)
    mask = torch.zeros(3, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        at = {"left": slice(9 - length, 9), "right": slice(0, length)}.get(side, torch.randperm(9)[:length].sort().values)
        mask[row, at] = 1
    later, after = torch.randn(3, 3, 64, dtype=torch.float64), torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 1]])  # one row waits for a step
    cache = fla_likeness.Cache()
    with torch.no_grad():
        y, _, _ = layer(rows, attention_mask=mask, past_key_values=cache, use_cache=True)
        steps = []
        for t in range(3):
            mask = torch.cat([mask, after[:, t : t + 1]], 1)
            steps.append(layer(later[:, t : t + 1], attention_mask=mask, past_key_values=cache, use_cache=True)[0])
    assert cache.seen == 12
    y, x = torch.cat([y, *steps], 1), torch.cat([rows, later], 1)
    assert not y[mask == 0].any()
    for row in range(3):
        kept = mask[row] != 0
        torch.testing.assert_close(y[row, kept], expected_of(name, original, x[row, kept][None])[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("name", "layout"), [("GatedDeltaNet", (2, 4, 32, 16)), ("DeltaNet", (2, 4, 16, 16))])
def test_the_cache_holds_flas_layouts(name: str, layout: tuple[int, ...]) -> None:
    changes = {"num_v_heads": 4, "expand_v": 2} if name == "GatedDeltaNet" else {}
    layer, cache = swapped(made(name, torch.float32, layer_idx=1, **changes)), fla_likeness.Cache()
    x = torch.randn(2, 6, 64)
    layer(x, past_key_values=cache, use_cache=True)
    held = cache[1]
    assert held["recurrent_state"].shape == layout
    assert [tuple(state.shape) for state in held["conv_state"]] == [
        (2, conv.in_channels, 4) for conv in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d)
    ]
    torch.testing.assert_close(held["conv_state"][1], layer.k_proj(x)[:, -4:].mT)
    with pytest.raises(ValueError, match="layer_idx"):
        swapped(made(name, torch.float32))(x, past_key_values=cache)


@pytest.mark.parametrize("name", LAYERS)
def test_a_cache_that_was_never_kept_is_as_none(name: str) -> None:
    """FLA's own layer leaves three times None behind where it was not asked to keep its states."""
    layer, cache = swapped(made(name, layer_idx=0)), fla_likeness.Cache()
    cache.update(recurrent_state=None, conv_state=(None, None, None), layer_idx=0, offset=6)
    x = torch.randn(2, 6, 64, dtype=torch.float64)
    assert torch.equal(layer(x, past_key_values=cache, use_cache=False)[0], layer(x)[0])
    assert cache[0] == {"recurrent_state": None, "conv_state": (None, None, None)}


def test_packed_sequences_are_as_if_alone() -> None:
    for name, changes in (VARIANTS[1], VARIANTS[5], VARIANTS[6]):
        layer, original = swapped(made(name, **changes)), made(name, **changes)
        x = torch.randn(1, 13, 64, dtype=torch.float64)
        y, _, _ = layer(x, cu_seqlens=torch.tensor([0, 5, 13]))
        expected = torch.cat([expected_of(name, original, part) for part in x.split((5, 8), 1)], 1)
        torch.testing.assert_close(y, expected, rtol=1e-8, atol=1e-9)


def test_a_mask_is_asked_once_and_again_when_it_is_written_to() -> None:
    mask = torch.ones(2, 5)
    assert padding.packing_of("layer", mask, 2, 5) is None
    mask[0, 0] = 0
    first = padding.packing_of("layer", mask, 2, 5)
    assert first is not None
    assert first.cu_seqlens.tolist() == [0, 4, 9]
    assert padding.packing_of("layer", mask, 2, 5) is first
    assert padding.packing_of("layer", mask, 2, 4) is None
    with pytest.raises(ValueError, match="attention_mask has shape"):
        padding.packing_of("layer", torch.ones(2, 1, 5, 5), 2, 5)
    with pytest.raises(ValueError, match="with 3 rows"):  # row 0's tokens would be taken for those of all rows
        padding.packing_of("layer", mask, 3, 5)
    with pytest.raises(ValueError, match="at least 6"):
        padding.packing_of("layer", mask, 2, 6)


@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_holds_the_layer(name: str) -> None:
    layer = swapped(made(name, torch.float32))
    x = torch.randn(2, 20, 64)
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(graph(x)[0], layer(x)[0])
    packed = {"cu_seqlens": torch.tensor([0, 8, 20])}
    torch.testing.assert_close(graph(x[:1], **packed)[0], layer(x[:1], **packed)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_a_forced_backend_runs_the_memory(name: str, plugin_backend) -> None:
    ran = plugin_backend("everywhere")
    swapped(made(name, torch.float32, use_gate=True), "everywhere")(torch.randn(2, 20, 64))
    assert ran == ["forward"] * 3  # convolutions, memory, norm
    ran = plugin_backend("memory", ops=("gated_delta_rule", "gated_delta_step"))
    layer = swapped(made(name, torch.float32, use_gate=True), "memory")
    layer(torch.randn(2, 20, 64))
    assert ran == ["forward"]
    with torch.no_grad():
        layer(torch.randn(2, 1, 64))
    assert ran == ["forward"] * 2


@pytest.mark.parametrize("name", LAYERS)
def test_a_swap_is_told_and_undone(name: str) -> None:
    model = nn.Sequential(made(name, torch.float32), nn.Linear(64, 64))
    with tb.accelerate(model) as report:
        assert [(entry.path, entry.old.__name__) for entry in report.swapped] == [("0", name)]
        model[0](torch.randn(1, 3, 64))
    with pytest.raises(AssertionError, match="the original layer ran"):
        model[0](torch.randn(1, 3, 64))


def test_a_norm_that_is_another_since_the_swap_is_called() -> None:
    layer, x = swapped(made("GatedDeltaNet")), torch.randn(1, 9, 64, dtype=torch.float64)
    layer.o_norm.register_forward_hook(lambda *_: None)
    with pytest.raises(AssertionError, match="the original norm ran"):
        layer(x)
    plain = swapped(made("DeltaNet"))
    plain.o_norm = nn.Identity()
    assert plain(x)[0].isfinite().all()
    with pytest.raises(TypeError, match=r"cu_seqlens must be a torch\.Tensor or None, got list"):
        plain(x, cu_seqlens=[0, 9])


def subclass_of(layer: nn.Module) -> nn.Module:
    kind = type(layer)
    layer.__class__ = type("Mine", (kind,), {"forward": lambda self, x: x})
    return layer


def made_raw(part: nn.Module) -> None:
    part.weight = nn.Parameter(part.weight.to(torch.int8), requires_grad=False)


REFUSALS = [
    ("GatedDeltaNet", {"conv_size": 3}, None, "q_conv1d has 3 taps"),
    ("DeltaNet", {}, lambda layer: setattr(layer, "qk_norm", "max"), "qk_norm is 'max'; computed are 'l2', 'sum'"),
    ("DeltaNet", {}, lambda layer: setattr(layer, "qk_activation", "gelu"), "qk_activation is 'gelu'"),
    ("GatedDeltaNet", {}, lambda layer: setattr(layer.o_norm, "activation", "relu"), "o_norm has activation 'relu'"),
    ("GatedDeltaNet", {}, lambda layer: setattr(layer.o_norm, "weight", None), "without eps and weight"),
    ("GatedDeltaNet", {}, lambda layer: setattr(layer.k_conv1d, "activation", "relu"), "k_conv1d has activation 'relu'"),
    ("GatedDeltaNet", {}, lambda layer: setattr(layer, "v_conv1d", nn.Identity()), "v_conv1d is a Identity"),
    ("DeltaNet", {}, lambda layer: layer.v_conv1d.register_forward_hook(lambda *_: None), "v_conv1d has 1 of _forward_hooks"),
    ("DeltaNet", {}, lambda layer: made_raw(layer.k_proj), "k_proj.weight is raw torch.int8, and nothing here knows the scale"),
    ("DeltaNet", {}, lambda layer: made_raw(layer.v_conv1d), "v_conv1d.weight is raw torch.int8"),
    ("GatedDeltaNet", {}, lambda layer: made_raw(layer.o_norm), "o_norm.weight is raw torch.int8"),
    ("DeltaNet", {}, subclass_of, "Mine has a forward of its own"),
    ("DeltaNet", {}, lambda layer: setattr(layer, "o_norm", nn.LayerNorm(16, bias=False)), "LayerNorm; it must be FLA's RMSNorm"),
    ("GatedDeltaNet", {}, lambda layer: subclass_of(layer.o_norm), "Mine; it must be FLA's FusedRMSNormGated"),
    ("GatedDeltaNet", {}, lambda layer: subclass_of(layer.q_conv1d), "q_conv1d: Mine.forward is from tests.test_integrations_fla_layers"),
]


@pytest.mark.parametrize(("name", "changes", "spoil", "says"), REFUSALS, ids=[says for *_, says in REFUSALS])
def test_what_a_layer_cannot_become_is_said_with_every_reason(name: str, changes: dict[str, object], spoil, says: str) -> None:
    layer = made(name, torch.float32, **changes)
    if spoil is not None:
        spoil(layer)
    assert LAYERS[name].recognise(layer)
    verdict = LAYERS[name].convert(layer, None)
    assert isinstance(verdict, Verdict)
    assert says in str(verdict)


def test_a_patched_forward_and_an_older_fla_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla_likeness.GatedDeltaNet, "forward", lambda self, x: x)
    assert "GatedDeltaNet.forward is from tests." in str(ours.GATED_DELTA_NET.convert(made("GatedDeltaNet"), None))
    monkeypatch.setattr(fla_likeness.GatedDeltaNet, "forward", functools.wraps(fla_likeness._original)(lambda self, x: x))
    assert "GatedDeltaNet.forward is wrapped by tests." in str(ours.GATED_DELTA_NET.convert(made("GatedDeltaNet"), None))
    older = fla_likeness.modules()["fla"]
    older.__version__ = "0.5.2"
    monkeypatch.setitem(sys.modules, "fla", older)
    assert "FLA is 0.5.2" in str(ours.GATED_DELTA_NET.convert(made("GatedDeltaNet"), None))


def test_a_backend_without_the_memorys_ops_is_refused_with_those_that_have_them() -> None:
    assert "backend 'inductor' has no gated_delta_step; these have it: " in str(ours.GATED_DELTA_NET.convert(made("GatedDeltaNet"), "inductor"))


def test_other_layers_are_not_recognised() -> None:
    assert not any(known.recognise(nn.Linear(2, 2)) for known in LAYERS.values())
    assert not ours.DELTA_NET.recognise(made("GatedDeltaNet"))


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=NAMES)
def test_flas_own_layers_convert_and_equal_the_formula(name: str, changes: dict[str, object]) -> None:
    """FLA's own forward needs a GPU: that it is not what runs here shows in that this runs."""
    layers = pytest.importorskip("fla.layers", reason="FLA is not installed: pip install flash-linear-attention")
    cache_utils = pytest.importorskip("fla.models.cache_utils", reason="FLA's models need transformers: pip install transformers")
    torch.manual_seed(5)
    sizes = {"head_dim": 16, "num_heads": 2, "expand_v": 1} if name == "GatedDeltaNet" else {"num_heads": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = getattr(layers, name)(hidden_size=64, layer_idx=0, **{**sizes, **changes}).double().eval()
    x, cache = torch.randn(1, 9, 64, dtype=torch.float64), cache_utils.Cache()
    expected = expected_of(name, layer, x)
    swapped(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], expected, rtol=1e-8, atol=1e-9)
        parts = [layer(part, past_key_values=cache, use_cache=True)[0] for part in x.split((5, 1, 3), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-8, atol=1e-9)
    assert cache.get_seq_length() == 9

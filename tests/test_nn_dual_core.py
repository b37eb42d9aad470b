"""TitansDualCore: the original layer's numbers from its state dict, every form against a token-by-token float64 layer written here, and what a form promises."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import titans_backends as tb
from tests.golden_table import Ledger
from titans_backends.contracts import CONTRACTS
from titans_backends.nn import Level, TitansDualCore

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
FORMS: Mapping[str, dict[str, object]] = {
    "flat": {"mode": "flat"},
    "flat exact": {"mode": "flat", "transform": "exact", "merge": "head"},
    "flat original": {"mode": "flat", "chunking": "original"},
    "dual": {"mode": "dual"},
    "dual psi": {"mode": "dual", "resonance": True, "merge": "flux"},
    "dual lam": {"mode": "dual", "transform": "lam", "chunk_size": 8, "resonance": True, "merge": "scalar"},
    "dual original": {"mode": "dual", "chunking": "original"},
    "loop": {"mode": "loop"},
    "loop original": {"mode": "loop", "chunking": "original", "merge": "fixed", "alpha": 0.3},
    "loop exact": {"mode": "loop", "transform": "exact", "coupling": "batch", "merge": "head"},
    "recurrent": {"mode": "recurrent"},
    "recurrent by chunks": {"mode": "recurrent", "decay": "previous_chunk", "merge": "flux"},
    "recurrent of four cores": {"mode": "recurrent", "levels": (Level(1, 0.2), Level(2, 0.1, "mean"))},
    "flat of three cores": {"mode": "flat", "levels": (Level(1, 0.3, "sum"),)},
}
BY_FORM = pytest.mark.parametrize("form", FORMS)


def layer_of(form: str, seed: int = 0, **more: object) -> TitansDualCore:
    """A small float64 layer with chunks of 16, its parameters far from their initial values: a flux of 0.5 everywhere would hide a wrong one."""
    torch.manual_seed(seed)
    layer = TitansDualCore(24, 2, **{"chunk_size": 16, "expand_v": 2.0, "dtype": torch.float64, **FORMS[form], **more})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for bias in (layer.slow_decay_bias, layer.fast_decay_bias):
            bias.copy_(torch.randn_like(bias))
    return layer


def tokens(batch: int, seq_len: int, seed: int = 1) -> Tensor:
    """x [B, T, 24], float64."""
    return torch.randn(batch, seq_len, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the original


def original(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """A golden layer's state dict, its other tensors, and the sizes in its metadata."""
    with safe_open(path, "pt") as opened:
        sizes = {name: int(opened.metadata()[name]) for name in ("d_model", "num_heads")}
    stored = load_file(path)
    state_dict = {name.removeprefix("sd."): t for name, t in stored.items() if name.startswith("sd.")}
    return state_dict, {name: t for name, t in stored.items() if not name.startswith("sd.")}, sizes


@pytest.mark.golden("lam_*_layer_*")
@DTYPES
def test_flat_and_loop_are_the_originals_layers(golden_file: Path, dtype: torch.dtype) -> None:
    state_dict, stored, sizes = original(golden_file)
    mode = "flat" if "after" in golden_file.name else "loop"
    layer = TitansDualCore(**sizes, mode=mode, chunking="original")
    layer.load_state_dict(state_dict, strict=True)
    layer.to(dtype)
    ledger = Ledger.of("layer", dtype)
    with torch.no_grad():
        ledger.add("y without states", layer(stored["x"].to(dtype)), stored["y"])
        y, (fast, slow), loss = layer(stored["x"].to(dtype), return_states=True)
    ledger.add("y", y, stored["y"])
    ledger.add("S_slow", slow, stored["S_slow"])
    ledger.add("ortho_loss", loss.reshape(1), stored["ortho_loss"])
    if mode == "loop":
        ledger.add("S_fast", fast, stored["S_fast"])
    ledger.settle()
    assert fast.shape == stored["S_fast"].shape
    assert fast.any() == stored["S_fast"].any()


@pytest.mark.golden("lam_*_layer_d64h2v1_T16")
@pytest.mark.parametrize("mode", ["flat", "loop", "dual", "recurrent"])
def test_every_mode_loads_either_originals_state_dict(golden_file: Path, mode: str) -> None:
    state_dict, stored, sizes = original(golden_file)
    layer = TitansDualCore(**sizes, mode=mode)
    layer.load_state_dict(state_dict, strict=True)
    assert {name: t.shape for name, t in layer.state_dict().items()} == {name: t.shape for name, t in state_dict.items()}
    assert layer(stored["x"]).isfinite().all()


# --- every form against a layer written token by token


def plain_layer(layer: TitansDualCore, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, S_fast and S_slow for one sequence [T, D], by loops; only the sizes, the form and the parameters are the layer's."""
    form, p, seq_len = layer.form, layer.state_dict(), len(x)
    heads, given = layer.num_heads, seq_len
    if form.chunking == "original" and seq_len >= 64 and seq_len % 32:
        x = torch.cat([x, x.new_zeros(32 - seq_len % 32, x.shape[1])])
    seq_len = len(x)
    chunk = seq_len if form.chunking == "original" and (seq_len % form.chunk_size or seq_len <= 32) else form.chunk_size

    def convolved(name: str) -> Tensor:
        z = x @ p[f"{name}_proj.weight"].T
        weight, y = p[f"{name}_conv1d.conv.weight"], p[f"{name}_conv1d.conv.bias"].repeat(seq_len, 1)
        first = -3 if form.mode == "recurrent" else -2
        for t in range(seq_len):
            for tap in range(4):
                if 0 <= t + first + tap < seq_len:
                    y[t] += weight[:, 0, tap] * z[t + first + tap]
        return (y * y.sigmoid()).reshape(seq_len, heads, -1)

    def network(name: str, features: Tensor) -> Tensor:
        hidden = features @ p[f"resonance_flux.{name}.0.weight"].T + p[f"resonance_flux.{name}.0.bias"]
        out = (hidden * hidden.sigmoid()) @ p[f"resonance_flux.{name}.2.weight"].T + p[f"resonance_flux.{name}.2.bias"]
        return out[..., 0].sigmoid().clamp(0.01, 0.99)

    q, k, v = (convolved(name) for name in "qkv")
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    beta, fast_gate, slow_gate = ((x @ p[f"{name}_proj.weight"].T).sigmoid()[..., None] for name in ("b", "fast_gate", "slow_gate"))
    decay, fast_decay = (
        (x @ p[f"{core}_decay_proj.weight"].T + p[f"{core}_decay_proj.bias"] + p[f"{core}_decay_bias"]).sigmoid() for core in ("slow", "fast")
    )
    alpha: Tensor | float = form.alpha
    if form.merge == "flux":
        alpha = 0.5 + 0.3 * network("token_flux_proj", torch.cat([beta * k, beta * v], -1))[..., None]
    elif form.merge != "fixed":
        alpha = p["merge.logit"].sigmoid()[..., None]

    slow = x.new_zeros(heads, k.shape[2], v.shape[2])
    fast_o, slow_o, fast = torch.zeros_like(v), torch.zeros_like(v), torch.zeros_like(slow)
    for start in range(0, seq_len, chunk):
        part = slice(start, min(start + chunk, seq_len))
        u, w = lam_or_exact(k[part], v[part], beta[part], form.transform)
        factor = decay[part].mean(0)
        if form.resonance:
            energy = torch.einsum("chk,hkv,chv->ch", k[part], p["resonance_flux.W_bilinear"], u) / p["resonance_flux.temp"]
            resonance = network("flux_net", torch.cat([k[part].mean(0), u.mean(0), energy.mean(0)[:, None]], -1))
            factor = factor * (1 - 0.05 * resonance)
        if form.decay == "previous_chunk":
            factor = decay[start - chunk : start].mean(0) if start else torch.ones(heads, dtype=x.dtype)
        if form.mode == "loop":
            psi = resonance[:, None, None]
            strength = 0.05 + 0.1 * (psi.mean() if form.coupling == "batch" else psi)
            fast_factor = fast_decay[part].mean(0)[:, None, None] * (1 - 0.1 * psi)
            written = []
            for state, decays, gate, out in ((fast, fast_factor, fast_gate, fast_o), (slow, factor[:, None, None], slow_gate, slow_o)):
                state = decays * state
                running = read = state / (state.norm(dim=(-2, -1), keepdim=True) + 1e-8)
                for i, t in enumerate(range(start, part.stop)):
                    update = torch.einsum("hk,hv->hkv", k[t], u[i] - torch.einsum("hk,hkv->hv", w[i], read))
                    running, state = running + update, state + update
                    out[t] = torch.einsum("hk,hkv->hv", q[t], running) * (gate[t] if out is fast_o else 1)
                written.append(state)
            mixed = written[0] + strength * psi * written[1], written[1] + strength * (1 - psi) * written[0]
            fast, slow = (state / (state.norm(dim=(-2, -1), keepdim=True) + 1e-8) for state in mixed)
            continue
        fast = torch.zeros_like(slow)
        slow = before = slow if form.decay == "token" else slow * factor[:, None, None]
        read = torch.zeros_like(slow) if form.mode == "flat" else before
        for i, t in enumerate(range(start, part.stop)):
            fast = fast + torch.einsum("hk,hv->hkv", k[t], beta[t] * v[t])
            fast_o[t] = fast_gate[t] * torch.einsum("hk,hkv->hv", q[t], fast)
            if form.decay == "token":
                slow = slow * decay[t][:, None, None]
                slow = slow + torch.einsum("hk,hv->hkv", k[t], beta[t] * (v[t] - torch.einsum("hk,hkv->hv", k[t], slow)))
                slow_o[t] = torch.einsum("hk,hkv->hv", q[t], slow)
                continue
            update = u[i] if form.mode == "flat" else u[i] - torch.einsum("hk,hkv->hv", w[i], before)
            read = read + torch.einsum("hk,hv->hkv", k[t], update)
            slow = slow + torch.einsum("hk,hv->hkv", k[t], update)
            slow_o[t] = torch.einsum("hk,hkv->hv", q[t], read)
    o = alpha * fast_o + (1 - alpha) * slow_gate * slow_o
    o = o * (1 - sum(level.weight for level in form.levels))
    for index, level in enumerate(form.levels):
        deep, rates = torch.zeros_like(slow), slice(index * heads, (index + 1) * heads)
        eta, gate = ((x @ p[f"level_{name}_proj.weight"].T).sigmoid()[:, rates, None] for name in ("eta", "gate"))
        for start in range(0, seq_len, chunk * level.period):
            block = slice(start, start + chunk * level.period)
            o[block] += level.weight * gate[block] * torch.einsum("thk,hkv->thv", q[block], deep)
            missed = v[block] - torch.einsum("thk,hkv->thv", k[block], deep)
            by = {"sum": 1.0, "mean": float(chunk * level.period), "safe": eta[block].sum(0).clamp_min(1)[..., None]}[level.normalize]
            deep = deep + torch.einsum("thk,thv->hkv", eta[block] * k[block], missed) / by
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["o_norm.weight"] * (x @ p["g_proj.weight"].T).reshape(o.shape).sigmoid()
    if form.mode in ("flat", "dual"):
        slow = slow / (slow.norm(dim=(-2, -1), keepdim=True) + 1e-8)
    return (o.flatten(1) @ p["o_proj.weight"].T)[:given], torch.zeros_like(fast) if form.mode == "flat" else fast, slow


def lam_or_exact(k: Tensor, v: Tensor, beta: Tensor, transform: str) -> tuple[Tensor, Tensor]:
    """u and w of one chunk, [C, H, ...]."""
    k, right = k.transpose(0, 1), torch.cat([beta * v, beta * k], -1).transpose(0, 1)
    a = -(beta.transpose(0, 1) * (k @ k.mT)).tril(-1)
    eye = torch.eye(a.shape[-1], dtype=a.dtype)
    t = torch.linalg.inv(eye - a) if transform == "exact" else eye + a + (a @ a.mT).tril(-1)
    u, w = (t @ right).transpose(0, 1).split([v.shape[2], k.shape[2]], -1)
    return u, w


@BY_FORM
def test_a_layer_is_what_its_form_says(form: str) -> None:
    layer = layer_of(form).requires_grad_(False)
    for seq_len in (5, 32, 41, 70):
        x = tokens(1 if layer.form.coupling == "batch" else 2, seq_len)
        y, states, _ = layer(x, return_states=True)
        for row in range(len(x)):
            for name, got, want in zip(("y", "S_fast", "S_slow"), (y, *states), plain_layer(layer, x[row]), strict=True):
                torch.testing.assert_close(got[row], want, rtol=1e-8, atol=1e-9, msg=lambda told, name=name, t=seq_len: f"{name}, T = {t}: {told}")


@BY_FORM
def test_gradients_are_those_of_the_references(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(form), tokens(2, 37)
    weight = tokens(2, 37, seed=2)

    def gradients() -> dict[str, Tensor]:
        layer.zero_grad()
        y, _, loss = layer(x, return_states=True)
        ((y * weight).sum() + loss).backward()
        return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}

    got = gradients()
    with monkeypatch.context() as patch:
        replace_ops(patch, reference_op)
        want = gradients()
    assert got.keys() == want.keys()
    for name in got:
        torch.testing.assert_close(got[name], want[name], rtol=1e-7, atol=1e-9, msg=lambda told, name=name: f"{name}: {told}")
    assert ("resonance_flux.W_bilinear" in got) == layer.form.resonance
    assert ("resonance_flux.token_flux_proj.0.weight" in got) == (layer.form.merge == "flux")


def reference_op(name: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """The contract's reference, which autograd differentiates."""
    contract = CONTRACTS[name]
    return lambda *args, **kwargs: contract.reference(contract.make_call(*args, **kwargs))


def replace_ops(patch: pytest.MonkeyPatch, by: Callable[[str], object]) -> None:
    """`get_op` wherever the layer names it."""
    for name, where in list(sys.modules.items()):
        if name.startswith("titans_backends.nn.") and hasattr(where, "get_op"):
            patch.setattr(where, "get_op", lambda name, backend=None: by(name))


# --- what a form promises


@BY_FORM
def test_padding_changes_nothing_that_the_mask_keeps(form: str) -> None:
    layer, x = layer_of(form).requires_grad_(False), tokens(4, 75)
    mask = torch.zeros(4, 75, dtype=torch.bool)
    mask[0, :70], mask[1, 75 - 33 :], mask[2, 10:50:3] = True, True, True  # behind, before, and in holes; a row that is all padding
    y, states, _ = layer(x, mask, return_states=True)
    assert not y[~mask].any()
    for row in range(3):
        alone, alone_states, _ = layer(x[row][mask[row]][None], return_states=True)
        torch.testing.assert_close(y[row][mask[row]], alone[0], rtol=1e-9, atol=1e-10)
        for got, want in zip(states, alone_states, strict=True):
            torch.testing.assert_close(got[row], want[0], rtol=1e-9, atol=1e-10)
    assert not any(state[3].any() for state in states)
    torch.testing.assert_close(layer(x, mask.long()), y)


@BY_FORM
def test_packed_sequences_are_the_sequences(form: str) -> None:
    layer, x = layer_of(form).requires_grad_(False), tokens(1, 110)
    y = layer(x, cu_seqlens=torch.tensor([0, 70, 70, 77, 110], dtype=torch.int32))
    for start, stop in ((0, 70), (70, 77), (77, 110)):
        torch.testing.assert_close(y[:, start:stop], layer(x[:, start:stop]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", ["recurrent", "recurrent by chunks"])
def test_recurrent_does_not_look_ahead(form: str) -> None:
    layer, x = layer_of(form).requires_grad_(False), tokens(1, 60)
    for seq_len in (1, 16, 41):
        torch.testing.assert_close(layer(x)[:, :seq_len], layer(x[:, :seq_len]), rtol=1e-9, atol=1e-10)


@BY_FORM
def test_inference_calls_no_flux_network_that_it_does_not_use_and_makes_no_state(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = layer_of(form).eval().requires_grad_(False), []

    def recording(name: str) -> Callable[..., tuple[Tensor | None, ...]]:
        def op(*args: object, **kwargs: object) -> tuple[Tensor | None, ...]:
            calls.append((name, kwargs.get("output_final_state", False)))
            return tb.get_op(name)(*args, **kwargs)

        return op

    replace_ops(monkeypatch, recording)
    layer(tokens(1, 20))
    psi = layer.form.mode == "loop" or (layer.form.mode == "dual" and layer.form.resonance)
    resonance = ["uw_transform", "chunk_flux"] * psi
    core = "coupled_core" if layer.form.mode == "loop" else "dual_core"
    levels = ["deep_core"] * len(layer.form.levels)
    called = ["qkv_prepare", *["token_flux"] * (layer.form.merge == "flux"), *resonance, core, *levels, "gated_rms_norm"]
    assert calls == [(name, False) for name in called]


def test_coupling_by_the_batch_lets_a_row_depend_on_its_neighbours_and_by_the_head_does_not() -> None:
    x = tokens(2, 70)
    for coupling in ("batch", "head"):
        layer = layer_of("loop", coupling=coupling).requires_grad_(False)
        torch.testing.assert_close(layer(x[:1].expand(2, -1, -1))[:1], layer(x[:1]))
        assert torch.allclose(layer(x)[:1], layer(x[:1]), rtol=1e-9, atol=1e-10) == (coupling == "head")


@BY_FORM
def test_no_sequences_and_no_tokens_are_a_result_too(form: str) -> None:
    layer = layer_of(form)
    for batch, seq_len in ((0, 5), (2, 0)):
        for mask in (None, torch.ones(batch, seq_len, dtype=torch.bool)):
            y, states, _ = layer(tokens(batch, seq_len), mask, return_states=True)
            assert y.shape == (batch, seq_len, 24)
            assert [state.shape for state in states] == [(batch, 2, 12, 24)] * 2


def test_expand_says_how_wide_keys_and_values_are() -> None:
    layer = TitansDualCore(24, 3, chunk_size=16, expand_k=0.5, expand_v=2.0)
    assert [getattr(layer, f"{name}_proj").weight.shape for name in "qkv"] == [(12, 24), (12, 24), (48, 24)]
    assert layer(torch.zeros(1, 20, 24)).shape == (1, 20, 24)
    for arguments, told in (
        ({"expand_k": 0.01}, "expand_k=0.01 gives 0 channels"),
        ({"expand_v": 0.75}, "expand_v=0.75 gives 18 channels, which num_heads=4"),
    ):
        with pytest.raises(ValueError, match=told):
            TitansDualCore(24, 4, **arguments)


def test_a_learned_merge_begins_at_alpha() -> None:
    x, fixed = tokens(1, 20), layer_of("recurrent", alpha=0.3)
    for merge in ("scalar", "head"):
        learned = TitansDualCore(24, 2, chunk_size=16, expand_v=2.0, dtype=torch.float64, merge=merge, alpha=0.3)
        told = learned.load_state_dict(fixed.state_dict(), strict=False)
        assert told.missing_keys == ["merge.logit"]
        torch.testing.assert_close(learned(x), fixed(x))


def test_a_fresh_layer_keeps_nine_tenths_of_its_memory_from_chunk_to_chunk() -> None:
    for mode in ("flat", "dual", "recurrent"):
        layer = TitansDualCore(24, 2, mode=mode, chunk_size=16, dtype=torch.float64)
        kept = layer.slow_decay_bias.sigmoid() ** (16 if mode == "recurrent" else 1)
        torch.testing.assert_close(kept, torch.full_like(kept, 0.9))


@pytest.mark.parametrize("form", ["flat", "dual psi", "recurrent"])
def test_sixteen_bits_run_plain_and_by_autocast(form: str) -> None:
    layer, x = layer_of(form).float(), tokens(2, 40).float()
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
    plain = layer.bfloat16()(x.bfloat16())
    for got in (mixed, plain):
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).norm() < 0.05 * want.norm()
    plain.float().sum().backward()
    assert layer.q_proj.weight.grad is not None


# --- refusals


def test_another_dtype_is_refused_where_nothing_casts_it() -> None:
    layer, x = TitansDualCore(24, 2, chunk_size=16), tokens(1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.half()).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"x is torch.float64 .*torch.autocast \(which leaves float64"):
            layer(x)
    for module in layer.children():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, given: (given[0].float(),))
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"mode": "fast"}, tb.UnknownNameError, "known: 'flat', 'loop', 'dual', 'recurrent'"),
        ({"merge": "mean"}, tb.UnknownNameError, "unknown merge 'mean'"),
        ({"chunking": "original"}, ValueError, "must not; pass chunking='regular'"),
        ({"transform": "lam"}, ValueError, "belongs to mode='dual' or 'flat'"),
        ({"resonance": True}, ValueError, "belongs to mode='dual'"),
        ({"decay": "chunk"}, ValueError, "mode='flat' or 'loop' or 'dual' takes 'chunk'"),
        ({"mode": "flat", "resonance": False}, ValueError, "leave it out"),
        ({"chunk_size": 0}, ValueError, "at least 1, got 0"),
        ({"merge": "head", "alpha": 1.0}, ValueError, "both excluded, got 1.0"),
        ({"num_heads": 5}, ValueError, "num_heads=5 must divide"),
        ({"coupling": "head"}, ValueError, "mode='recurrent' couples nothing"),
        ({"mode": "loop", "resonance": False}, ValueError, "leave resonance out"),
        ({"mode": "flat", "chunking": "original", "levels": [Level()]}, ValueError, "a model that has none"),
        ({"levels": [Level(weight=0.6), Level(weight=0.4)]}, ValueError, "sum must be below 1"),
    ],
)
def test_a_form_without_meaning_is_refused(arguments: dict[str, object], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        TitansDualCore(24, **{"num_heads": 2, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"cache": object()}, TypeError, r"layer.new_cache\(2\), got object"),
        ({"x": torch.zeros(2, 3, 24, dtype=torch.bfloat16)}, TypeError, r"x is torch.bfloat16 .* torch.float32; pass x.to\(torch.float32\)"),
        ({"x": torch.zeros(2, 3, 24, dtype=torch.int64)}, TypeError, "x is torch.int64 and the layer's weights are torch.float32"),
        ({"x": torch.zeros(2, 3, 25)}, ValueError, r"\[B, T, 24\], got \(2, 3, 25\)"),
        ({"attention_mask": torch.zeros(2, 3)}, TypeError, "pass mask == 0"),
        ({"attention_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"\[2, 3\], got \[2, 4\]"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, r"reshape x to \[1, B \* T, 24\]"),
        ({"cu_seqlens": torch.tensor([0, 3]), "attention_mask": torch.ones(2, 3)}, ValueError, "pass one"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(arguments: dict[str, object], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        TitansDualCore(24, 2)(**{"x": torch.zeros(2, 3, 24), **arguments})


@pytest.mark.parametrize("ends", [[0, 33, 60], [1, 33, 70], [0, 71, 70]], ids=["too short", "not from 0", "a step back"])
@pytest.mark.parametrize("mode", ["flat", "dual", "loop"])
def test_the_original_chunks_take_no_wrong_cu_seqlens(mode: str, ends: list[int]) -> None:
    layer = TitansDualCore(24, 2, mode=mode, chunking="original")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must begin with 0, never decrease and end with T = 70"):
        layer(torch.randn(1, 70, 24), cu_seqlens=torch.tensor(ends))


def test_a_decay_that_underflows_forgets_and_is_no_nan() -> None:
    layer = TitansDualCore(24, 2, decay="previous_chunk", chunk_size=8)
    torch.nn.init.constant_(layer.slow_decay_bias, -200.0)
    x = torch.randn(1, 40, 24)
    y, cache = layer(x), layer.new_cache(1)
    assert y.isfinite().all()
    torch.testing.assert_close(torch.cat([layer(part, cache=cache) for part in x.split(11, 1)], 1), y, rtol=1e-4, atol=1e-5)


def test_an_alpha_that_the_flux_would_replace_is_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha=0\.9 would do nothing: merge='flux'"):
        TitansDualCore(24, 2, mode="loop", alpha=0.9)

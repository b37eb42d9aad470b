"""The original implementations' numbers, through `get_op`, in float64 and float32: outputs, states and gradients.

Where several ops can make the same numbers, each of these routes is held to them. Runs on what dispatch chooses, or on `--backend`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import titans_backends as tb
from tests.golden_table import Ledger
from tests.lam_flux import resonance, token_flux

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
RULE = pytest.mark.golden("hf_gdr_*", "fla_gdr_*", "fla_dr_*")
RULE_GRADIENTS = pytest.mark.golden("hf_gdr_*_grad", "fla_gdr_*_grad", "fla_dr_*_grad", "fla_gdr_varlen_*")
OWN = pytest.mark.golden("own_*")
DUAL_KERNEL = pytest.mark.golden("lam_dualkernel_*")
LAM_AFTER = pytest.mark.golden("lam_after_T*")
LAM_AFTER_LAYER = pytest.mark.golden("lam_after_layer_*")
LAM_BEFORE = pytest.mark.golden("lam_before_T*")
LAM_BEFORE_GRADIENTS = pytest.mark.golden("lam_before_grad_*")


@dataclass(frozen=True, slots=True)
class File:
    """A golden file: its tensors as stored, and its metadata."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def cast(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """The floating tensors in another dtype."""
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.tensors.items()}


def read(path: Path) -> File:
    """One file."""
    with safe_open(path, "pt") as opened:
        return File(load_file(path), dict(opened.metadata()))


@pytest.fixture
def using(request: pytest.FixtureRequest) -> Iterator[None]:
    """The backend of this test: what dispatch chooses, or the one that `--backend` names; a refusal is a skip with the reason."""
    name: str | None = request.param
    if name is None:
        yield
        return
    with tb.use_backend(name):
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "using" in metafunc.fixturenames:
        asked = [name.strip() for value in metafunc.config.getoption("--backend") for name in value.split(",")]
        metafunc.parametrize("using", list(dict.fromkeys(asked)) or [None], ids=lambda name: name or "chosen", indirect=True)


def run(op: str, *args: object, **kwargs: object) -> tuple[Tensor | None, ...]:
    """One call; a forced backend that refuses it skips the test with its reasons."""
    try:
        return tb.get_op(op)(*args, **kwargs)
    except tb.BackendRefusedError as refusal:
        pytest.skip(str(refusal))


# --- the delta rule of transformers and FLA, by five routes


@dataclass(frozen=True, slots=True)
class Rule:
    """The arguments of a gated delta rule. `normalise`: q and k are raw."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    normalise: bool

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    def normalised(self) -> Rule:
        """The same with q and k normalised by the caller."""
        if not self.normalise:
            return self
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (self.q, self.k))
        return replace(self, q=q, k=k, normalise=False)


def rule_of(file: File, tensors: Mapping[str, Tensor], *, with_state: bool = True) -> Rule:
    """A file's inputs; `tensors` are its tensors in the dtype of the computation."""
    assert file.metadata["scale"].startswith("K**-0.5")
    return Rule(
        tensors["q"],
        tensors["k"],
        tensors["v"],
        tensors["beta"],
        tensors.get("g"),
        tensors["initial_state"] if with_state else None,
        tensors.get("cu_seqlens"),
        file.metadata.get("use_qk_l2norm_in_kernel") == "true",
    )


Outcome = tuple[Tensor | None, Tensor | None]


def whole(x: Rule, chunk_size: int | None = None) -> Outcome:
    """The op itself; its scale is K ** -0.5 by default."""
    o, state = run(
        "gated_delta_rule", x.q, x.k, x.v, x.beta, x.g,
        chunk_size=chunk_size, initial_state=x.initial_state, output_final_state=True, qk_l2norm=x.normalise, cu_seqlens=x.cu_seqlens,
    )  # fmt: skip
    return o, state


def whole_in_chunks_of_32(x: Rule) -> Outcome:
    """The op with a chunk size, on keys that the caller normalised."""
    return whole(x.normalised(), 32)


def composed(x: Rule) -> Outcome:
    """`uw_transform`, then `slow_core`."""
    x = x.normalised()
    u, w = run("uw_transform", x.k, x.v, x.beta, x.g, chunk_size=64, cu_seqlens=x.cu_seqlens)
    o, state = run(
        "slow_core", x.q, x.k, u, w,
        g=x.g, chunk_size=64, scale=x.scale, initial_state=x.initial_state, output_final_state=True, cu_seqlens=x.cu_seqlens,
    )  # fmt: skip
    return o, state


def slow_half(x: Rule) -> Outcome:
    """`dual_core` with no weight on its fast core."""
    o, state, _ = run(
        "dual_core", x.q, x.k, x.v, x.beta, x.g,
        alpha=0.0, chunk_size=64, scale=x.scale, initial_state=x.initial_state, output_final_state=True,
        qk_l2norm=x.normalise, cu_seqlens=x.cu_seqlens,
    )  # fmt: skip
    return o, state


def stepped(x: Rule) -> Outcome:
    """`gated_delta_step`, five tokens at a time; packed sequences take turns in a pool with one slot each."""
    seq_len, values = x.q.shape[1], x.v.shape[-1]
    ends = [0, seq_len] if x.cu_seqlens is None else [int(end) for end in x.cu_seqlens]
    sequences = x.q.shape[0] if x.cu_seqlens is None else len(ends) - 1
    state: Tensor | None = x.initial_state
    if state is None:
        state = x.v.new_zeros(sequences, x.v.shape[2], x.k.shape[-1], values)
    parts = []
    for slot, (begin, end) in enumerate(itertools.pairwise(ends)):
        where = None if x.cu_seqlens is None else torch.tensor([slot])
        for start in range(begin, end, 5):
            part = slice(start, min(start + 5, end))
            g = None if x.g is None else x.g[:, part]
            o, state = run(
                "gated_delta_step", x.q[:, part], x.k[:, part], x.v[:, part], x.beta[:, part], g,
                state=state, state_indices=where, qk_l2norm=x.normalise,
            )  # fmt: skip
            assert o is not None
            parts.append(o)
    return torch.cat(parts, 1), state


ROUTES: Mapping[str, Callable[[Rule], Outcome]] = {f.__name__: f for f in (whole, whole_in_chunks_of_32, composed, slow_half, stepped)}
BY_ROUTE = pytest.mark.parametrize("route", ROUTES)


@pytest.mark.usefixtures("using")
@RULE
@DTYPES
@BY_ROUTE
def test_delta_rule_outputs_and_states_are_the_originals(golden_file: Path, dtype: torch.dtype, route: str) -> None:
    file, ledger = read(golden_file), Ledger.of("float32 inside", dtype)
    with torch.no_grad():
        o, state = ROUTES[route](rule_of(file, file.cast(dtype)))
        for name in ("o", "o_recurrent", "o_chunk"):
            if name in file:
                ledger.add(name, o, file[name])
        ledger.add("final_state", state, file["final_state"])
        for suffix in ("nostate", "chunk_nostate"):
            if f"o_{suffix}" in file:
                o, state = ROUTES[route](rule_of(file, file.cast(dtype), with_state=False))
                ledger.add(f"o_{suffix}", o, file[f"o_{suffix}"])
                ledger.add(f"final_state_{suffix}", state, file[f"final_state_{suffix}"])
    ledger.settle()


@pytest.mark.usefixtures("using")
@RULE_GRADIENTS
@DTYPES
@BY_ROUTE
def test_delta_rule_gradients_are_the_originals(golden_file: Path, dtype: torch.dtype, route: str) -> None:
    file, ledger = read(golden_file), Ledger.of("float32 inside", dtype)
    tensors = file.cast(dtype)
    names = [name for name in ("q", "k", "v", "beta", "g", "initial_state") if name in file]
    leaves = {name: tensors[name].requires_grad_() for name in names}
    o, state = ROUTES[route](rule_of(file, {**tensors, **leaves}))
    assert o is not None
    assert state is not None
    ledger.add("o", o, file["o"])
    ledger.add("final_state", state, file["final_state"])
    found = torch.autograd.grad((o, state), list(leaves.values()), (tensors["do"], tensors["dht"]))
    for name, gradient in zip(leaves, found, strict=True):
        ledger.add(f"d{name}", gradient, file[f"d{name}"], gradient=True)
    ledger.settle()


# --- the project's reference, as it was before this project


def chunk_of(file: File) -> int:
    """The chunk size of an own_* file."""
    return int(file.metadata["chunk"])


@pytest.mark.usefixtures("using")
@OWN
@DTYPES
def test_fast_core_takes_v_scaled_by_beta(golden_file: Path, dtype: torch.dtype) -> None:
    file, ledger = read(golden_file), Ledger.of("float64 inside", dtype)
    x = file.cast(dtype)
    o, _ = run("fast_core", x["q"], x["k"], x["beta"][..., None] * x["v"], gate=x["fast_gate"], chunk_size=chunk_of(file))
    ledger.add("o_fast", o, file["o_fast"])
    ledger.settle()


@pytest.mark.usefixtures("using")
@OWN
@DTYPES
@pytest.mark.parametrize("transform", ["exact", "lam"])
def test_both_transforms_and_the_slow_core_on_them(golden_file: Path, dtype: torch.dtype, transform: str) -> None:
    file, ledger = read(golden_file), Ledger.of("float64 inside", dtype)
    x = file.cast(dtype)
    u, w = run("uw_transform", x["k"], x["v"], x["beta"], x["g"], chunk_size=chunk_of(file), transform=transform)
    ledger.add("u", u, file[f"u_{transform}"])
    ledger.add("w", w, file[f"w_{transform}"])
    o, state = slow(file, x, x[f"u_{transform}"], x[f"w_{transform}"])
    ledger.add("o_slow", o, file[f"o_slow_{transform}"])
    ledger.add("S_slow", state, file[f"S_slow_{transform}"])
    ledger.settle()


def slow(file: File, x: Mapping[str, Tensor], u: Tensor | None, w: Tensor | None, *, normalised: bool = False) -> Outcome:
    """`slow_core` as an own_* file has it."""
    o, state = run(
        "slow_core", x["q"], x["k"], u, w,
        g=x["g"], gate=x["slow_gate"], chunk_size=chunk_of(file), scale=int(file.metadata["K"]) ** -0.5, initial_state=x["S0"],
        output_final_state=True, normalize_read=normalised, normalize_final=normalised,
    )  # fmt: skip
    return o, state


@pytest.mark.usefixtures("using")
@OWN
@DTYPES
def test_the_normalised_read_and_final_state(golden_file: Path, dtype: torch.dtype) -> None:
    file, ledger = read(golden_file), Ledger.of("float64 inside", dtype)
    x = file.cast(dtype)
    o, state = slow(file, x, x["u_lam"], x["w_lam"], normalised=True)
    ledger.add("o_slow_lam_normread", o, file["o_slow_lam_normread"])
    ledger.add("S_slow_lam_normread_normfinal", state, file["S_slow_lam_normread_normfinal"])
    ledger.settle()


@pytest.mark.usefixtures("using")
@OWN
@DTYPES
@pytest.mark.parametrize("transform", ["exact", "lam"])
def test_fused_uw_is_the_product_with_the_inverse(golden_file: Path, dtype: torch.dtype, transform: str) -> None:
    """T is made here, from the formula: one matrix per chunk, the last chunk padded with k = 0 and beta = 0."""
    file, ledger = read(golden_file), Ledger.of("float64 inside", dtype)
    x, chunk, seq_len = file.cast(torch.float64), chunk_of(file), file["k"].shape[1]

    def chunked(t: Tensor) -> Tensor:  # [B, T, H, D] as [B, N, H, C, D]
        padded = torch.nn.functional.pad(t, (0, 0, 0, 0, 0, -seq_len % chunk))
        return padded.unflatten(1, (-1, chunk)).transpose(2, 3)

    k, v, beta, g = (chunked(t) for t in (x["k"], x["v"], x["beta"][..., None], x["g"][..., None]))
    total = g.cumsum(-2)
    gamma = (total - total.transpose(-1, -2)).tril().exp().tril()
    a = -(beta * (k @ k.transpose(-1, -2)) * gamma).tril(-1)
    unit = torch.eye(chunk, dtype=torch.float64)
    inverse = torch.linalg.inv(unit - a) if transform == "exact" else unit + a + (a @ a.transpose(-1, -2)).tril(-1)
    made = run("fused_uw", *(t.to(dtype) for t in (inverse.tril(), beta * v, beta * total.exp() * k)))
    for name, got in zip(("u", "w"), made, strict=True):
        assert got is not None
        ledger.add(name, got.transpose(2, 3).flatten(1, 2)[:, :seq_len], file[f"{name}_{transform}"])
    ledger.settle()


@pytest.mark.usefixtures("using")
@OWN
@DTYPES
def test_gated_delta_rule_is_the_exact_slow_core(golden_file: Path, dtype: torch.dtype) -> None:
    file, ledger = read(golden_file), Ledger.of("float64 inside", dtype)
    x = file.cast(dtype)
    o, state = run("gated_delta_rule", x["q"], x["k"], x["v"], x["beta"], x["g"], gate=x["slow_gate"], initial_state=x["S0"], output_final_state=True)
    ledger.add("o_slow_exact", o, file["o_slow_exact"])
    ledger.add("S_slow_exact", state, file["S_slow_exact"])
    ledger.settle()


@pytest.mark.usefixtures("using")
@OWN
@DTYPES
@pytest.mark.parametrize("transform", ["exact", "lam"])
def test_dual_core_merges_the_fast_and_the_slow_output(golden_file: Path, dtype: torch.dtype, transform: str) -> None:
    """The file scales the two cores differently; both are linear in scale. alpha is per token."""
    file, ledger = read(golden_file), Ledger.of("float64 inside", dtype)
    x, stored = file.cast(dtype), file.cast(torch.float64)
    alpha = stored["alpha"][..., None]
    want = alpha * stored["o_fast"] + (1 - alpha) * stored[f"o_slow_{transform}"] * int(file.metadata["K"]) ** 0.5
    o, state, _ = run(
        "dual_core", x["q"], x["k"], x["v"], x["beta"], x["g"],
        fast_gate=x["fast_gate"], slow_gate=x["slow_gate"], alpha=x["alpha"], transform=transform, chunk_size=chunk_of(file),
        initial_state=x["S0"], output_final_state=True,
    )  # fmt: skip
    ledger.add("o", o, want.to(file["o_fast"].dtype))
    ledger.add("S_slow", state, file[f"S_slow_{transform}"])
    ledger.settle()


# --- LAM


def mean_of_each_chunk(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H] as the mean over each chunk, [B, N, H]."""
    return x.unflatten(1, (-1, chunk)).mean(2)


@pytest.mark.usefixtures("using")
@DUAL_KERNEL
@DTYPES
def test_the_dual_kernel_reads_a_normalised_state_and_keeps_the_other(golden_file: Path, dtype: torch.dtype) -> None:
    file, ledger = read(golden_file), Ledger.of("float64 inside", dtype)
    x, chunk = file.cast(dtype), int(file.metadata["C"])
    fast, _ = run("fast_core", x["q"], x["k"], x["v"], gate=x["fast_gate"], chunk_size=chunk)
    decay = mean_of_each_chunk(x["slow_decay"], chunk) * (1 - 0.05 * x["psi"])
    slow_o, state = run(
        "slow_core", x["q"], x["k"], x["u"], x["w"],
        chunk_decay=decay, gate=x["slow_gate"], chunk_size=chunk, output_final_state=True, normalize_read=True,
    )  # fmt: skip
    assert fast is not None
    assert slow_o is not None
    ledger.add("o", 0.1 * fast + 0.9 * slow_o, file["o"])
    ledger.add("S_slow", state, file["S_slow"])
    ledger.settle()


def lam_chunk(seq_len: int, chunk: int) -> int:
    """LAM's rule: a length that is short, or no multiple of the chunk, is one chunk."""
    return seq_len if seq_len <= 32 or seq_len < chunk or seq_len % chunk else chunk


def unit_norm(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) over the last dimension."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def lam_inputs(file: File, dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """Its inputs with q and k normalised as LAM does, x / max(|x|, 1e-12), and its chunk size."""
    x = dict(file.cast(dtype))
    for name in ("q", "k"):
        x[name] = unit_norm(x[name])
    chunk = lam_chunk(x["q"].shape[1], int(file.metadata["chunk_size_argument"]))
    assert chunk == int(file.metadata["effective_chunk"])
    return x, chunk


@pytest.mark.usefixtures("using")
@LAM_AFTER
@DTYPES
def test_lam_after_is_the_flat_dual_core(golden_file: Path, dtype: torch.dtype) -> None:
    file, ledger = read(golden_file), Ledger.of("float64 inside", dtype)
    x, chunk = lam_inputs(file, dtype)
    o, state, fast_state = run(
        "dual_core", x["q"], x["k"], x["v"], x["beta"],
        fast_gate=x["fast_gate"], slow_gate=x["slow_gate"], alpha=0.1, memory="flat", transform="lam", chunk_size=chunk,
    )  # fmt: skip
    assert state is None
    assert fast_state is None
    ledger.add("o", o, file["o"])
    ledger.settle()


@pytest.mark.usefixtures("using")
@LAM_AFTER
@DTYPES
def test_lam_after_is_the_lower_ops_with_a_decay_of_zero(golden_file: Path, dtype: torch.dtype) -> None:
    file, ledger = read(golden_file), Ledger.of("float64 inside", dtype)
    x, chunk = lam_inputs(file, dtype)
    fast, _ = run("fast_core", x["q"], x["k"], x["beta"][..., None] * x["v"], gate=x["fast_gate"], chunk_size=chunk)
    u, w = run("uw_transform", x["k"], x["v"], x["beta"], chunk_size=chunk, transform="lam")
    forget = x["beta"].new_zeros(x["beta"].shape[0], x["beta"].shape[1] // chunk, x["beta"].shape[2])
    slow_o, _ = run("slow_core", x["q"], x["k"], u, w, chunk_decay=forget, gate=x["slow_gate"], chunk_size=chunk)
    assert fast is not None
    assert slow_o is not None
    ledger.add("o", 0.1 * fast + 0.9 * slow_o, file["o"])
    ledger.settle()


def lam_loop(x: Mapping[str, Tensor], chunk: int, *, delta: bool = True) -> tuple[Tensor | None, ...]:
    """LAM's earlier op from normalised q and k: `uw_transform` for psi, then `coupled_core` with LAM's decays, coupling and blend."""
    u, _ = run("uw_transform", x["k"], x["v"], x["beta"], chunk_size=chunk, transform="lam")
    assert u is not None
    psi = resonance(x, x["k"], u, chunk)
    return run(
        "coupled_core", x["q"], x["k"], x["v"], x["beta"], psi,
        coupling=(0.05 + 0.1 * psi.mean((0, 2), keepdim=True)).expand_as(psi),
        fast_decay=mean_of_each_chunk(x["fast_decay"], chunk) * (1 - 0.1 * psi),
        slow_decay=mean_of_each_chunk(x["slow_decay"], chunk) * (1 - 0.05 * psi),
        fast_gate=x["fast_gate"], slow_gate=x["slow_gate"], alpha=0.5 + 0.3 * token_flux(x, x["k"], x["v"], x["beta"]),
        transform="lam", chunk_size=chunk, output_final_state=True, delta=delta,
    )  # fmt: skip


@pytest.mark.usefixtures("using")
@LAM_BEFORE
@DTYPES
@pytest.mark.parametrize("delta", [True, False], ids=["delta", "no delta"])
def test_lam_before_is_the_coupled_core(golden_file: Path, dtype: torch.dtype, delta: bool) -> None:
    file, ledger = read(golden_file), Ledger.of("float64 inside", dtype)
    x, chunk = lam_inputs(file, dtype)
    suffix = "" if delta else "_nodelta"
    with torch.no_grad():
        for name, got in zip(("o", "S_slow", "S_fast"), lam_loop(x, chunk, delta=delta), strict=True):
            ledger.add(name + suffix, got, file[name + suffix])
    ledger.settle()


@pytest.mark.usefixtures("using")
@LAM_BEFORE_GRADIENTS
@DTYPES
def test_gradients_of_lam_before_reach_its_inputs_and_its_flux_networks(golden_file: Path, dtype: torch.dtype) -> None:
    file, ledger = read(golden_file), Ledger.of("float64 inside", dtype)
    leaves = {name: t.requires_grad_() for name, t in file.cast(dtype).items() if f"grad_{name}" in file}
    x = {**leaves, **{name: unit_norm(leaves[name]) for name in ("q", "k")}}
    outputs = lam_loop(x, int(file.metadata["effective_chunk"]))
    arriving = [file[name].to(dtype) for name in ("dO", "dS_slow", "dS_fast")]
    found = torch.autograd.grad([o for o in outputs if o is not None], list(leaves.values()), arriving)
    for name, gradient in zip(leaves, found, strict=True):
        stored = file[f"grad_{name}"]
        meant = stored.abs().max() > 1e-9  # with one chunk the decays cancel: what is stored is rounding
        if meant and not (dtype == torch.float32 and name.startswith("flux.")):  # 1e-8 to 1e-4, sums that cancel: float32 has no digits of them
            ledger.add(name, gradient, stored, gradient=True)


@pytest.mark.usefixtures("using")
@LAM_AFTER_LAYER
@pytest.mark.parametrize("prepared", [False, True], ids=["three convolutions", "prepared"])
def test_lams_flat_layer_is_its_projections_and_our_ops(golden_file: Path, prepared: bool) -> None:
    """Its convolution looks one token ahead and has a bias; the output is normalised over each head and gated."""
    file, ledger = read(golden_file), Ledger.of("float64 inside", torch.float64)
    kept = {name.removeprefix("sd."): t for name, t in file.cast(torch.float64).items()}
    heads, tokens = int(file.metadata["num_heads"]), file["x"].shape[1]
    x = torch.nn.functional.pad(kept["x"], (0, 0, 0, -tokens % 32 if tokens >= 64 else 0))

    def projected(name: str) -> Tensor:
        return (x @ kept[f"{name}_proj.weight"].mT).unflatten(-1, (heads, -1))

    def convolved(name: str) -> Tensor:
        inner = projected(name)
        weight, bias = kept[f"{name}_conv1d.conv.weight"], kept[f"{name}_conv1d.conv.bias"]
        y, _ = run("short_conv", inner, weight.view(*inner.shape[2:], 4), bias.view(inner.shape[2:]), lookahead=1)
        assert y is not None
        return y if name == "v" else torch.nn.functional.normalize(y, dim=-1)

    def prepare() -> tuple[Tensor | None, ...]:
        if not prepared:
            return tuple(convolved(name) for name in "qkv")
        inner = {name: projected(name) for name in "qkv"}
        weights = {f"{n}_weight": kept[f"{n}_conv1d.conv.weight"].view(*inner[n].shape[2:], 4) for n in "qkv"}
        biases = {f"{n}_bias": kept[f"{n}_conv1d.conv.bias"].view(inner[n].shape[2:]) for n in "qkv"}
        return run("qkv_prepare", **inner, **weights, **biases, lookahead=1)[:3]

    beta, fast_gate, slow_gate = (torch.sigmoid(projected(name)[..., 0]) for name in ("b", "fast_gate", "slow_gate"))
    o = run(
        "dual_core", *prepare(), beta,
        fast_gate=fast_gate, slow_gate=slow_gate, alpha=0.1, memory="flat", transform="lam", chunk_size=int(file.metadata["effective_chunk"]),
    )[0]  # fmt: skip
    (normed,) = run("gated_rms_norm", o, projected("g"), kept["o_norm.weight"])
    assert normed is not None
    ledger.add("y", (normed.flatten(2) @ kept["o_proj.weight"].mT)[:, :tokens], file["y"])
    ledger.settle()


# --- the check itself


@DTYPES
def test_one_element_beyond_the_limit_is_a_miss(dtype: torch.dtype) -> None:
    stored = torch.linspace(-1, 1, 64, dtype=torch.float64)
    ledger = Ledger.of("float64 inside", dtype)
    limit = ledger.limit(stored)
    ledger.add("within", stored + torch.eye(64, dtype=torch.float64)[5] * limit * 0.9, stored)
    assert ledger.misses == []
    ledger.add("beyond", stored + torch.eye(64, dtype=torch.float64)[5] * limit * 1.1, stored)
    ledger.add("everywhere", stored * (1 + 0.6 * limit), stored)
    ledger.add("absent", None, stored)
    assert [miss.split(":")[0] for miss in ledger.misses] == ["beyond", "everywhere", "absent"]

"""FLA's functions on our ops: against a token recurrence in float64 written here, every option, every refusal. FLA itself is not needed."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from titans_backends.integrations import fla as ours
from titans_backends.integrations.fla import rule
from titans_backends.integrations.fla.functions import READERS
from titans_backends.integrations.fla.rule import op_for

GATED = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
UNGATED = ("chunk_delta_rule", "fused_recurrent_delta_rule")
B, T, G, H, K, V = 2, 21, 2, 4, 8, 12


def recurrence(q, k, v, beta=None, g=None, *, scale=None, state=None, l2norm=False, bounds=None):
    """The rule token by token; `bounds` are those of packed sequences. Returns o and the states `[N, H, K, V]`."""
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    if l2norm:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outputs, states = [], []
    for n, (start, stop) in enumerate([(0, q.shape[1])] if bounds is None else list(itertools.pairwise(bounds))):
        held = q.new_zeros(q.shape[0], v.shape[2], q.shape[3], v.shape[3])
        if state is not None:
            held = state if bounds is None else state[n : n + 1]
        for t in range(start, stop):
            if g is not None:
                held = held * g[:, t, :, None, None].exp()
            u = v[:, t] - torch.einsum("bhkv,bhk->bhv", held, k[:, t])
            held = held + torch.einsum("bhk,bhv->bhkv", k[:, t], u if beta is None else beta[:, t, :, None] * u)
            outputs.append(scale * torch.einsum("bhkv,bhk->bhv", held, q[:, t]))
        states.append(held)
    return torch.stack(outputs, 1), torch.cat(states)


def tensors(dtype=torch.float64, batch=B, tokens=T, groups=G, heads=H) -> dict[str, Tensor]:
    """Operands with unit q and k, logits for beta and the gate, a log decay and a state."""
    made = torch.Generator().manual_seed(batch * tokens + heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(normal(batch, tokens, groups, K), dim=-1) for _ in range(2))
    given = {"q": q, "k": k, "v": normal(batch, tokens, heads, V), "logits": normal(batch, tokens, heads), "raw": normal(batch, tokens, heads)}
    given |= {"beta": given["logits"].sigmoid(), "g": -normal(batch, tokens, heads).abs(), "A_log": normal(heads), "dt_bias": normal(heads)}
    given["state"] = normal(batch, heads, K, V)
    return {name: x.to(dtype) for name, x in given.items()}


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("tokens", [1, 5, T])
def test_every_option_at_once_equals_the_token_recurrence_and_its_gradients(name: str, tokens: int) -> None:
    x = {key: value.requires_grad_() for key, value in tensors(tokens=tokens).items()}
    options = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True, "use_gate_in_kernel": True}
    o, state = getattr(ours, name)(
        q=3 * x["q"], k=2 * x["k"], v=x["v"], g=x["raw"], beta=x["logits"], A_log=x["A_log"], dt_bias=x["dt_bias"], scale=0.7,
        initial_state=x["state"].transpose(-1, -2), output_final_state=True, state_v_first=True, **options,
    )  # fmt: skip
    g = -x["A_log"].exp() * (1 + (x["raw"] + x["dt_bias"]).exp()).log()
    expected, after = recurrence(3 * x["q"], 2 * x["k"], x["v"], 2 * x["logits"].sigmoid(), g, scale=0.7, state=x["state"], l2norm=True)
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state, after.transpose(-1, -2), rtol=1e-9, atol=1e-10)
    asked = [x[key] for key in ("q", "k", "v", "raw", "logits", "A_log", "dt_bias", "state")]
    weights, states = torch.linspace(-1, 1, V), torch.linspace(0, 1, K)
    mine = torch.autograd.grad((o * weights).sum() + (state * states).sum(), asked)
    theirs = torch.autograd.grad((expected * weights).sum() + (after.transpose(-1, -2) * states).sum(), asked)
    for left, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", UNGATED)
@pytest.mark.parametrize("tokens", [1, T])
@pytest.mark.parametrize("groups", [G, H])
def test_the_ungated_rule_equals_the_token_recurrence(name: str, tokens: int, groups: int) -> None:
    x = tensors(tokens=tokens, groups=groups)
    o, state = getattr(ours, name)(x["q"], x["k"], x["v"], x["beta"], 0.3, x["state"], True, True)
    expected, after = recurrence(x["q"], x["k"], x["v"], x["beta"], scale=0.3, state=x["state"], l2norm=True)
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state, after, rtol=1e-9, atol=1e-10)
    assert getattr(ours, name)(x["q"], x["k"], x["v"], x["beta"])[1] is None


@pytest.mark.parametrize("name", [*GATED, *UNGATED])
def test_packed_sequences_start_from_their_own_states(name: str) -> None:
    x, bounds = tensors(batch=1), [0, 3, 3, 14, T]
    start = torch.randn(4, H, K, V, dtype=torch.float64)
    hints = {"cu_seqlens_cpu": torch.tensor(bounds)} if name.startswith("chunk") else {}
    g = {"g": x["g"]} if name in GATED else {}
    packed = torch.tensor(bounds, dtype=torch.int32)
    o, state = getattr(ours, name)(
        x["q"], x["k"], x["v"], beta=x["beta"], initial_state=start, output_final_state=True, cu_seqlens=packed, **hints, **g
    )
    expected, after = recurrence(x["q"], x["k"], x["v"], x["beta"], g.get("g"), state=start, bounds=bounds)
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state, after, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [*GATED, *UNGATED])
def test_no_beta_is_ones_also_with_grouped_heads(name: str) -> None:
    x = tensors()
    g = {"g": x["g"]} if name in GATED else {}
    o, _ = getattr(ours, name)(x["q"], x["k"], x["v"], beta=None, **g)
    torch.testing.assert_close(o, recurrence(x["q"], x["k"], x["v"], None, g.get("g"))[0], rtol=1e-9, atol=1e-10)


def test_a_rate_near_two_keeps_its_accuracy_in_float32_over_many_tokens() -> None:
    x = tensors(tokens=300)
    rate = 2 * (x["logits"] + 4).sigmoid()
    expected, _ = recurrence(x["q"], x["k"], x["v"], rate)
    o, _ = ours.chunk_delta_rule(*(x[key].float() for key in "qkv"), rate.float())
    assert rate.max() > 1.99
    assert (o - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_a_chunk_size_changes_nothing_but_rounding(chunk_size: int) -> None:
    x = tensors()
    o, _ = ours.chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["g"], x["beta"], chunk_size=chunk_size)
    torch.testing.assert_close(o, recurrence(x["q"], x["k"], x["v"], x["beta"], x["g"])[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("cut", [1, 7, 20])
def test_a_state_handed_back_goes_on_exactly(v_first: bool, cut: int) -> None:
    x = tensors()
    whole, last = ours.chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["g"], x["beta"], output_final_state=True, state_v_first=v_first)
    parts, state = [], None
    for start, stop in ((0, cut), (cut, T)):
        part = {key: x[key][:, start:stop] for key in ("q", "k", "v", "g", "beta")}
        o, state = ours.fused_recurrent_gated_delta_rule(**part, initial_state=state, output_final_state=True, state_v_first=v_first)
        parts.append(o)
    assert state is not None
    assert (state.transpose(-1, -2) if v_first else state).is_contiguous()  # a view, so that handing it back copies nothing
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "q", "v", "out"),
    [
        ("chunk_gated_delta_rule", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("chunk_gated_delta_rule", torch.float32, torch.float16, torch.float32),
        ("fused_recurrent_gated_delta_rule", torch.float32, torch.float16, torch.float16),
        ("chunk_delta_rule", torch.float16, torch.float16, torch.float16),
        ("fused_recurrent_delta_rule", torch.bfloat16, torch.float32, torch.bfloat16),
    ],
)
def test_dtypes_come_out_as_flas(name: str, q: torch.dtype, v: torch.dtype, out: torch.dtype) -> None:
    x = tensors(torch.float32)
    g = {"g": x["g"].to(q)} if name in GATED else {}
    o, state = getattr(ours, name)(
        x["q"].to(q), x["k"].to(q), x["v"].to(v), beta=x["beta"].bfloat16(), initial_state=x["state"].half(), output_final_state=True, **g
    )
    assert o.dtype == out
    assert state is not None
    assert state.dtype == torch.float32
    expected, _ = recurrence(x["q"], x["k"], x["v"], x["beta"], x["g"] if g else None, state=x["state"])
    assert (o - expected).norm() / expected.norm() < 1e-2


def test_a_state_handed_back_v_first_reaches_the_step_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    x, seen = tensors(torch.float32, tokens=1), []
    original = rule.get_op

    def watched(name: str) -> object:
        def call(*given: object, state: Tensor, **more: object) -> object:
            seen.append(state)
            return original(name)(*given, state=state, **more)

        return call

    monkeypatch.setattr(rule, "get_op", watched)
    given = {name: x[name] for name in ("q", "k", "v", "g", "beta")}
    _, state = ours.fused_recurrent_gated_delta_rule(**given, output_final_state=True, state_v_first=True)
    assert state is not None
    ours.fused_recurrent_gated_delta_rule(**given, initial_state=state, output_final_state=True, state_v_first=True)
    assert seen[1].data_ptr() == state.data_ptr()
    assert seen[1].is_contiguous(), "each token would copy the state into the other layout"


def test_up_to_eight_tokens_without_gradients_are_a_step() -> None:
    def op(tokens: int, **changes: object) -> str:
        x = tensors(torch.float32, tokens=tokens, batch=1)
        return op_for(READERS["chunk_gated_delta_rule"](**{**{key: x[key] for key in ("q", "k", "v", "g", "beta")}, **changes}))

    assert [op(tokens) for tokens in (1, 8, 9)] == ["gated_delta_step", "gated_delta_step", "gated_delta_rule"]
    assert op(2, chunk_size=64) == op(2, cu_seqlens=torch.tensor([0, 1, 2])) == "gated_delta_rule"
    learned = torch.randn(H, requires_grad=True)
    assert op(2, use_gate_in_kernel=True, A_log=learned) == "gated_delta_rule"
    with torch.no_grad():
        assert op(2, use_gate_in_kernel=True, A_log=learned) == "gated_delta_step"


REFUSALS = [
    ("chunk_gated_delta_rule", {"cp_context": object()}, ValueError, "cp_context"),
    ("chunk_gated_delta_rule", {"chunk_size": 128}, ValueError, "16, 32, 64"),
    ("chunk_gated_delta_rule", {"chunk_indices": torch.zeros(1, 2)}, ValueError, "chunk_indices is given without cu_seqlens"),
    ("chunk_gated_delta_rule", {"cu_seqlens_cpu": torch.tensor([0, T])}, ValueError, "cu_seqlens_cpu is given without cu_seqlens"),
    ("chunk_gated_delta_rule", {"cu_seqlens": torch.tensor([0, T])}, ValueError, "B must be 1"),
    ("chunk_gated_delta_rule", {"use_gate_in_kernel": True}, ValueError, "needs A_log"),
    ("chunk_gated_delta_rule", {"A_log": torch.zeros(H)}, ValueError, "A_log does nothing"),
    ("chunk_gated_delta_rule", {"dt_bias": torch.zeros(H)}, ValueError, "dt_bias does nothing"),
    ("chunk_gated_delta_rule", {"use_gate_in_kernel": True, "A_log": torch.zeros(H + 1)}, ValueError, "A_log has shape"),
    ("chunk_gated_delta_rule", {"allow_neg_eigval": True}, ValueError, "use_beta_sigmoid_in_kernel"),
    ("chunk_gated_delta_rule", {"beta": None, "use_beta_sigmoid_in_kernel": True}, ValueError, "needs beta"),
    ("chunk_gated_delta_rule", {"initial_state": torch.zeros(B, H, V, K)}, ValueError, r"\[N, HV, K, V\]"),
    ("chunk_gated_delta_rule", {"state_v_first": True, "transpose_state_layout": True}, ValueError, "both given"),
    ("chunk_gated_delta_rule", {"q": torch.zeros(B, T, 3, K)}, ValueError, "3"),
    ("chunk_delta_rule", {"v": None}, TypeError, "v must be a torch.Tensor, got NoneType"),
    ("fused_recurrent_gated_delta_rule", {"gk": torch.zeros(B, T, H, K)}, ValueError, "gk, a decay for each channel"),
    ("fused_recurrent_gated_delta_rule", {"gv": torch.zeros(B, T, H, V)}, ValueError, "gv, a decay for each channel"),
    ("fused_recurrent_gated_delta_rule", {"beta": torch.zeros(B, T, H, V)}, ValueError, "one for each value channel"),
    ("fused_recurrent_delta_rule", {"beta": torch.zeros(B, T, H, V)}, ValueError, "one for each value channel"),
    ("fused_recurrent_gated_delta_rule", {"use_gate_in_kernel": True, "A_log": torch.zeros(H), "g": None}, ValueError, "needs g"),
    *((name, {"head_first": True}, DeprecationWarning, "head_first") for name in (*GATED, *UNGATED)),
]


@pytest.mark.parametrize(("name", "changes", "kind", "says"), REFUSALS, ids=[f"{name}-{'-'.join(changes)}" for name, changes, _, _ in REFUSALS])
def test_what_is_not_computed_is_refused_by_name(name: str, changes: dict[str, object], kind: type[Exception], says: str) -> None:
    x = tensors(torch.float32)
    call = {key: x[key] for key in ("q", "k", "v", "beta", *(("g",) if name in GATED else ()))}
    with pytest.raises(kind, match=says):
        getattr(ours, name)(**{**call, **changes})


@pytest.mark.parametrize("name", [*GATED, *UNGATED])
def test_an_unknown_keyword_is_a_type_error_that_lists_the_known_ones(name: str) -> None:
    x = tensors(torch.float32)
    call = {key: x[key] for key in ("q", "k", "v", "beta", *(("g",) if name in GATED else ()))}
    with pytest.raises(TypeError, match=r"unexpected keyword 'use_qk_l2norm'; its parameters are q, k, v, .*use_qk_l2norm_in_kernel"):
        getattr(ours, name)(**call, use_qk_l2norm=True)


def test_the_old_name_of_the_state_layout_is_taken_with_a_warning() -> None:
    x = tensors()
    call = {key: x[key] for key in ("q", "k", "v", "g", "beta")}
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        _, turned = ours.fused_recurrent_gated_delta_rule(**call, output_final_state=True, transpose_state_layout=True)
    _, straight = ours.fused_recurrent_gated_delta_rule(**call, output_final_state=True)
    assert turned is not None
    assert straight is not None
    assert torch.equal(turned, straight.transpose(-1, -2))


@pytest.mark.parametrize("name", [*GATED, *UNGATED])
def test_one_graph_holds_the_whole_call(name: str) -> None:
    x = tensors(torch.float32)
    options: dict[str, object] = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    if name in GATED:
        options |= {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "state_v_first": True}

    def call(q: Tensor, k: Tensor, v: Tensor, logits: Tensor, raw: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor | None]:
        gates = {"g": raw, "A_log": A_log} if name in GATED else {}
        return getattr(ours, name)(q, k, v, beta=logits, **gates, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    given = [x[key].clone().requires_grad_() for key in ("q", "k", "v", "logits", "raw", "A_log")]
    o, state = compiled(*given)
    expected, after = call(*given)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(state, after)
    used = given if name in GATED else given[:4]
    for left, right in zip(torch.autograd.grad(o.sum(), used), torch.autograd.grad(expected.sum(), used), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_importing_imports_neither_fla_nor_a_kernel_package() -> None:
    code = (
        "import sys, titans_backends.integrations.fla\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'fla', 'triton', 'transformers', 'numba', 'cupy', 'einops'}))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_the_signatures_are_flas() -> None:
    """Names, order and defaults of every named parameter of theirs; ours name what theirs read out of **kwargs."""
    pytest.importorskip("fla.ops.delta_rule", reason="FLA is not installed: pip install flash-linear-attention")
    import fla.ops.delta_rule
    import fla.ops.gated_delta_rule

    for module, names in ((fla.ops.gated_delta_rule, GATED), (fla.ops.delta_rule, UNGATED)):
        for name in names:
            theirs = [p for p in inspect.signature(getattr(module, name)).parameters.values() if p.kind is not p.VAR_KEYWORD]
            mine = list(inspect.signature(getattr(ours, name)).parameters.values())[: len(theirs)]
            assert [(p.name, p.kind) for p in mine] == [(p.name, p.kind) for p in theirs]
            assert [p.default for p in mine] == [p.default for p in theirs]

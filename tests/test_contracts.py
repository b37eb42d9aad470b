"""The references against each other: the identities between the ops, in float64, and the tables that describe them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import titans_backends as tb
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import build, case_dims, cases
from titans_backends.contracts.chunks import chunk_count, chunk_spans
from titans_backends.contracts.contract import Call
from titans_backends.contracts.fast_core import FastCore
from titans_backends.contracts.fast_core import reference as fast
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.contracts.gated_delta_rule import reference as rule
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.contracts.slow_core import reference as slow
from titans_backends.contracts.tolerance import compare, tolerance
from titans_backends.contracts.uw_transform import UWTransform
from titans_backends.contracts.uw_transform import reference as transform
from titans_backends.contracts.validate import validate
from titans_backends.contracts.work import work_of

F64 = torch.float64


def same(got: torch.Tensor | None, want: torch.Tensor | None, limit: float = 1e-10) -> None:
    assert got is not None
    assert want is not None
    assert compare("x", got, want).maximum <= limit


def delta_call(length: int = 53, **changes: object) -> GatedDeltaRule:
    case = replace(next(iter(cases(CONTRACTS["gated_delta_rule"], F64))), T=length, K=8, V=12)
    call = build(CONTRACTS["gated_delta_rule"], case)
    assert isinstance(call, GatedDeltaRule)
    for name, value in changes.items():
        setattr(call, name, value)
    return call


@pytest.mark.parametrize("chunk", [1, 7, 16, 50, 64])
def test_the_chunk_form_of_any_size_equals_the_token_rule(chunk: int) -> None:
    c = delta_call(scale=0.7)
    u, w = transform(UWTransform(c.k, c.v, c.beta, c.g, chunk_size=chunk))
    got = slow(SlowCore(c.q, c.k, u, w, g=c.g, gate=c.gate, chunk_size=chunk, scale=0.7, initial_state=c.initial_state, output_final_state=True))
    for a, b in zip(got, rule(c), strict=True):
        same(a, b)


def test_a_decay_per_chunk_equals_its_logarithm_on_the_first_token() -> None:
    c = delta_call(48, g=None)
    decay = 0.3 + 0.6 * torch.rand(2, 3, 2, dtype=F64)
    g = torch.zeros(2, 48, 2, dtype=F64)
    g[:, ::16] = decay.log()
    u, w = transform(UWTransform(c.k, c.v, c.beta, chunk_size=16))
    got = slow(SlowCore(c.q, c.k, u, w, chunk_decay=decay, gate=c.gate, chunk_size=16, initial_state=c.initial_state, output_final_state=True))
    for a, b in zip(got, rule(replace_call(c, g=g, scale=1.0)), strict=True):
        same(a, b)


def replace_call(call: GatedDeltaRule, **changes: object) -> GatedDeltaRule:
    fields = {name: getattr(call, name) for name in CONTRACTS["gated_delta_rule"].parameters}
    return GatedDeltaRule(**{**fields, **changes})


def test_the_flat_mode_is_the_rule_from_an_empty_memory_in_every_chunk() -> None:
    c = delta_call(48, initial_state=None, output_final_state=False, scale=1.0)
    made = CONTRACTS["dual_core"]
    got = made.reference(made.make_call(c.q, c.k, c.v, c.beta, c.g, slow_gate=c.gate, alpha=0.0, memory="flat", chunk_size=16))[0]
    parts = []
    for start in (0, 16, 32):
        part = slice(start, start + 16)
        parts.append(rule(GatedDeltaRule(*(x[:, part] for x in (c.q, c.k, c.v, c.beta, c.g)), gate=c.gate[:, part], scale=1.0))[0])
    same(got, torch.cat(parts, 1))


def test_fast_core_token_form() -> None:
    """W is cleared where the position is a multiple of the chunk, decayed, written and then read."""
    call = build(CONTRACTS["fast_core"], replace(list(cases(CONTRACTS["fast_core"], F64))[2], T=50, K=4, V=5))
    assert isinstance(call, FastCore)
    state, outputs = call.initial_state, []
    for t in range(50):
        if (t + call.chunk_offset) % call.chunk_size == 0:
            state = torch.zeros_like(state)
        state = call.g[:, t].exp()[..., None, None] * state + call.k[:, t, :, :, None] * call.v[:, t, :, None, :]
        outputs.append(call.scale * torch.einsum("bhkv,bhk->bhv", state, call.q[:, t]))
    o, final = fast(call)
    same(o, torch.stack(outputs, 1))
    same(final, state)


def test_a_first_token_at_a_chunk_start_clears_the_initial_state() -> None:
    x = torch.randn(1, 3, 1, 4, dtype=F64)
    state = torch.randn(1, 1, 4, 4, dtype=F64)
    same(fast(FastCore(x, x, x, initial_state=state))[0], fast(FastCore(x, x, x))[0])
    empty = fast(FastCore(x[:, :0], x[:, :0], x[:, :0], initial_state=state, output_final_state=True))
    same(empty[1], state)


def test_packed_sequences_equal_the_sequences_alone() -> None:
    lengths, made = (5, 0, 17, 31), CONTRACTS["dual_core"]
    case = replace(next(iter(cases(made, F64))), lengths=lengths, options={"chunk_size": 8, "output_final_state": True}, seed=3)
    call = build(made, case)
    o, state, fast_state = made.reference(call)
    start = 0
    for n, length in enumerate(lengths):
        part = slice(start, start + length)
        by_token = {
            name: t[:, part] for name, t in made.tensors(call).items() if made.argument_by_name[name].dims[-1].startswith("B T") and t.dim() > 2
        }
        alone = made.make_call(
            **{**{p: getattr(call, p) for p in made.parameters}, **by_token, "initial_state": call.initial_state[n : n + 1], "cu_seqlens": None}
        )
        for got, want in zip(made.reference(alone), (o[:, part], state[n : n + 1], fast_state[n : n + 1]), strict=True):
            same(got, want)
        start += length


def test_lam_is_not_the_inverse() -> None:
    """T = I + A + stril(A A^T): the transpose matters, and the result is far from the delta rule's."""
    c = delta_call(32)
    lam, exact = (transform(UWTransform(c.k, c.v, c.beta, chunk_size=32, transform=name))[0] for name in ("lam", "exact"))
    k, b = c.k[0, :, 0], c.beta[0, :, 0]
    a = -(b[:, None] * (k @ k.T)).tril(-1)
    same(lam[0, :, 0], (torch.eye(32, dtype=F64) + a + (a @ a.T).tril(-1)) @ (b[:, None] * c.v[0, :, 0]))
    assert compare("u", lam, exact).maximum > 0.1


def test_a_step_equals_the_rule_and_a_pool_keeps_its_other_slots() -> None:
    made = CONTRACTS["gated_delta_step"]
    call = build(made, replace(list(cases(made, F64))[1], B=3))
    o, pool = made.reference(call)
    slots = call.state_indices
    assert slots.tolist()[-1] == -1
    assert not o[-1].any()
    used = slots[:-1]
    want = rule(
        GatedDeltaRule(
            *(x[:-1] for x in (call.q, call.k, call.v, call.beta, call.g)), initial_state=call.state[used], output_final_state=True, qk_l2norm=True
        )
    )
    same(o[:-1], want[0])
    same(pool[used], want[1])
    others = [n for n in range(len(pool)) if n not in used.tolist()]
    assert torch.equal(pool[others], call.state[others])


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5), chunk=st.integers(1, 50), offset=st.integers(0, 49), start=st.just(0))
@settings(max_examples=200, deadline=None)
def test_the_chunk_grid_covers_every_token_once(lengths: list[int], chunk: int, offset: int, start: int) -> None:
    offset %= chunk
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    spans = chunk_spans(sum(lengths), chunk, ends, offset)
    assert [t for span in spans for t in range(span.start, span.stop)] == list(range(sum(lengths)))
    assert [span.index for span in spans] == list(range(len(spans)))
    for span in spans:
        begin = int(ends[span.sequence])
        assert span.first == (span.start == begin)
        assert (span.start - begin + offset) // chunk == (span.stop - 1 - begin + offset) // chunk
    if offset == 0:
        assert len(spans) == chunk_count(sum(lengths), chunk, ends)


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_case_is_valid_and_its_sizes_are_what_the_letters_say(name: str) -> None:
    made = CONTRACTS[name]
    for dtype in (torch.float64, torch.bfloat16):
        for case in cases(made, dtype):
            call = build(made, case)
            dims = validate(made, call)
            expected = case_dims(case)
            assert all(expected[letter] == size for letter, size in dims.items() if letter in "BTGHKVN")
            work = work_of(made, call, dims)  # its numbers: test_contracts_work.py
            assert min(work.flop, work.bytes) >= 0


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_case_is_the_same_every_time_and_meta_has_its_sizes(name: str) -> None:
    made = CONTRACTS[name]
    case = next(iter(cases(made)))
    first, second, sizes = (made.tensors(build(made, case, device)) for device in ("cpu", "cpu", "meta"))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert {n: (t.shape, t.dtype) for n, t in sizes.items()} == {n: (t.shape, t.dtype) for n, t in first.items()}


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_cases_hold_what_the_issue_lists(name: str) -> None:
    found = list(cases(CONTRACTS[name]))
    views = {case.view for case in found}
    assert views == {"contiguous", "transposed", "misaligned", "expanded"}
    assert any(case.B == 0 for case in found)
    if name != "fused_uw" and CONTRACTS[name].max_tokens is None:
        assert {0, 1, 2, 63, 65, 200} <= {case.T for case in found}
    if "cu_seqlens" in CONTRACTS[name].argument_by_name:
        assert any(case.lengths and 0 in case.lengths for case in found)
    if name != "fused_uw":
        assert any(case.G != case.H for case in found)
        assert {"mild", "zero", "hard"} <= {case.decay for case in found}
        assert any(case.keys == "correlated" and case.beta == "extreme" for case in found)
    if "g" in CONTRACTS[name].argument_by_name and CONTRACTS[name].max_tokens is None:
        assert any(case.decay == "fast" for case in found)


def test_the_golden_tables_tolerances() -> None:
    assert (tolerance(F64).outputs, tolerance(torch.float32).outputs, tolerance(torch.bfloat16).outputs) == (1e-9, 5e-6, 2e-2)
    assert (tolerance(torch.float32).gradients, tolerance(torch.bfloat16).gradients) == (2e-5, 4e-2)
    assert tolerance(torch.float16) == tolerance(torch.float32, "high")


def test_a_difference_sees_nan_and_zero_references() -> None:
    zero = torch.zeros(3)
    assert not compare("x", torch.tensor([0.0, float("nan"), 0.0]), zero).within(1.0)
    assert compare("x", torch.tensor([0.0, 1e-3, 0.0]), zero).maximum == pytest.approx(1e-3)
    with pytest.raises(ValueError, match=r"x: has shape \(2,\), the reference \(3,\)"):
        compare("x", torch.zeros(2), zero)


@pytest.mark.parametrize(
    "name",
    [
        "gated_delta_rule",
        "slow_core",
        "dual_core",
        "coupled_core",
        "deep_core",
        "deep_core_step",
        "uw_transform",
        "fast_core",
        "short_conv",
        "qkv_prepare",
        "gated_rms_norm",
        "token_flux",
        "chunk_flux",
    ],
)
def test_gradcheck_in_float64(name: str) -> None:
    """Our backward formulas against finite differences, through the public op."""
    made = CONTRACTS[name]
    call = build(made, replace(next(iter(cases(made, F64))), B=1, T=5 if made.max_tokens else 9, K=3, V=2, G=1, H=2), requires_grad=True)
    tensors = {n: t for n, t in made.tensors(call).items() if t.requires_grad}
    op = tb.get_op(name)

    def f(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        changed: Call = made.with_tensors(call, dict(zip(tensors, values, strict=True)))
        return tuple(o for o in op(**{p: getattr(changed, p) for p in made.parameters}) if o is not None)

    assert torch.autograd.gradcheck(f, tuple(tensors.values()), fast_mode=True)

"""Properties of the eager backend's mathematics that conformance cannot see: its variants agree, its blocks join, its hostile corners hold.

References are the contracts' own, run in float64 on the same numbers.
"""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.dual_core import DualCore
from titans_backends.contracts.fast_core import FastCore
from titans_backends.contracts.fast_core import reference as fast_reference
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.contracts.gated_delta_rule import reference as rule_reference
from titans_backends.contracts.gated_delta_step import GatedDeltaStep
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.contracts.uw_transform import UWTransform
from titans_backends.machine import Machine
from titans_backends.signature import Signature, TensorFacts

CPU = Machine(kind="cpu", name="test", slug="test")


def eager(name: str):
    return importlib.import_module(f"titans_backends.backends.eager.{name}")


dual_core, fast_core, rule, step, slow_core, uw_transform = (
    eager(name) for name in ("dual_core", "fast_core", "gated_delta_rule", "gated_delta_step", "slow_core", "uw_transform")
)
chunk_grid, scratch, triangular = eager("chunk_grid"), eager("scratch"), eager("triangular")


def rule_candidate(chunk: int, inverse: str = "blocks", **more: bool) -> Candidate:
    return Candidate("eager", "chunked", (("chunk_size", chunk), ("inverse", inverse)), **more)


def inputs(
    seed: int, batch: int = 2, tokens: int = 70, heads: int = 2, keys: int = 16, values: int = 12, *, correlated: bool = False
) -> dict[str, Tensor]:
    """q, k, v, beta in 0..2 and g with 0 and -20 in it, in float32."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    k = normal(batch, tokens, heads, keys) + (4 * normal(keys) if correlated else 0)
    g = -0.1 * torch.rand(batch, tokens, heads, generator=source)
    pick = torch.rand(batch, tokens, heads, generator=source)
    return {
        "q": torch.nn.functional.normalize(normal(batch, tokens, heads, keys), dim=-1),
        "k": torch.nn.functional.normalize(k, dim=-1),
        "v": normal(batch, tokens, heads, values),
        "beta": 2 * torch.rand(batch, tokens, heads, generator=source),
        "g": torch.where(pick < 0.1, -20.0, torch.where(pick < 0.3, 0.0, g)),
        "state": 0.3 * normal(batch, heads, keys, values),
    }


def wide(call: object) -> object:
    """The same call in float64."""
    out = copy.copy(call)
    for name in out.__slots__:  # type: ignore[attr-defined]
        value = getattr(call, name)
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(out, name, value.double())
    return out


def error(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)).item()


def signature(op: str, *, tokens: int, launch: str = "eager", packed: bool = False, **options: object) -> Signature:
    facts = TensorFacts((2,), (1,), torch.int32, True)
    return Signature(op, "cpu", torch.float32, (("T", tokens),), tuple(options.items()), (("cu_seqlens", facts),) if packed else (), launch=launch)  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("lengths", [None, (0, 7, 33, 0, 16)])
def test_scatter_undoes_gather_whatever_the_grid(offset: int, lengths: tuple[int, ...] | None) -> None:
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    batch, tokens = (3, 41) if lengths is None else (1, sum(lengths))
    x = torch.randn(batch, tokens, 2, 5).transpose(1, 2).contiguous().transpose(1, 2)
    grid = chunk_grid.ChunkGrid(batch, tokens, 16, offset=offset, cu_seqlens=bounds, device=x.device)
    back = torch.full_like(x, float("nan"))
    total = 0.0
    for slab in grid.slabs(1, 2):
        chunks = grid.gather(slab, x, 2, torch.float32)
        total += chunks.double().sum().item()
        grid.scatter(slab, chunks, back)
    assert torch.equal(back, x)
    assert total == pytest.approx(x.double().sum().item(), abs=1e-4)  # every row once, the others zero


@pytest.mark.parametrize("method", triangular.INVERSES)
@pytest.mark.parametrize("size", [1, 7, 8, 48, 64])
def test_inverse_holds_for_nearly_parallel_keys_and_beta_2(method: str, size: int) -> None:
    k = inputs(0, 1, size, 1, correlated=True)["k"][0].transpose(0, 1)
    n = 2 * k @ k.mT
    expected = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + n.double().tril(-1))
    bound = 5e-6 if method == "blocks" else 5e-5  # an inverse by back substitution loses a digit where every beta is 2
    assert error(triangular.unit_lower_inverse(n, method), expected) < bound


@pytest.mark.parametrize(
    "candidate", [rule_candidate(c, i) for c in (1, 16, 64, 100) for i in ("blocks", "solve")] + [Candidate("eager", "tokens")], ids=str
)
def test_every_variant_of_the_rule_meets_the_token_loop_on_hostile_inputs(candidate: Candidate) -> None:
    x = inputs(1, correlated=True)
    call = GatedDeltaRule(x["q"], x["k"], x["v"], x["beta"], x["g"], gate=x["beta"], initial_state=x["state"], output_final_state=True)
    expected = rule_reference(wide(call))  # type: ignore[arg-type]
    found = rule.run(call, candidate)
    assert error(found[0], expected[0]) < 5e-6
    assert error(found[1], expected[1]) < 5e-6


def test_a_mild_decay_after_a_hard_one_keeps_its_digits() -> None:
    x = inputs(2, 1, 64)
    g = torch.full_like(x["g"], -20.0)
    g[:, 40:] = -0.01  # G is near -800 here: float32 sums would lose the differences
    call = GatedDeltaRule(x["q"], x["k"], x["v"], x["beta"], g, output_final_state=True)
    expected = rule_reference(wide(call))  # type: ignore[arg-type]
    found = rule.run(call, rule_candidate(64))
    assert error(found[0][:, 41:], expected[0][:, 41:]) < 3e-6  # type: ignore[index]
    assert error(found[1], expected[1]) < 3e-6


def test_gradients_from_kept_states_equal_those_from_recomputed_ones_and_autograd() -> None:
    x = inputs(3, 1, 150)
    bounds = torch.tensor([0, 0, 70, 150, 150])
    state = 0.3 * torch.randn(4, 2, 16, 12, generator=torch.Generator().manual_seed(0))
    call = GatedDeltaRule(
        x["q"], x["k"], x["v"], x["beta"], x["g"], gate=x["beta"], initial_state=state, output_final_state=True, qk_l2norm=True, cu_seqlens=bounds
    )
    names = ("q", "k", "v", "beta", "g", "gate", "initial_state")
    *_, saved = rule.run(call, rule_candidate(64, saves_states=True))
    exact = wide(call)
    for name in names:
        getattr(exact, name).requires_grad_()
    o, final = rule_reference(exact)  # type: ignore[arg-type]
    assert o is not None
    assert final is not None
    cotangents = torch.randn_like(o).detach(), torch.randn_like(final).detach()
    expected = torch.autograd.grad((o, final), [getattr(exact, name) for name in names], cotangents)
    grads = tuple(c.float() for c in cotangents)
    kept = rule.run_backward(call, grads, saved, frozenset(names), rule_candidate(64, saves_states=True))
    again = rule.run_backward(call, grads, None, frozenset(names), rule_candidate(64))
    for name, a, b, e in zip(names, kept, again, expected, strict=True):
        assert torch.equal(a, b), name
        assert error(a, e) < 2e-5, name


@pytest.mark.parametrize("candidate", [Candidate("eager", "chunked"), Candidate("eager", "blocked", (("block", 16),))], ids=str)
@pytest.mark.parametrize("cut", [1, 23, 48, 69])
def test_fast_core_split_anywhere_equals_one_call(candidate: Candidate, cut: int) -> None:
    x, chunk = inputs(4), 48

    def part(start: int, stop: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, g = (x[name][:, start:stop] for name in ("q", "k", "v", "g"))
        return fast_core.run(
            FastCore(q, k, v, g=g, chunk_size=chunk, chunk_offset=start % chunk, initial_state=state, output_final_state=True), candidate
        )

    whole, last = part(0, 70, None)
    first, carried = part(0, cut, x["state"])  # offset 0: an initial state is dropped
    second, end = part(cut, 70, carried)
    assert error(torch.cat([first, second], 1), whole) < 5e-6
    assert error(end, last) < 5e-6


def test_fast_core_with_an_enormous_chunk_goes_in_blocks() -> None:
    x = inputs(5, 1, 300)
    call = FastCore(
        x["q"], x["k"], x["v"], g=x["g"], chunk_size=10**6, chunk_offset=10**6 - 150, initial_state=x["state"][:1], output_final_state=True
    )
    expected = fast_reference(wide(call))  # type: ignore[arg-type]
    offered = fast_core.candidates(signature("fast_core", tokens=300, chunk_size=10**6), CPU)
    assert {candidate.variant for candidate in offered} == {"blocked"}
    for candidate in offered:
        for found, exact in zip(fast_core.run(call, candidate), expected, strict=True):
            assert error(found, exact) < 5e-6


def test_dual_core_composed_equals_shared() -> None:
    x = inputs(6)
    alpha = torch.rand(2)
    call = DualCore(
        x["q"], x["k"], x["v"], x["beta"], x["g"], fast_gate=x["beta"], alpha=alpha, chunk_size=48, chunk_offset=7, initial_state=x["state"],
        initial_fast_state=x["state"], output_final_state=True, normalize_final=True, qk_l2norm=True,
    )  # fmt: skip
    shared, composed = Candidate("eager", "shared", (("inverse", "blocks"),)), Candidate("eager", "composed", (("slow_chunk_size", 32),))
    outputs = dual_core.run(call, shared)
    for a, b in zip(outputs, dual_core.run(call, composed), strict=True):
        assert error(a, b) < 5e-6
    grads = tuple(torch.randn_like(o) for o in outputs)
    names = frozenset({"q", "k", "v", "beta", "g", "fast_gate", "alpha", "initial_state", "initial_fast_state"})
    for a, b in zip(
        dual_core.run_backward(call, grads, None, names, shared), dual_core.run_backward(call, grads, None, names, composed), strict=True
    ):
        assert (a is None) == (b is None)
        if a is not None:
            assert error(a, b) < 2e-5


@pytest.mark.parametrize("slots", [[4, -1], [-1, 0], [-1, -1], [1, 0]])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_step_changes_the_selected_slots_only(slots: list[int], inplace: bool) -> None:
    x = inputs(7, 2, 3)
    pool = torch.randn(5, 2, 16, 12, generator=torch.Generator().manual_seed(1))
    before = pool.clone()
    o, after = step.run(
        GatedDeltaStep(x["q"], x["k"], x["v"], x["beta"], x["g"], state=pool, state_indices=torch.tensor(slots), inplace=inplace),
        Candidate("eager", "tokens"),
    )
    assert (after is pool) == inplace
    assert inplace or torch.equal(pool, before)
    for slot in range(5):
        assert torch.equal(after[slot], before[slot]) == (slot not in slots)
    for row, slot in enumerate(slots):
        assert bool((o[row] == 0).all()) == (slot < 0)


def test_an_empty_sequence_returns_a_copy_of_its_initial_state() -> None:
    x = inputs(8, 1, 0)
    for run, call in (
        (rule.run, GatedDeltaRule(x["q"], x["k"], x["v"], x["beta"], initial_state=x["state"], output_final_state=True)),
        (fast_core.run, FastCore(x["q"], x["k"], x["v"], initial_state=x["state"], output_final_state=True)),
        (slow_core.run, SlowCore(x["q"], x["k"], x["v"], x["k"], initial_state=x["state"], output_final_state=True)),
    ):
        final = run(call, rule_candidate(64))[1]
        assert torch.equal(final, x["state"])
        assert final.data_ptr() != x["state"].data_ptr()


@pytest.mark.parametrize("tokens", [33, 130])
def test_a_row_has_the_same_bits_alone_batched_and_packed(tokens: int) -> None:
    x = inputs(9, 3, tokens)
    names = ("q", "k", "v", "beta", "g")
    candidate = rule_candidate(32)
    assert candidate.batch_invariant
    together, _ = rule.run(GatedDeltaRule(*(x[name] for name in names)), candidate)
    alone, _ = rule.run(GatedDeltaRule(*(x[name][1:2] for name in names)), candidate)
    pair = (torch.cat([x[name][1:2], x[name][2:3, :20]], 1) for name in names)
    packed, _ = rule.run(GatedDeltaRule(*pair, cu_seqlens=torch.tensor([0, tokens, tokens + 20])), candidate)
    assert torch.equal(together[1:2], alone)
    assert torch.equal(packed[:, :tokens], alone)


def test_heads_done_in_ranges_equal_heads_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(10, heads=4)
    k = x["k"][:, :, :2]  # grouped
    call = UWTransform(k, x["v"], x["beta"], x["g"], chunk_size=48)
    candidate, names = Candidate("eager", "chunked", (("inverse", "blocks"),)), frozenset({"k", "v", "beta", "g"})
    outputs = uw_transform.run(call, candidate)
    gradients = uw_transform.run_backward(call, outputs, None, names, candidate)
    monkeypatch.setattr(scratch, "_SQUARES_BYTES", 1)
    assert len(scratch.head_ranges(4, 2, 48, torch.float32)) == 2
    for a, b in zip(
        (*uw_transform.run(call, candidate), *uw_transform.run_backward(call, outputs, None, names, candidate)), (*outputs, *gradients), strict=True
    ):
        assert error(a, b) < 2e-6


def test_what_cannot_be_done_is_refused_with_the_reason() -> None:
    huge = uw_transform.supports(signature("uw_transform", tokens=10**5, chunk_size=10**6), CPU)
    assert not huge
    assert "4096" in str(huge)
    assert uw_transform.supports(signature("uw_transform", tokens=100, chunk_size=10**6), CPU)
    captured = rule.supports(signature("gated_delta_rule", tokens=8, launch="graph", packed=True), CPU)
    assert "cu_seqlens" in str(captured)

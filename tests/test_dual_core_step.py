"""dual_core_step: pieces of any size equal dual_core on the whole sequence, across chunks' ends, with gradients; and what its contract refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import titans_backends as tb
from titans_backends.contracts.case import build, cases
from titans_backends.contracts.dual_core import CONTRACT as CORE
from titans_backends.contracts.dual_core import DualCore
from titans_backends.contracts.dual_core_step import CONTRACT as STEP
from titans_backends.contracts.dual_core_step import DualCoreStep
from titans_backends.contracts.validate import check_indices, validate

F64 = torch.float64
CHUNK = 5
BY_TOKEN = ("q", "k", "v", "beta", "g", "fast_gate", "slow_gate")
PIECES = (3, 1, 8, 2, 5, 1, 7, 8)
Outputs = tuple[Tensor | None, ...]


def sequence(seed: int = 0, **options: object) -> DualCore:
    """37 tokens in chunks of 5, everything given but the states; `seed` decides alpha's shape: 0-d, [H], [B, T, H]."""
    first = next(iter(cases(CORE, F64)))
    case = replace(first, T=37, G=1, H=2, V=12, given=("g", "fast_gate", "slow_gate", "alpha"), seed=seed)
    call = build(CORE, replace(case, options={"chunk_size": CHUNK, "output_final_state": True, **options}))
    assert isinstance(call, DualCore)
    return call


def part(call: DualCore, start: int, stop: int) -> dict[str, object]:
    """What the tokens start to stop have, and what all share."""
    alpha = call.alpha
    found = {name: x[:, start:stop] for name in BY_TOKEN if (x := getattr(call, name)) is not None}
    shared = {"chunk_size": call.chunk_size, "scale": call.scale, "qk_l2norm": call.qk_l2norm}
    return {**found, **shared, "alpha": alpha[:, start:stop] if isinstance(alpha, Tensor) and alpha.dim() == 3 else alpha}


def by_reference(call: DualCoreStep) -> Outputs:
    """The contract's own."""
    return STEP.reference(call)


def by_eager(call: DualCoreStep) -> Outputs:
    """The eager backend's, through the op."""
    return tb.get_op("dual_core_step", backend="eager")(**{name: getattr(call, name) for name in STEP.parameters})


def fed(call: DualCore, prefix: int, run: Callable[[DualCoreStep], Outputs], *, whole_positions: bool) -> Outputs:
    """The first tokens through dual_core, the rest in pieces through the step."""
    start = DualCore(**part(call, 0, prefix), output_final_state=True)
    o, state, fast_state = tb.get_op("dual_core", backend="eager")(**{name: getattr(start, name) for name in CORE.parameters})
    outputs, at = [o], prefix
    for tokens in PIECES:
        stop = min(37, at + tokens)
        if stop > at:
            position = torch.full((2,), at if whole_positions else at % CHUNK)
            o, state, fast_state = run(DualCoreStep(**part(call, at, stop), state=state, fast_state=fast_state, position=position))
            outputs.append(o)
        at = stop
    assert at == 37
    return torch.cat(outputs, 1), state, fast_state


@pytest.mark.parametrize("run", [by_reference, by_eager])
@pytest.mark.parametrize(("prefix", "seed", "options"), [(5, 0, {}), (7, 1, {"scale": 0.25, "qk_l2norm": True}), (14, 2, {})])
def test_a_sequence_through_the_core_and_then_the_step_equals_the_whole(
    prefix: int, seed: int, options: dict[str, object], run: Callable[[DualCoreStep], Outputs]
) -> None:
    call = sequence(seed, **options)
    for got, want in zip(fed(call, prefix, run, whole_positions=seed == 1), CORE.reference(call), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_the_gradients_through_pieces_are_those_of_the_whole() -> None:
    call = sequence(2)
    names = (*BY_TOKEN, "alpha")
    leaves = [getattr(call, name).requires_grad_() for name in names]
    weights = [torch.randn(x.shape, dtype=F64) for x in CORE.reference(call)]
    found, want = (
        torch.autograd.grad(sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)), leaves)
        for outputs in (fed(call, 7, by_eager, whole_positions=True), CORE.reference(call))
    )
    for name, a, b in zip(names, found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"d{name}: {text}")


def test_a_decay_per_chunk_is_a_g_at_each_chunks_first_token() -> None:
    call = sequence()
    factor = torch.rand(2, 8, 2, dtype=F64)
    whole = DualCore(**{**{name: getattr(call, name) for name in CORE.parameters}, "g": None, "chunk_decay": factor})
    call.g = torch.zeros_like(call.beta)
    call.g[:, ::CHUNK] = factor.log()
    for got, want in zip(fed(call, 3, by_eager, whole_positions=False), CORE.reference(whole), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def given(**changes: object) -> DualCoreStep:
    call = build(STEP, replace(next(iter(cases(STEP, F64))), B=3, T=3))
    assert isinstance(call, DualCoreStep)
    return DualCoreStep(**{**{name: getattr(call, name) for name in STEP.parameters}, **changes})


@pytest.mark.parametrize("run", [by_reference, by_eager])
def test_rows_stand_at_places_of_their_own_and_a_new_chunk_reads_nothing_old(run: Callable[[DualCoreStep], Outputs]) -> None:
    call = given(position=torch.tensor([0, 3, 129]))
    together = run(call)
    for row in range(3):
        alone = {name: t[row : row + 1] for name, t in STEP.tensors(call).items() if name != "alpha"}
        for got, want in zip(run(STEP.with_tensors(call, alone)), together, strict=True):
            torch.testing.assert_close(got, want[row : row + 1], rtol=1e-14, atol=1e-15)
    spoilt = call.fast_state.clone()
    spoilt[0] = float("nan")  # row 0 begins a chunk
    for got, want in zip(run(STEP.with_tensors(call, {"fast_state": spoilt})), together, strict=True):
        assert torch.equal(got, want)


def test_in_place_writes_the_selected_slots_of_both_states_and_no_other() -> None:
    pools = [torch.randn(5, 2, 16, 16, dtype=F64) for _ in range(2)]
    call = given(state=pools[0].clone(), fast_state=pools[1].clone(), state_indices=torch.tensor([4, -1, 1]), inplace=True)
    want = STEP.reference(call)
    got = by_eager(call)
    assert got[1] is call.state
    assert got[2] is call.fast_state
    assert not got[0][1].any()
    for a, b, old in zip(got[1:], want[1:], pools, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(a[[0, 2, 3]], old[[0, 2, 3]])
        assert not torch.equal(a[[1, 4]], old[[1, 4]])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"state_indices": torch.tensor([0, 1, 1])}, "names slot 1 more than once"),
        ({"position": torch.tensor([0, -1, 3])}, "position must be at least 0, got -1"),
        ({"state": torch.zeros(4, 2, 16, 16, dtype=F64), "fast_state": torch.zeros(4, 2, 16, 16, dtype=F64)}, "state has 4 rows"),
        ({"fast_state": torch.zeros(1, 2, 16, 16, dtype=F64).expand(3, -1, -1, -1), "inplace": True}, r"fast_state\.clone\(\) or inplace=False"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_what_it_refuses(changes: dict[str, object], sentence: str) -> None:
    call = given(**changes)

    def examine() -> None:
        validate(STEP, call)
        check_indices(STEP, call)

    with pytest.raises(ValueError, match=sentence):
        examine()


def test_states_that_share_memory_are_not_rewritten() -> None:
    q, k, v = (torch.randn(2, 2, 2, 4) for _ in range(3))
    beta, position, pool = torch.rand(2, 2, 2), torch.tensor([0, 3]), torch.randn(3, 2, 4, 4)
    step = tb.get_op("dual_core_step")
    step(q, k, v, beta, state=pool[:2].clone(), fast_state=pool[1:].clone(), position=position, inplace=True)
    for state, fast_state in ((pool[:2], pool[:2]), (pool[:2], pool[1:])):
        with pytest.raises(ValueError, match="share memory; pass clones"):
            step(q, k, v, beta, state=state, fast_state=fast_state, position=position, inplace=True)


def test_what_a_skipped_row_stands_for_reaches_no_gradient() -> None:
    q, k, v = (torch.randn(2, 2, 2, 4) for _ in range(3))
    beta, pool = torch.rand(2, 2, 2), torch.randn(3, 2, 4, 4)
    pool[0] = float("nan")
    q.requires_grad_()
    o = tb.get_op("dual_core_step")(
        q, k, v, beta, state=pool, fast_state=pool.clone(), position=torch.tensor([0, 3]), state_indices=torch.tensor([-1, 2])
    )[0]
    (found,) = torch.autograd.grad(o.sum(), q)
    assert found.isfinite().all()

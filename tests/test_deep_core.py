"""deep_core and its step: the stored numbers, pieces that join, the rule it becomes in the limit, and what its contracts refuse."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import titans_backends as tb
from tests.golden_table import Ledger
from titans_backends.contracts.case import build, cases
from titans_backends.contracts.deep_core import CONTRACT as CORE
from titans_backends.contracts.deep_core import Carry, DeepCore
from titans_backends.contracts.deep_core_step import CONTRACT as STEP
from titans_backends.contracts.deep_core_step import DeepCoreStep
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.contracts.gated_delta_rule import reference as rule
from titans_backends.contracts.validate import check_indices, validate

F64 = torch.float64
Outputs = tuple[Tensor | None, ...]


def first_case(**changes: object) -> DeepCore:
    call = build(CORE, replace(next(iter(cases(CORE, F64))), **changes))
    assert isinstance(call, DeepCore)
    return call


def changed(call: DeepCore, **changes: object) -> DeepCore:
    return DeepCore(**{**{name: getattr(call, name) for name in CORE.parameters}, **changes})


def reference(call: DeepCore) -> Outputs:
    """The contract's own."""
    return CORE.reference(call)


def eager(call: DeepCore) -> Outputs:
    """The eager backend's, through the op."""
    return tb.get_op("deep_core", backend="eager")(**{name: getattr(call, name) for name in CORE.parameters})


def step_by_reference(call: DeepCoreStep) -> Outputs:
    """The contract's own."""
    return STEP.reference(call)


def step_by_eager(call: DeepCoreStep) -> Outputs:
    """The eager backend's, through the op."""
    return tb.get_op("deep_core_step", backend="eager")(**{name: getattr(call, name) for name in STEP.parameters})


def part(call: DeepCore, start: int, stop: int) -> dict[str, Tensor]:
    """The tokens start to stop of what each token has."""
    return {name: getattr(call, name)[:, start:stop] for name in ("q", "k", "v", "eta", "g", "gate") if getattr(call, name) is not None}


@pytest.mark.golden("own_*")
@pytest.mark.parametrize("run", [reference, eager])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_the_stored_numbers(golden_file: Path, dtype: torch.dtype, run: Callable[[DeepCore], Outputs]) -> None:
    with safe_open(golden_file, "pt") as opened:
        told, x = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    q, k, v, eta, g, gate = (x[name].to(dtype) for name in ("q", "k", "v", "beta", "g", "deep_gate"))
    call = DeepCore(q, k, v, eta, g, gate=gate, chunk_size=int(told["chunk"]), period=2, output_final_state=True)
    outputs, ledger = run(call), Ledger.of("float64 inside", dtype)
    for name, got in zip(("o_deep", "deep_D", "deep_E", "deep_z", "deep_G"), outputs, strict=True):
        ledger.add(name, got, x[name])
    ledger.settle()
    assert v.shape[1] % (2 * call.chunk_size) == x["deep_n"].item()


@pytest.mark.parametrize("run", [reference, eager])
@pytest.mark.parametrize("cut", [1, 5, 21, 36])
def test_a_sequence_cut_anywhere_goes_on_exactly(cut: int, run: Callable[[DeepCore], Outputs]) -> None:
    call = first_case(T=37)
    block = call.chunk_size * call.period
    whole = reference(call)
    o, *carry = run(changed(call, **part(call, 0, cut)))
    rest = dict(zip(("initial_state", "initial_error", "initial_mass", "initial_log_decay"), carry, strict=True))
    after, *final = run(changed(call, **part(call, cut, 37), **rest, block_offset=(call.block_offset + cut) % block))
    for got, want in zip((torch.cat([o, after], 1), *final), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("run", [step_by_reference, step_by_eager])
@pytest.mark.parametrize("normalize", ["safe", "mean", "sum"])
def test_pieces_through_the_step_equal_the_whole_at_once(normalize: str, run: Callable[[DeepCoreStep], Outputs]) -> None:
    call = changed(first_case(T=37), normalize=normalize)
    block, start, outputs = call.chunk_size * call.period, 0, []
    carry = Carry(call.initial_state, call.initial_error, call.initial_mass, call.initial_log_decay)
    position = torch.full((2,), call.block_offset)
    for tokens in (1, 8, 3, 8, 8, 2, 7):
        step = DeepCoreStep(
            **part(call, start, start + tokens), **carry._asdict(), position=position,
            chunk_size=call.chunk_size, period=call.period, normalize=normalize, scale=call.scale,
        )  # fmt: skip
        o, *after = run(step)
        outputs.append(o)
        carry, position, start = Carry(*after), (position + tokens) % block, start + tokens
    for got, want in zip((torch.cat(outputs, 1), *carry), reference(call), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_rows_of_a_step_stand_at_places_of_their_own() -> None:
    call = build(STEP, replace(next(iter(cases(STEP, F64))), B=3, T=3))
    assert isinstance(call, DeepCoreStep)
    call.position = torch.tensor([0, 2, 3])
    together = STEP.reference(call)
    for row in range(3):
        given = {name: t[row : row + 1] for name, t in STEP.tensors(call).items()}
        for got, want in zip(STEP.reference(STEP.with_tensors(call, given)), together, strict=True):
            torch.testing.assert_close(got, want[row : row + 1], rtol=0, atol=0)


def test_blocks_of_one_token_with_sum_end_in_the_delta_rules_state() -> None:
    call = first_case(T=20, given=(), options={"chunk_size": 1, "period": 1, "normalize": "sum", "output_final_state": True})
    _, state, *_ = CORE.reference(call)
    _, want = rule(GatedDeltaRule(call.q, call.k, call.v, call.eta, output_final_state=True))
    torch.testing.assert_close(state, want, rtol=1e-10, atol=1e-12)


def test_nothing_of_a_block_is_read_within_it() -> None:
    call = first_case(T=37)
    later = changed(call, v=call.v.clone())
    later.v[:, 6:] += 1  # the second block starts at 16 - 11 = 5, the third at 21
    o, moved = CORE.reference(call)[0], CORE.reference(later)[0]
    assert torch.equal(o[:, :21], moved[:, :21])
    assert not torch.equal(o[:, 21:], moved[:, 21:])


def test_safe_stays_bounded_where_sum_diverges() -> None:
    call = changed(first_case(T=200, keys="correlated"), g=None, block_offset=0)
    assert CORE.reference(call)[1].abs().max() < 10
    assert CORE.reference(changed(call, normalize="sum"))[1].abs().max() > 1e6


def test_slabs_smaller_than_the_call_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block a slab, packed and ragged: outputs and all gradients."""
    blocks = importlib.import_module("titans_backends.backends.eager.deep_core")
    case = replace(next(iter(cases(CORE, F64))), lengths=(33, 0, 1, 66, 5))
    call = build(CORE, case, requires_grad=True)
    assert isinstance(call, DeepCore)
    leaves = [t for t in CORE.tensors(call).values() if t.requires_grad]

    def both(run: Callable[[DeepCore], Outputs]) -> list[Tensor]:
        outputs = [o for o in run(call) if o is not None]
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.cos(o.detach()) for o in outputs])]

    monkeypatch.setattr(blocks, "slab_budget", lambda device, backward=False: 1)
    for got, want in zip(both(eager), both(reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_a_row_has_the_same_bits_in_any_company() -> None:
    call = build(CORE, replace(next(iter(cases(CORE))), B=5, T=150, K=32, V=32))
    assert isinstance(call, DeepCore)
    alone = CORE.with_tensors(call, {name: t[2:3] for name, t in CORE.tensors(call).items()})
    assert isinstance(alone, DeepCore)
    with tb.policy(batch_invariant=True):
        for got, want in zip(eager(alone), eager(call), strict=True):
            assert torch.equal(got, want[2:3])


def test_a_float64_step_keeps_the_dtype_of_a_float32_carry() -> None:
    call = build(STEP, replace(next(iter(cases(STEP, F64))), B=2, T=2))
    assert isinstance(call, DeepCoreStep)
    narrow = STEP.with_tensors(call, {name: getattr(call, name).float() for name in ("state", "error", "mass", "log_decay")})
    assert isinstance(narrow, DeepCoreStep)
    assert [o.dtype for o in step_by_eager(narrow)] == [F64] + 4 * [torch.float32]


def test_what_the_contracts_refuse() -> None:
    call = first_case(T=4)
    with pytest.raises(ValueError, match=r"block_offset must be in \[0, chunk_size \* period\) = \[0, 16\), got 16; pass position %"):
        validate(CORE, changed(call, block_offset=16))
    with pytest.raises(ValueError, match="initial_state, initial_error, initial_log_decay given without initial_mass"):
        validate(CORE, changed(call, initial_mass=None))
    with pytest.raises(ValueError, match="initial_error, initial_mass, initial_log_decay given without initial_state"):
        validate(CORE, changed(call, initial_state=None, block_offset=0))
    alone = dict.fromkeys(("initial_error", "initial_mass", "initial_log_decay"))
    with pytest.raises(ValueError, match=r"initial_state given without initial_error, .*with block_offset=11; .*pass final_state, final_error"):
        validate(CORE, changed(call, **alone))
    validate(CORE, changed(call, **alone, block_offset=0))
    validate(CORE, changed(call, **alone, initial_state=None))
    step = build(STEP, replace(next(iter(cases(STEP, F64))), T=9))
    with pytest.raises(ValueError, match="T must be 1 to 8, got 9; use deep_core for more tokens"):
        validate(STEP, step)
    assert isinstance(step, DeepCoreStep)
    for wrong in (-1, 4):
        step.position = torch.tensor([0, wrong])
        with pytest.raises(ValueError, match=rf"position must be in \[0, chunk_size \* period\) = \[0, 4\), got {wrong}"):
            check_indices(STEP, step)

"""deep_core and its step: the stored numbers, pieces that join, the rule it becomes in the limit, and what its contracts refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

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


def first_case(**changes: object) -> DeepCore:
    call = build(CORE, replace(next(iter(cases(CORE, F64))), **changes))
    assert isinstance(call, DeepCore)
    return call


def changed(call: DeepCore, **changes: object) -> DeepCore:
    return DeepCore(**{**{name: getattr(call, name) for name in CORE.parameters}, **changes})


def part(call: DeepCore, start: int, stop: int) -> dict[str, Tensor]:
    """The tokens start to stop of what each token has."""
    return {name: getattr(call, name)[:, start:stop] for name in ("q", "k", "v", "eta", "g", "gate") if getattr(call, name) is not None}


@pytest.mark.golden("own_*")
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_the_reference_gives_the_stored_numbers(golden_file: Path, dtype: torch.dtype) -> None:
    with safe_open(golden_file, "pt") as opened:
        told, x = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    q, k, v, eta, g, gate = (x[name].to(dtype) for name in ("q", "k", "v", "beta", "g", "deep_gate"))
    call = DeepCore(q, k, v, eta, g, gate=gate, chunk_size=int(told["chunk"]), period=2, output_final_state=True)
    outputs, ledger = CORE.reference(call), Ledger.of("float64 inside", dtype)
    for name, got in zip(("o_deep", "deep_D", "deep_E", "deep_z", "deep_G"), outputs, strict=True):
        ledger.add(name, got, x[name])
    ledger.settle()
    assert v.shape[1] % (2 * call.chunk_size) == x["deep_n"].item()


@pytest.mark.parametrize("cut", [1, 5, 21, 36])
def test_a_sequence_cut_anywhere_goes_on_exactly(cut: int) -> None:
    call = first_case(T=37)
    block = call.chunk_size * call.period
    whole = CORE.reference(call)
    o, *carry = CORE.reference(changed(call, **part(call, 0, cut)))
    rest = dict(zip(("initial_state", "initial_error", "initial_mass", "initial_log_decay"), carry, strict=True))
    after, *final = CORE.reference(changed(call, **part(call, cut, 37), **rest, block_offset=(call.block_offset + cut) % block))
    for got, want in zip((torch.cat([o, after], 1), *final), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normalize", ["safe", "mean", "sum"])
def test_pieces_through_the_step_equal_the_whole_at_once(normalize: str) -> None:
    call = changed(first_case(T=37), normalize=normalize)
    block, start, outputs = call.chunk_size * call.period, 0, []
    carry = Carry(call.initial_state, call.initial_error, call.initial_mass, call.initial_log_decay)
    position = torch.full((2,), call.block_offset)
    for tokens in (1, 8, 3, 8, 8, 2, 7):
        step = DeepCoreStep(
            **part(call, start, start + tokens), **carry._asdict(), position=position,
            chunk_size=call.chunk_size, period=call.period, normalize=normalize, scale=call.scale,
        )  # fmt: skip
        o, *after = STEP.reference(step)
        outputs.append(o)
        carry, position, start = Carry(*after), (position + tokens) % block, start + tokens
    for got, want in zip((torch.cat(outputs, 1), *carry), CORE.reference(call), strict=True):
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


def test_what_the_contracts_refuse() -> None:
    call = first_case(T=4)
    with pytest.raises(ValueError, match=r"block_offset must be in \[0, chunk_size \* period\) = \[0, 16\), got 16; pass position %"):
        validate(CORE, changed(call, block_offset=16))
    with pytest.raises(ValueError, match="initial_error, initial_log_decay given without initial_mass"):
        validate(CORE, changed(call, initial_mass=None))
    step = build(STEP, replace(next(iter(cases(STEP, F64))), T=9))
    with pytest.raises(ValueError, match="T must be 1 to 8, got 9; use deep_core for more tokens"):
        validate(STEP, step)
    assert isinstance(step, DeepCoreStep)
    for wrong in (-1, 4):
        step.position = torch.tensor([0, wrong])
        with pytest.raises(ValueError, match=rf"position must be in \[0, chunk_size \* period\) = \[0, 4\), got {wrong}"):
            check_indices(STEP, step)

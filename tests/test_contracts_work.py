"""The work that the floors rest on: counted by hand for one chunk of every op, by torch where the formula is plain products, and growing as a call grows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.contract import Work
from titans_backends.contracts.validate import validate
from titans_backends.contracts.work import work_of

K, V, C = 16, 32, 64
FORM = C * K + C * K + C * V + C * C / 3 + K + V
"""The UT transform of one token, u and w: half of K K^T, half of T's products with K and V, the inverse, and beta k and beta v."""
CHUNK = C * K + C * V + 2 * K * V + 2 * K * V
"""One token of a chunk recurrence without its correction: half of QK^T, half of its product with V, the state's read and its update."""
BY_HAND: dict[str, float] = {
    "fast_core": 4 * K * V,  # a running state: half of QK^T and of its product would be C (K + V) = 3072
    "fused_uw": 2 * C * (K + V),
    "uw_transform": FORM,
    "slow_core": CHUNK + 2 * K * V,
    "gated_delta_rule": 7 * K * V,  # a chunk's form is 11 K^2 V here: decay 1, read for the error 2, write 2, read 2 are less
    "gated_delta_step": 7 * K * V,
    "dual_core": FORM + CHUNK + 2 * K * V + C * V,  # S_fast shares QK^T
    "dual_core_step": 7 * K * V + 4 * K * V,  # S_fast: write and read
    "deep_core": 6 * K * V,
    "deep_core_step": 6 * K * V,
    "short_conv": V * (2 * 4 + 1 + 4),
    "qkv_prepare": (2 * K + V) * (2 * 4 + 1 + 4) + 2 * K * 3,
    "gated_rms_norm": V * (2 + 3 + 4),
    "token_flux": 2 * (K + V) * 8 + 8 * 8,
    "chunk_flux": 2 * K * V + 3 * V + K + (2 * (K + V + 1) + 8) * 8 / C,
}
"""FLOP a token of one head, K of 16, V of 32, one chunk of 64."""


def case_of(name: str, **sizes: int) -> Case:
    first = CONTRACTS[name].variants[0]
    options = {**first.options, **({"chunk_size": C} if "chunk_size" in CONTRACTS[name].option_by_name else {})}
    return replace(Case("", B=1, T=tokens(name), G=1, H=1, K=K, V=V, options=options, given=first.given), **sizes)  # type: ignore[arg-type]


def tokens(name: str) -> int:
    return C if CONTRACTS[name].max_tokens is None else 2


def work(name: str, **sizes: int) -> Work:
    made, case = CONTRACTS[name], case_of(name, **sizes)
    call = build(made, case, "meta")
    return work_of(made, call, validate(made, call))


@pytest.mark.parametrize("name", BY_HAND)
def test_the_flop_of_a_token_are_those_counted_by_hand(name: str) -> None:
    assert work(name).flop == pytest.approx(tokens(name) * BY_HAND[name])


def test_coupled_core_is_two_recurrences_on_one_transform_and_one_qk() -> None:
    assert set(CONTRACTS) - set(BY_HAND) == {"coupled_core"}
    assert work("coupled_core").flop == pytest.approx(C * (FORM + 2 * (CHUNK + 2 * K * V) - C * K))


@pytest.mark.parametrize("name", ["fused_uw", "token_flux"])
def test_torch_counts_no_more_products_than_the_contract(name: str) -> None:
    made = CONTRACTS[name]
    with FlopCounterMode(display=False) as counted:
        made.reference(build(made, case_of(name)))
    assert 0.9 * work(name).flop <= counted.get_total_flops() <= work(name).flop


@pytest.mark.parametrize("name", CONTRACTS)
@pytest.mark.parametrize(
    "grown", [lambda name: {"B": 3}, lambda name: {"T": 3 * tokens(name)}, lambda name: {"G": 3, "H": 3}], ids=["sequences", "tokens", "heads"]
)
def test_three_times_the_call_is_three_times_the_flop(name: str, grown: Callable[[str], dict[str, int]]) -> None:
    assert work(name, **grown(name)).flop == pytest.approx(3 * work(name).flop)


def test_what_is_read_and_written_is_every_tensor_once() -> None:
    state, token = 4 * K * V, 4 * C
    assert work("slow_core").bytes == token * (K + K + V + K + 1 + 1 + V) + 2 * state  # q k u w g gate o, the state in and out
    assert work("gated_rms_norm").bytes == token * 3 * V + 4 * V
    assert work("gated_rms_norm", B=3).bytes == 3 * token * 3 * V + 4 * V  # the weight once


@pytest.mark.parametrize("name", ["gated_delta_step", "dual_core_step"])
def test_of_a_pool_of_states_the_selected_rows_count(name: str) -> None:
    made, case = CONTRACTS[name], case_of(name, B=2)
    pooled = build(made, replace(case, given=(*case.given, "state_indices")), "meta")
    assert made.tensors(pooled)["state"].shape[0] == 5
    found = work_of(made, pooled, validate(made, pooled))
    assert found.bytes == work(name, B=2).bytes + made.tensors(pooled)["state_indices"].nbytes
    assert found.flop == work(name, B=2).flop


def test_the_floor_is_the_slower_of_computing_and_moving() -> None:
    assert Work(flop=3e6, bytes=1e3).floor_us(1e12, 1e9) == pytest.approx(3.0)
    assert Work(flop=1e6, bytes=5e3).floor_us(1e12, 1e9) == pytest.approx(5.0)

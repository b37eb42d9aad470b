"""What distinguishes coupled_core: its states carry a sequence, its decays cancel in the read, and no row hangs on its neighbours."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import titans_backends as tb
from titans_backends.contracts import contract
from titans_backends.contracts.case import build, cases

CONTRACT = contract("coupled_core")
CASE = replace(next(iter(cases(CONTRACT, torch.float64))), T=70, K=8, V=6, seed=2)  # seed 2: alpha [B, T, H]
CHUNK = 32


def arguments(**changes: object) -> dict[str, object]:
    """The first variant's call in float64, with both states and the states asked for."""
    call = build(CONTRACT, replace(CASE, **{name: changes.pop(name) for name in ("B", "T", "dtype") if name in changes}))  # type: ignore[arg-type]
    return {**{name: getattr(call, name) for name in CONTRACT.parameters}, **changes}


def run(given: Mapping[str, object]) -> tuple[Tensor, Tensor, Tensor]:
    o, slow, fast = tb.get_op("coupled_core")(**given)
    return o, slow, fast


def part(given: Mapping[str, object], start: int, stop: int) -> dict[str, object]:
    """Tokens start to stop, whole chunks but for the last."""
    chunks = {name for name in ("psi", "coupling", "fast_decay", "slow_decay") if isinstance(given[name], Tensor)}
    tokens = {"q", "k", "v", "beta", "fast_gate", "slow_gate", "alpha"}
    taken = {name: given[name][:, start:stop] for name in tokens}  # type: ignore[index]
    taken |= {name: given[name][:, start // CHUNK : -(-stop // CHUNK)] for name in chunks}  # type: ignore[index]
    return {**given, **taken}


def test_a_sequence_cut_at_a_chunks_end_goes_on_from_both_states() -> None:
    given = arguments()
    whole = run(given)
    first = run(part(given, 0, CHUNK))
    second = run({**part(given, CHUNK, 70), "initial_state": first[1], "initial_fast_state": first[2]})
    torch.testing.assert_close(torch.cat([first[0], second[0]], 1), whole[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second[1:], whole[1:], rtol=1e-12, atol=1e-12)


def test_one_chunk_reads_no_memory() -> None:
    """Then both cores are the flat slow core: o = (alpha f + (1 - alpha) s) M u."""
    given = arguments(T=CHUNK, initial_state=None, initial_fast_state=None, transform="lam")
    alpha, fast, slow = (given[name] for name in ("alpha", "fast_gate", "slow_gate"))
    gate = alpha * fast + (1 - alpha) * slow  # type: ignore[operator]
    shared = {name: given[name] for name in ("q", "k", "v", "beta", "transform", "chunk_size")}
    want, _, _ = tb.get_op("dual_core")(**shared, slow_gate=gate, alpha=0.0, memory="flat")
    torch.testing.assert_close(run(given)[0], want, rtol=1e-12, atol=1e-12)


def test_decays_change_nothing_before_the_third_chunk_unless_a_state_comes_in() -> None:
    for states, same in ({"initial_state": None, "initial_fast_state": None}, True), ({}, False):
        given = arguments(**states)
        o = run(given)[0] - run({**given, "fast_decay": None, "slow_decay": None})[0]
        assert bool(o[:, : 2 * CHUNK].abs().max() < 1e-7) is same
        assert o[:, 2 * CHUNK :].abs().max() > 1e-6


def test_a_row_has_the_same_bits_whatever_shares_its_batch() -> None:
    given = arguments(B=3, dtype=torch.float32)
    alone = {name: value[1:2] if isinstance(value, Tensor) else value for name, value in given.items()}
    with tb.policy(batch_invariant=True):
        together, single = run(given), run(alone)
    assert all(torch.equal(x[1:2], y) for x, y in zip(together, single, strict=True))


def test_the_coupling_is_each_heads_own_unless_it_is_given() -> None:
    given = arguments()
    psi = given["psi"]
    assert isinstance(psi, Tensor)
    torch.testing.assert_close(run({**given, "coupling": 0.05 + 0.1 * psi}), run(given), rtol=1e-12, atol=1e-12)
    lam = (0.05 + 0.1 * psi.mean((0, 2), keepdim=True)).expand_as(psi)
    assert not torch.allclose(run({**given, "coupling": lam})[0], run(given)[0], rtol=1e-6, atol=1e-9)


def test_groups_of_heads_in_turn_give_what_all_give_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments()
    leaves = {name: value.detach().requires_grad_() for name, value in given.items() if isinstance(value, Tensor)}

    def outcome() -> tuple[Tensor, ...]:
        outputs = run({**given, **leaves})
        return (*outputs, *torch.autograd.grad(sum(o.sin().sum() for o in outputs), list(leaves.values())))

    at_once = outcome()
    monkeypatch.setattr(importlib.import_module("titans_backends.backends.eager.scratch"), "_SQUARES_BYTES", 1)
    torch.testing.assert_close(outcome(), at_once, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["psi", "coupling", "fast_decay", "slow_decay"])
def test_a_number_for_too_few_chunks_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"coupled_core: {name} has M = 2 chunks .* it must have ceil\(T / chunk_size\) = 3"):
        run(arguments(**{name: torch.ones(2, 2, 2, dtype=torch.float64)}))


def test_a_backend_without_the_op_refuses_it() -> None:
    with pytest.raises(tb.BackendRefusedError, match="coupled_core"):
        tb.get_op("coupled_core", backend="inductor")(**arguments())

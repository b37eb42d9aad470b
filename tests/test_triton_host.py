"""What happens on the host around a launch: strides of flattened dimensions, calls without heads, chunks beyond 32 bits, a first call that raises."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from titans_backends.backends.triton import gated_delta_rule, matrices, uw_transform
from titans_backends.backends.triton.ahead import collected

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.contracts.uw_transform import UWTransform
from titans_backends.plan import Plan

SCAN = {"block": 64, "prepare_warps": 4, "value_tile": 32, "warps": 4, "stages": 3, "dot": "tf32"}
SEGMENTS = {"segment": 16, "map_tile": 32, "map_warps": 4, "chain_tile": 16, "chain_warps": 4, "chain_stages": 3}
WALK = {"block": 32, "columns": 32, "pairs": False, "warps": 4, "stages": 2, "dot": "tf32"}


def sizes(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize("expanded", [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_one_stride_reaches_every_matrix_of_expanded_leading_dimensions(expanded: tuple[int, ...]) -> None:
    leading = (2, 3, 4)
    x = torch.zeros([1 if axis in expanded else size for axis, size in enumerate(leading)] + [5, 5]).expand(*leading, 5, 5)
    flat, stride = matrices.flat(x)
    places = [sum(i * step for i, step in zip(index, flat.stride(), strict=False)) for index in itertools.product(*map(range, leading))]
    assert places == [matrix * stride for matrix in range(len(places))]


@pytest.mark.parametrize("variant", ["whole", "scan", "split", "states"])
def test_a_final_state_without_heads_launches_nothing(variant: str) -> None:
    q, v = sizes(1, 20, 0, 16), sizes(1, 20, 0, 16)
    params = {**SCAN, **SEGMENTS, "output_tile": 64, "output_warps": 4}
    call = GatedDeltaRule(q, q, v, sizes(1, 20, 0), output_final_state=True)
    assert collected(gated_delta_rule.run, call, Candidate("triton", variant, tuple(params.items()))) == []


@pytest.mark.parametrize("chunk_size", [2**31 - 1, 2**63 - 1])
def test_a_chunk_beyond_any_sequence_can_be_added_to_tokens_in_32_bits(chunk_size: int) -> None:
    k = sizes(1, 20, 2, 16)
    call = UWTransform(k, k, sizes(1, 20, 2), chunk_size=chunk_size)
    ((kernel, form),) = collected(uw_transform.run, call, Candidate("triton", "walk", tuple(WALK.items())))
    assert form.constants[kernel.constant_names.index("CHUNK")] <= 2**30


def test_a_plan_whose_first_call_raised_is_remembered_at_the_next() -> None:
    asked: list[str] = []

    def remember(call: object, candidate: object) -> tuple[tuple[str, ...], object]:
        asked.append("remember")
        if len(asked) == 1:
            raise torch.OutOfMemoryError("none left")
        return ("first",), lambda later: ("again",)

    module = SimpleNamespace(remember=remember, run=lambda call, candidate: ("run",))
    choice = SimpleNamespace(pair=SimpleNamespace(forward=None))
    plan = Plan(choice, module, None, False, torch.device("cpu"), lambda call: ())  # type: ignore[arg-type]
    with pytest.raises(torch.OutOfMemoryError):
        plan.run(None)  # type: ignore[arg-type]
    assert [plan.run(None) for _ in range(2)] == [("first",), ("again",)]  # type: ignore[arg-type]

"""Rows that no asynchronous copy takes: which tiles Triton's ops offer on them, and what a gradient's rows become."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from tests.triton_forms import module_of, offered, signature
from tests.triton_machines import H100
from titans_backends.backend import Candidate
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, View
from titans_backends.signature import Signature, TensorFacts

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="the package triton is not installed: pip install -c constraints.txt -e '.[test]'"
)

OPS = ("gated_delta_rule", "slow_core", "dual_core")


def facts(op: str, keys: int, values: int, dtype: torch.dtype = torch.float16, view: View = "contiguous", tokens: int = 500) -> Signature:
    """The signature of the op's first variant."""
    variant = CONTRACTS[op].variants[0]
    return signature(op, Case("", T=tokens, K=keys, V=values, dtype=dtype, view=view, options=variant.options, given=variant.given))[1]


def with_stride(given: Signature, name: str, stride: tuple[int, ...]) -> Signature:
    """The same with other strides of a tensor."""
    tensors = tuple((one, replace(known, stride=stride) if one == name else known) for one, known in given.tensors)
    return replace(given, tensors=tensors)


def with_address(given: Signature, name: str) -> Signature:
    """The same with a tensor that does not begin on 16 bytes."""

    def moved(one: str, known: TensorFacts) -> TensorFacts:
        return replace(known, aligned=False) if one == name else known

    return replace(given, tensors=tuple((one, moved(one, known)) for one, known in given.tensors))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [(16, 16), (48, 80), (60, 100), (128, 64)])
def test_any_heads_are_served(op: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    for view in ("contiguous", "transposed", "expanded", "misaligned"):
        verdict = module_of(op).supports(facts(op, *heads, dtype, view=view), H100)  # type: ignore[arg-type]
        assert verdict, verdict


def tall(candidates: list[Candidate]) -> list[Candidate]:
    """Those whose scan is delta_scan's, with blocks of 64 rows."""
    return [
        one
        for one in candidates
        if one.variant in ("scan", "split", "states", "scored") and "value_tile" in dict(one.params) and one.param("block") == 64
    ]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("heads", [(20, 20), (20, 36), (60, 60), (100, 40)])
def test_on_odd_rows_no_scan_of_tall_blocks_has_narrow_tiles(op: str, heads: tuple[int, int]) -> None:
    found = tall(offered(op, facts(op, *heads), H100))
    assert all(int(one.param("value_tile")) >= 64 and int(one.param("map_tile") if one.variant == "split" else 64) >= 64 for one in found)
    assert len(set(found)) == len(found)
    if max(heads) > 32:
        assert found
        even = facts(op, 64, 64)
        for given in (with_address(even, "k"), with_stride(even, "k", (500 * 136, 136, 68, 1))):
            loose = tall(offered(op, given, H100))
            assert loose
            assert all(int(one.param("value_tile")) >= 64 for one in loose)
        assert any(int(one.param("value_tile")) < 64 for one in tall(offered(op, facts(op, 64, 64), H100)))


def test_a_gradient_is_copied_where_its_rows_begin_elsewhere() -> None:
    from titans_backends.backends.triton.grid import in_rows

    whole = torch.zeros(1, 4, 2, 64, dtype=torch.float16)
    assert in_rows(whole) is whole
    expanded = torch.zeros(1, dtype=torch.float16).expand(1, 4, 2, 64)
    assert in_rows(expanded).is_contiguous()
    sliced = torch.zeros(1, 4, 2, 72, dtype=torch.float16)[..., :64]
    shifted = torch.zeros(4 * 2 * 64 + 1, dtype=torch.float16)[1:].view(1, 4, 2, 64)
    for given in (sliced, shifted):
        copied = in_rows(given)
        assert copied.data_ptr() % 16 == 0
        assert copied.stride() == whole.stride()
    odd = torch.zeros(1, 4, 2, 72, dtype=torch.float16)[..., :60]
    assert in_rows(odd) is odd  # no copy of it would do
    wide = torch.zeros(1, 4, 2, 72)[..., :64]
    assert in_rows(wide) is wide

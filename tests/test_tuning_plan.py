"""The grid: which buckets a tune measures, before anything is built."""

from __future__ import annotations

import pytest

from titans_backends.buckets import bucket_of, field
from titans_backends.contracts import CONTRACTS
from titans_backends.errors import UnknownNameError
from titans_backends.tuning.plan import DEFAULT_GRIDS, plan
from titans_backends.tuning.problem import signature_of_bucket


@pytest.mark.parametrize(("kind", "quick"), list(DEFAULT_GRIDS))
def test_every_default_bucket_is_the_bucket_of_its_own_case(kind: str, quick: bool) -> None:
    buckets = plan(kind, quick=quick)
    seven = {"fast_core", "fused_uw", "uw_transform", "slow_core", "gated_delta_rule", "gated_delta_step", "dual_core"}  # of which a CPU has a choice
    assert {bucket.op for bucket in buckets} == (seven if kind == "cpu" else {op for op, made in CONTRACTS.items() if not made.experimental})
    assert len(set(buckets)) == len(buckets)
    assert [bucket_of(signature_of_bucket(bucket)) for bucket in buckets] == list(buckets)


def test_options_replace_their_axis_and_leave_no_bucket_twice() -> None:
    buckets = plan("cpu", ops=["slow_core"], seq_lens=[512, 2048], heads=[(16, 32)], head_dims=[(128, 128)], regimes=["inference"])
    assert [bucket.seq_len for bucket in buckets] == [512, 2048]
    assert all((field(b, "group"), field(b, "streams"), field(b, "head_dim")) == (2, 32, (128, 128)) for b in buckets)


def test_a_batch_multiplies_the_streams() -> None:
    (bucket,) = plan("cpu", ops=["gated_delta_rule"], seq_lens=[64], heads=[(2, 4)], head_dims=[(8, 8)], regimes=["inference"], batch=3)
    assert field(bucket, "streams") == 12


def test_an_op_takes_only_the_lengths_that_it_can_have() -> None:
    step = plan("cpu", ops=["gated_delta_step"], seq_lens=[512, 4], heads=[(2, 2)], head_dims=[(8, 8)])
    assert {bucket.seq_len for bucket in step} == {4}
    assert {bucket.seq_len for bucket in plan("cpu", ops=["gated_delta_step"], seq_lens=[512])} == {1}


def test_the_length_of_fused_uw_counts_every_matrix() -> None:
    (bucket,) = plan("cpu", ops=["fused_uw"], seq_lens=[100], heads=[(2, 4)], head_dims=[(8, 8)], regimes=["inference"])
    assert bucket.seq_len == 64 * 2 * 4


def test_an_op_beyond_the_blocks_of_a_regime_is_planned_all_the_same() -> None:
    buckets = plan("cpu", ops=["gated_delta_step"], regimes=["training"])
    assert buckets
    assert {field(bucket, "regime") for bucket in buckets} == {"training"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"launches": ["graph"]}, "launch=graph needs a CUDA device"),
        ({"dtypes": ["int8"]}, "dtype must be one of"),
        ({"seq_lens": [0]}, "at least 1"),
        ({"heads": [(3, 4)]}, "divide"),
        ({"regimes": ["prefill"]}, "inference or training"),
    ],
)
def test_what_no_op_accepts_is_refused_with_its_name(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan("cpu", **options)  # type: ignore[arg-type]


def test_an_unknown_op_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="slow_core"):
        plan("cpu", ops=["slowcore"])

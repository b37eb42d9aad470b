"""Keys: what makes another bucket, what does not, and what is left out of the file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_backends.buckets import Bucket, bucket_of, defaults_of, field, streams_of
from titans_backends.cache.lookup import Hit, lookup
from titans_backends.cache.schema import Device, Entry, Environment, Table, canonical_when, full_when
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build, cases
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.signature import Signature


def signature(name: str, case: Case, **settings: object) -> Signature:
    made = CONTRACTS[name]
    call = build(made, case, "meta")
    return signature_of(made, call, validate(made, call), **settings)  # type: ignore[arg-type]


BASE = Case("base", B=2, T=100, G=2, H=4, K=8, V=16, given=("g",))


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.bfloat16}, {"K": 16}, {"G": 4}, {"options": {"chunk_size": 32}}, {"options": {"qk_l2norm": True}}, {"given": ()},
        {"given": ("g", "initial_state")}, {"B": 4}, {"T": 101}, {"lengths": (50, 50)},
    ],
    ids=str,
)  # fmt: skip
def test_what_makes_another_bucket(changes: dict[str, object]) -> None:
    assert bucket_of(signature("gated_delta_rule", BASE)) != bucket_of(signature("gated_delta_rule", replace(BASE, **changes)))


@pytest.mark.parametrize("changes", [{"options": {"scale": 0.3}}, {"options": {"output_final_state": True}}, {"given": ("g", "gate")}], ids=str)
def test_what_does_not(changes: dict[str, object]) -> None:
    assert bucket_of(signature("gated_delta_rule", BASE)) == bucket_of(signature("gated_delta_rule", replace(BASE, **changes)))


def test_settings_make_another_bucket() -> None:
    base = signature("gated_delta_rule", BASE)
    changed = [
        replace(base, regime="training"), replace(base, launch="graph"), replace(base, float32="high"), replace(base, deterministic=True),
        replace(base, regime="training", may_save=False), replace(base, tensors=tuple((n, replace(f, aligned=False)) for n, f in base.tensors)),
    ]  # fmt: skip
    assert len({bucket_of(s) for s in [base, *changed]}) == 7


def test_defaults_are_left_out_and_read_back() -> None:
    bucket = bucket_of(signature("gated_delta_rule", BASE))
    assert dict(bucket.when) == {"dtype": "float32", "g": True, "group": 2, "head_dim": (8, 16), "streams": 8}
    assert field(bucket, "chunk_size") is None
    assert field(bucket, "regime") == "inference"
    assert canonical_when(full_when(bucket.when, defaults_of(bucket.op)), defaults_of(bucket.op)) == bucket.when


def test_packed_sequences_count_by_their_mean_length() -> None:
    packed = signature("gated_delta_rule", replace(BASE, lengths=(30, 0, 90)))
    assert (bucket_of(packed).seq_len, streams_of(packed)) == (40, 12)


def test_fused_uw_counts_its_matrices_as_length() -> None:
    call = CONTRACTS["fused_uw"].make_call(torch.zeros(3, 5, 32, 32), torch.zeros(3, 5, 32, 8), torch.zeros(3, 5, 32, 4))
    bucket = bucket_of(signature_of(CONTRACTS["fused_uw"], call, validate(CONTRACTS["fused_uw"], call)))
    assert (bucket.seq_len, field(bucket, "chunk_size"), field(bucket, "streams"), field(bucket, "head_dim")) == (480, 32, 1, (4, 8))


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_case_has_a_bucket_that_a_table_finds_again(name: str) -> None:
    for case in cases(CONTRACTS[name]):
        if case.B and case.T:
            bucket = bucket_of(signature(name, case))
            table = Table(Device("cpu", "x", "x"), {"a": Environment("0", "2")}, {bucket: Entry("eager/x", 1.0, 0.0, 0.0, env="a")})
            found = lookup(table, bucket.op, bucket.when, bucket.seq_len, defaults_of(name))
            assert isinstance(found, Hit)
            assert found.kind == "exact"


@given(asked=st.integers(1, 10**6), tuned=st.sets(st.integers(1, 10**6), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_the_nearest_length_is_the_nearest_in_log2_inside_the_tuned_range(asked: int, tuned: set[int]) -> None:
    when = bucket_of(signature("fast_core", Case("x", B=1, T=8))).when
    rows = {Bucket("fast_core", when, length): Entry("eager/x", 1.0, 0.0, 0.0, env="a") for length in tuned}
    found = lookup(Table(Device("cpu", "x", "x"), {"a": Environment("0", "2")}, rows), "fast_core", when, asked, defaults_of("fast_core"))
    if not min(tuned) <= asked <= max(tuned):
        assert not isinstance(found, Hit)
        return
    assert isinstance(found, Hit)
    ratio = max(asked, found.seq_len) / min(asked, found.seq_len)
    assert all(max(asked, other) / min(asked, other) >= ratio for other in tuned)

"""From a bucket to inputs and back again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests import fresh
from titans_backends.buckets import Bucket, bucket_of, defaults_of
from titans_backends.cache.schema import WhenValue, canonical_when
from titans_backends.contracts import CONTRACTS, contract
from titans_backends.contracts.case import build
from titans_backends.contracts.validate import check_indices, validate
from titans_backends.facts import signature_of
from titans_backends.tuning.problem import case_of, signature_of_bucket


def bucket(op: str, seq_len: int, **fields: WhenValue) -> Bucket:
    values: dict[str, WhenValue] = {"dtype": "float32", "head_dim": (16, 8), "streams": 1 if op == "fused_uw" else 4, **fields}
    return Bucket(op, canonical_when(values, defaults_of(op)), seq_len)


UNUSUAL = [
    bucket("fast_core", 70, chunk_size=32, g=True, group=2),
    bucket("slow_core", 70, chunk_decay=True, initial_state=True, delta=False),
    bucket("slow_core", 70, packed=True, streams=12, chunk_decay=True),
    bucket("uw_transform", 65, transform="lam", dtype="bfloat16"),
    bucket("gated_delta_rule", 33, packed=True, streams=128, g=True, initial_state=True, qk_l2norm=True),
    bucket("gated_delta_rule", 40, chunk_size=48, regime="training", saves="inputs", aligned=False),
    bucket("gated_delta_step", 8, state_indices=True, inplace=True, streams=192, group=4),
    bucket("dual_core", 70, memory="flat", transform="lam", deterministic=True, float32="high"),
    bucket("dual_core", 70, normalize_read=True, chunk_decay=True, regime="training"),
    bucket("fused_uw", 96, chunk_size=32, aligned=False),
    bucket("short_conv", 70, head_dim=(8, 8), lookahead=1),
    bucket("qkv_prepare", 33, group=2, packed=True, streams=12, q_state=True, k_state=True, v_state=True),
]


@pytest.mark.parametrize("given", UNUSUAL, ids=lambda b: f"{b.op} {b.seq_len}")
def test_the_signature_of_a_bucket_is_in_that_bucket(given: Bucket) -> None:
    assert bucket_of(signature_of_bucket(given)) == given


@pytest.mark.parametrize("given", UNUSUAL, ids=lambda b: f"{b.op} {b.seq_len}")
def test_the_built_inputs_are_valid_and_have_the_signature_of_the_sizes(given: Bucket) -> None:
    made = contract(given.op)
    call = build(made, case_of(given))
    check_indices(made, call)
    sized = signature_of_bucket(given)
    built = signature_of(made, call, validate(made, call), regime=sized.regime, may_save=sized.may_save)
    assert replace(built, float32=sized.float32, deterministic=sized.deterministic) == sized


def test_packed_inputs_are_ragged_and_keep_their_mean_length() -> None:
    case = case_of(bucket("gated_delta_rule", 33, packed=True, streams=12))
    assert case.lengths is not None
    assert len(set(case.lengths)) > 1
    assert sum(case.lengths) == 33 * len(case.lengths)


def test_the_heads_of_the_caller_are_taken_where_they_divide() -> None:
    given = bucket("gated_delta_rule", 33, streams=12)
    assert (case_of(given).H, case_of(given, 3).H, case_of(given, 3).B, case_of(given, 5).H) == (12, 3, 4, 12)


def test_every_op_can_be_timed_in_training() -> None:
    for op in CONTRACTS:
        given = bucket(op, 1 if contract(op).max_tokens else 64, regime="training")
        assert signature_of_bucket(given).needs


def test_a_group_that_does_not_divide_the_streams_is_an_error() -> None:
    with pytest.raises(ValueError, match="group"):
        case_of(bucket("slow_core", 64, streams=3, group=2))


def test_a_signature_takes_no_memory_for_its_tensors() -> None:
    huge = bucket("gated_delta_rule", 1 << 40, streams=64)
    assert dict(signature_of_bucket(huge).dims)["T"] == 1 << 40


def test_torchs_settings_become_the_buckets_and_inductor_stays_out_where_nothing_changes() -> None:
    code = (
        "import sys, torch\n"
        "from titans_backends.buckets import Bucket\n"
        "from titans_backends.tuning.problem import set_torch\n"
        "def settings(**fields):\n"
        "    set_torch(Bucket('slow_core', tuple(fields.items()), 16))\n"
        "    return torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), 'torch._inductor' in sys.modules\n"
        "print([settings(), settings(float32='high'), settings(deterministic=True)[:2], settings()[:2]])\n"
    )
    done = fresh.run(code)
    assert done.stdout.strip() == "[('highest', False, False), ('high', False, False), ('highest', True), ('highest', False)]", done.stderr

"""What candidates are compared with: hostile cases, chunk-start states, and parts of the timed call."""

from __future__ import annotations

import pytest
import torch

from titans_backends.buckets import Bucket, bucket_of, defaults_of, field
from titans_backends.cache.schema import WhenValue, canonical_when
from titans_backends.contracts import CONTRACTS, contract
from titans_backends.contracts.case import Case, Variant, build, cotangents
from titans_backends.contracts.validate import validate
from titans_backends.facts import with_sizes
from titans_backends.tuning.problem import signature_of_case
from titans_backends.tuning.slices import group_part, heads_part
from titans_backends.tuning.suite import chunk_starts, hostile_cases, suite_key, wanted_gradients

VARIANTS = [(op, variant) for op, made in CONTRACTS.items() for variant in made.variants]


def bucket(op: str, seq_len: int = 150, **fields: WhenValue) -> Bucket:
    has_keys = any("K" in argument.dims[0].split() for argument in contract(op).arguments)
    values: dict[str, WhenValue] = {"dtype": "float64", "head_dim": (8 if has_keys else 4, 4), "streams": 1 if op == "fused_uw" else 4, **fields}
    return Bucket(op, canonical_when(values, defaults_of(op)), seq_len)


def case_with(op: str, variant: Variant, *, packed: bool = False) -> Case:
    tokens, lengths = 3 if contract(op).max_tokens else 70, (33, 0, 1, 66, 0) if packed else None
    return Case(variant.name, T=tokens, G=2, H=4, K=8, V=4, dtype=torch.float64, options=variant.options, given=variant.given, lengths=lengths)


@pytest.mark.parametrize("op", list(CONTRACTS))
@pytest.mark.parametrize("packed", [False, True])
def test_hostile_cases_share_the_key_of_their_bucket(op: str, packed: bool) -> None:
    if packed and "cu_seqlens" not in contract(op).argument_by_name:
        pytest.skip(f"{op} takes no packed sequences")
    given = bucket(op, 4 if contract(op).max_tokens else 128, **({"packed": True, "streams": 8} if packed else {}))
    cases = list(hostile_cases(given))
    assert len(cases) >= 2
    for case in cases:
        found = bucket_of(signature_of_case(given, case, "cpu"))
        assert {name: value for name, value in found.when if name != "streams"} == {name: value for name, value in given.when if name != "streams"}
        if packed:  # an empty sequence in the middle and at the end, one of a single token
            assert case.lengths is not None
            assert (case.lengths[1:3], case.lengths[-1], sum(case.lengths)) == ((0, 1), 0, case.T)


@pytest.mark.parametrize("op", ["short_conv", "qkv_prepare"])
def test_an_op_that_looks_ahead_is_asked_for_no_state(op: str) -> None:
    for case in hostile_cases(bucket(op, lookahead=1)):
        validate(contract(op), build(contract(op), case, "meta"))


def test_hostile_cases_hold_what_kernels_stumble_over() -> None:
    cases = list(hostile_cases(bucket("gated_delta_rule", 4096, g=True, group=2)))
    assert {case.view for case in cases} >= {"transposed"}
    assert {case.decay for case in cases} >= {"zero", "hard"}
    assert any(case.keys == "correlated" and case.T >= 200 for case in cases)
    assert any(case.beta == "extreme" for case in cases)
    assert all(case.T % 64 for case in cases)
    assert all(case.H // case.G == 2 and case.G > 1 for case in cases)
    assert {case.view for case in hostile_cases(bucket("gated_delta_rule", aligned=False))} == {"transposed", "misaligned"}


@pytest.mark.parametrize(("dtype", "decay"), [("float32", "fleeting"), ("bfloat16", "fast")])
def test_in_training_gates_forget_within_a_token_over_a_last_chunk_of_several(dtype: str, decay: str) -> None:
    fast = {
        regime: [case for case in hostile_cases(bucket("slow_core", 4096, dtype=dtype, g=g, regime=regime)) if case.decay == decay]
        for regime, g in (("training", True), ("inference", True))
    }
    (case,) = fast["training"]
    assert case.T % 64 > 1
    assert fast["inference"] == []
    assert all(case.decay != decay for case in hostile_cases(bucket("slow_core", 4096, dtype=dtype, regime="training")))


def test_buckets_that_differ_in_size_only_share_their_exams() -> None:
    one, other = bucket("slow_core", 512, g=True), bucket("slow_core", 8192, g=True, streams=64)
    assert suite_key(one) == suite_key(other)
    assert suite_key(one) != suite_key(bucket("slow_core", 100, g=True))
    assert suite_key(one) != suite_key(bucket("slow_core", 512))


@pytest.mark.parametrize(("op", "variant"), [v for v in VARIANTS if contract(v[0]).grid], ids=lambda v: getattr(v, "name", v))
@pytest.mark.parametrize("packed", [False, True])
def test_a_call_that_starts_from_a_chunks_state_goes_on_exactly(op: str, variant: Variant, packed: bool) -> None:
    made = contract(op)
    case = case_with(op, variant, packed=packed)
    call = build(made, case)
    starts = chunk_starts(made, call)
    assert starts is not None
    assert made.grid is not None
    grid, sequence_first = made.grid(call), 0 if not packed else 34
    assert starts.shape[1] == validate(made, call).get("M", starts.shape[1])
    outputs = made.reference(call)
    second = sequence_first + grid  # the second chunk of the only sequence that has two
    rest = {name: tensor[:, second:] for name, tensor in made.tensors(call).items() if made.argument_by_name[name].dims[-1].startswith("B T")}
    index = 1 if not packed else -(-33 // grid) + 1 + 1
    if "chunk_decay" in made.tensors(call):
        rest["chunk_decay"] = made.tensors(call)["chunk_decay"][:, index:]
    fields = {name: getattr(call, name) for name in made.parameters} | rest | {"initial_state": starts[:, index], "cu_seqlens": None}
    continued = made.reference(made.make_call(**fields))
    assert outputs[0] is not None
    assert continued[0] is not None
    torch.testing.assert_close(continued[0], outputs[0][:, second:], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("op", "variant"), VARIANTS, ids=lambda v: getattr(v, "name", v))
@pytest.mark.parametrize("packed", [False, True])
def test_the_reference_of_a_part_is_the_part_of_the_reference(op: str, variant: Variant, packed: bool) -> None:
    made = contract(op)
    if packed and "cu_seqlens" not in made.argument_by_name:
        pytest.skip(f"{op} takes no packed sequences")
    case = case_with(op, variant, packed=packed)
    call = build(made, case)
    dims = with_sizes(validate(made, call))
    whole = made.reference(call)
    for most in (1000, 40):
        part = heads_part(made, call, dims, most)
        validate(made, part.call)
        compared = 0
        for index, want in enumerate(made.reference(part.call)):
            got = None if whole[index] is None else part.output(index, whole[index])  # type: ignore[arg-type]
            if got is not None and want is not None:
                torch.testing.assert_close(got, want.reshape(got.shape), rtol=1e-9, atol=1e-12)
                compared += 1
        assert compared
        assert part.shortened == (
            most == 40 and op != "fused_uw" and not made.max_tokens and not packed and not getattr(call, "lookahead", 0) and "Z" not in dims
        )


@pytest.mark.parametrize(("op", "variant"), VARIANTS, ids=lambda v: getattr(v, "name", v))
def test_the_gradients_of_a_group_of_heads_are_complete(op: str, variant: Variant) -> None:
    made = contract(op)
    case = case_with(op, variant)
    call = build(made, case)
    dims = with_sizes(validate(made, call))
    grads = cotangents(made, call, made.reference(call))
    whole = wanted_gradients(made, call, grads)
    part = group_part(made, call, dims)
    cut = tuple(None if grad is None else part.output(index, grad) for index, grad in enumerate(grads))
    compared = 0
    for name, got, want in zip(made.differentiable, whole, wanted_gradients(made, part.call, cut), strict=True):
        piece = None if got is None else part.gradient(name, got)
        if piece is not None and want is not None:
            torch.testing.assert_close(piece, want.reshape(piece.shape), rtol=1e-8, atol=1e-11)
            compared += 1
    assert compared >= (1 if op == "short_conv" else 2)  # its weight and bias are of all sequences


def test_a_bucket_in_training_asks_for_every_gradient() -> None:
    given = bucket("slow_core", regime="training", g=True)
    assert field(given, "regime") == "training"
    (first, *_) = hostile_cases(given)
    assert signature_of_case(given, first, "cpu").needs == {"q", "k", "u", "w", "g", "gate"}

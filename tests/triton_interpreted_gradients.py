"""The Triton backend's backward kernels in Triton's interpreter: every gradient against float64 autograd, on poisoned memory, in float32; where gates forget
within a token in float16, too.

Runs as `TRITON_INTERPRET=1 pytest tests/triton_interpreted_gradients.py`, for one op with `-k slow_core-`; `test_triton_interpreter.py` starts it. A
program costs the interpreter what its statements cost, hardly what its tiles hold: so the calls are as short as two or three blocks allow, and no
two differ in sizes alone. An op's default runs every kind of call that the kernels tell apart; the other candidates a dense call, as many as it takes to have
every value of every parameter, and a packed and a wide one, a candidate of each variant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor

from tests.triton_forms import AROUND, TRAINED
from tests.triton_interpreted import LIMIT, NOT_INTERPRETED, around, every_size, expect_none, is_chosen, module_of, poisoned_memory
from tests.triton_machines import H100
from titans_backends.backend import Candidate, TrainableOpModule
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.contract import Call, Contract
from titans_backends.contracts.tolerance import Tolerance
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.tuning.gate import check_backward, failure
from titans_backends.tuning.ledger import Ledger
from titans_backends.tuning.suite import Exam, exam_of, wanted_gradients

__all__ = ["every_size", "poisoned_memory"]  # fixtures for every test of this file

LEFT: Mapping[str, tuple[str, ...]] = {"slow_core": ("normalized read",), "dual_core": ("normalized read",)}
"""The variants whose backward another backend supplies."""
RICH = {"fast_core": "continued"}
"""The variants with the most tensors, where that is not the first."""
FAST = Tolerance(1e-2, 3e-3)
"""In float16: a diagonal of the scores that cancelled in dg, but for its rounding, left 1.5e-2 to 1e-1 of dg; 1.5e-3 is what is left without it."""
LAST = {"fused_uw": {"_chunk": 35}, "gated_delta_rule": {"chunk_size": 32}, "slow_core": {"chunk_size": 32}}
"""What the calls of the other candidates have besides: matrices of an odd size, three blocks, on which the forward may save states."""


def richest(made: Contract) -> Case:
    """The variant with the most tensors, one row of one head, two or three blocks of which the last is ragged."""
    chosen = next(variant for variant in made.variants if variant.name == RICH.get(made.name, made.variants[0].name))
    given = dict.fromkeys((*chosen.given, *(("gate",) if "gate" in made.argument_by_name else ())))
    return Case("", B=1, T=40 if made.experimental else 70, G=1, H=1, options=chosen.options, given=tuple(given))


def kinds(made: Contract) -> Iterator[Case]:
    """Every kind of call that the kernels tell apart."""
    if made.name in AROUND:
        yield from around(made, 4 if made.name == "qkv_prepare" else 21)  # short_conv has the same kernel, and more than one span
        return
    base, composed = richest(made), made.name == "dual_core"
    short = replace(base, T=35)
    yield replace(short, name="grouped heads, strided", B=2, H=2, view="transposed", seed=1)
    yield replace(short, name="K != V, odd, misaligned", K=20, V=36, view="misaligned")
    for name, changes in {"B=0": {"B": 0}, "T=0": {"T": 0}, "T=1": {"T": 1}, "T=63": {"T": 63}, "T=64": {"T": 64}}.items():
        if made.experimental and changes.get("T", 0) > 1:
            continue
        yield replace(base, name=name, **changes)  # type: ignore[arg-type]
    if "normalize_final" in made.option_by_name:
        options = {**base.options, "output_final_state": True, "normalize_final": True}
        if composed:  # the exact rule with it is left to another backend
            options |= {"transform": "lam", "chunk_size": 32}
        yield replace(base, name="T=0, normalized final", T=0, options=options)
    if not composed:  # whose parts are the other ops
        yield replace(short, name="expanded", view="expanded")
        yield replace(short, name="K 80, V 48", K=80, V=48)
        widest = replace(base, name="K 256, V 256", T=20, K=256 if made.name != "coupled_core" else 128, V=256)
        yield widest if made.name != "slow_core" else replace(widest, options={**base.options, "chunk_size": 16})  # float32 chunks of 64 fit no card
    if made.name == "fused_uw":
        yield replace(base, name="matrices of 20", options={"_chunk": 20})
        yield replace(base, name="a matrix of 130", T=130, options={"_chunk": 130})
        return
    if not composed:
        yield replace(base, name="correlated keys, beta 0 1 2", keys="correlated", beta="extreme")
        yield replace(base, name="g 0 and -20", decay="hard")
        yield replace(base, name="g -7 to -3", decay="fast")
    for variant in made.variants:
        if variant.name in LEFT.get(made.name, ()):
            continue
        case = replace(base, name=variant.name, options=variant.options, given=variant.given)
        if composed and variant.gentle:  # in float32 no transform of more than 64 tokens
            case = replace(case, T=40, options={**variant.options, "chunk_size": 32})
        yield case
        if made.experimental and variant is not made.variants[0]:
            continue
        yield replace(case, name=f"{variant.name}, packed with empty sequences", H=2, lengths=(32, 0, 1, 66, 0))
    if composed:  # S_slow by slow_core, which no variant that is served asks for
        options = {"transform": "lam", "chunk_size": 16, "output_final_state": True, "qk_l2norm": True}
        lam = replace(base, name="lam, recurrent", T=40, options=options, seed=2)
        yield lam
        yield replace(lam, name="lam, recurrent, no delta, packed", H=2, lengths=(17, 0, 1, 20), options={**options, "delta": False})
    elif "chunk_size" in made.option_by_name:
        small = replace(base, options={**base.options, "chunk_size": 16, **({"chunk_offset": 5} if "chunk_offset" in base.options else {})})
        yield replace(small, name="chunk 16", T=40)
        if made.name in ("fast_core", "gated_delta_rule"):
            yield replace(small, name="chunk 256", T=140, options={**base.options, "chunk_size": 256})


def others(made: Contract) -> Iterator[Case]:
    """A dense and a packed call for other candidates, in all sizes odd; one with wide heads, and one of each other transform."""
    base = richest(made)
    if made.name in AROUND:
        yield replace(base, name="odd", T=9, H=2, K=20, V=36)
        return
    odd = replace(base, name="odd", H=2, K=20, V=36, options={**base.options, **LAST.get(made.name, {})})
    yield odd
    if made.name == "fused_uw":
        yield replace(odd, name="six matrices of 20", T=50, options={"_chunk": 20})
        return
    if made.name != "dual_core":
        yield replace(odd, name="odd, packed", lengths=(32, 0, 1, 66))
    yield replace(odd, name="K 80, V 48", T=35, H=1, K=80, V=48)
    for variant in made.variants[1:]:
        if variant.name not in LEFT.get(made.name, ()) and not {"transform", "memory"}.isdisjoint(variant.options):
            yield replace(odd, name=variant.name, T=40, options={**variant.options, "chunk_size": 32}, given=variant.given)


def alone(made: Contract) -> Iterator[Case]:
    """A short call of grouped heads with every tensor that its variant has."""
    yield replace(richest(made), name="grouped heads", T=5 if made.name in AROUND else 20, H=2)


def together(made: Contract) -> Iterator[Case]:
    """What the one kernel for the gradients of q, k and w tells apart; short, but for several blocks and tiles of values."""
    base = replace(richest(made), T=35)
    yield replace(base, name="grouped heads, strided, K != V, odd", H=2, K=20, V=36, view="transposed")
    yield replace(base, name="packed with empty sequences", H=2, lengths=(33, 0, 1, 20, 0))
    yield replace(base, name="g -7 to -3, correlated keys, beta 0 1 2", decay="fast", keys="correlated", beta="extreme", K=100, V=16)
    for variant in made.variants[1:3]:  # without g; keys of length 1, or a chunk_decay
        yield replace(base, name=variant.name, options=variant.options, given=variant.given)


def as_one(candidate: Candidate, case: Case) -> Candidate:
    """The same with one kernel for the gradients of q, k and w, also where it is not offered."""
    params = {**dict(candidate.params), "gradient_keys": max(16, 1 << (case.K - 1).bit_length()), "gradients": "one"}
    return replace(candidate, params=tuple(params.items()))


def offered(made: Contract, call: Call) -> list[Candidate]:
    """What the op offers an H100 for the backward of a call; segments of one block, packed ones of two, so that short calls have several."""
    module, signature = cast(TrainableOpModule, module_of(made.name)), signature_of(made, call, validate(made, call), regime="training")
    verdict = module.supports(signature, H100)
    assert verdict, f"refused: {verdict}"
    found, blocks = module.backward_candidates(signature, H100), 2 if signature.packed else 1
    assert found, "no candidate"
    return [replace(one, params=tuple((name, blocks if name.endswith("segment") else value) for name, value in one.params)) for one in found]


def covering(candidates: list[Candidate], *, values: bool = True) -> list[Candidate]:
    """The first, and each that has a variant, or with `values` a parameter's value that the interpreter sees, which none before it has."""
    kept, seen = [], set[tuple[str, object]]()
    for one in candidates:
        cut = any(name.endswith("segment") for name, _ in one.params)
        traits = {("variant", (one.variant, one.saves_states, cut))}
        traits |= {param for param in one.params if values and not param[0].endswith(NOT_INTERPRETED)}
        if not traits <= seen:
            kept.append(one)
            seen |= traits
    return kept


def exams(made: Contract, case: Case, call: Call, *, partly: bool) -> Exam:
    """What has to come out where a gradient arrives at every output; `partly`: also where it arrives at the first alone, and at the others alone."""
    exam = exam_of(made, case, call, training=True)
    if not partly or len(exam.grads) < 2:
        return exam if partly else replace(exam, grads=exam.grads[:1])
    rest = (None, *exam.grads[0][0][1:])
    return replace(exam, grads=(*exam.grads, (rest, wanted_gradients(made, made.to(call, torch.float64), rest))))


def problems(
    made: Contract, case: Case, choose: Callable[[list[Candidate]], list[Candidate]], *, partly: bool = False, again: bool = False
) -> list[str]:
    """What is wrong with the chosen candidates on a case, a line each; `again` as of the forward's."""
    call = build(made, case)
    exam, found = exams(made, case, call, partly=partly), []
    for candidate in choose(offered(made, call)):
        try:
            check_backward(made, candidate, module_of(made.name), exam, LIMIT, Ledger(), candidate.label, again=again)
        except Exception as error:
            found.append(failure(error, candidate.label) if type(error).__name__ != "Rejected" else str(error))
    return found


def listed(generate: Callable[[Contract], Iterator[Case]]) -> list[object]:
    """Every trained op's cases as parameters."""
    return [pytest.param(op, case, id=f"{op}-{case.name}") for op in TRAINED for case in generate(CONTRACTS[op]) if is_chosen(op, case)]


@pytest.mark.parametrize(("op", "case"), listed(kinds))
def test_the_defaults_gradients_are_right(op: str, case: Case) -> None:
    dense = case.name in ("T=0", "T=63") or case.name in [variant.name for variant in CONTRACTS[op].variants]
    expect_none(problems(CONTRACTS[op], case, lambda found: found[:1], partly=dense, again=case.name == CONTRACTS[op].variants[0].name))


@pytest.mark.parametrize(("op", "case"), listed(others))
def test_every_other_candidates_gradients_are_right(op: str, case: Case) -> None:
    values = case.name == "odd" and op != "dual_core"  # its parts' candidates are the other ops'
    expect_none(problems(CONTRACTS[op], case, lambda found: covering(found, values=values)[1:]))


@pytest.mark.parametrize(
    ("op", "case"), [pytest.param(op, case, id=f"{op}-{case.name}") for op in ("gated_delta_rule", "slow_core") for case in together(CONTRACTS[op])]
)
def test_one_kernel_for_the_gradients_of_q_k_and_w_is_right(op: str, case: Case) -> None:
    expect_none(problems(CONTRACTS[op], case, lambda found: [as_one(found[0], case)]))


@pytest.mark.parametrize("op", ["gated_delta_rule", "slow_core"], ids=lambda op: f"{op}-")
def test_what_is_frozen_beside_them_changes_no_bit_of_the_others(op: str) -> None:
    made = CONTRACTS[op]
    case = replace(richest(made), name="frozen", T=20, H=2)
    call = build(made, case)
    one, grads = as_one(offered(made, call)[0], case), exams(made, case, call, partly=False).grads[0][0]
    inputs = [name for name in made.differentiable if getattr(call, name) is not None]

    def run(needs: list[str]) -> dict[str, Tensor]:
        found = cast(TrainableOpModule, module_of(op)).run_backward(call, grads, None, frozenset(needs), one)
        return {name: grad for name, grad in zip(made.differentiable, found, strict=True) if grad is not None}

    whole = run(inputs)
    for frozen in set(inputs) - {"q", "k", "w"}:
        rest = run([name for name in inputs if name != frozen])
        assert rest.keys() == whole.keys() - {frozen}
        assert all(torch.equal(grad, whole[name]) for name, grad in rest.items()), frozen


@pytest.mark.parametrize(("op", "case"), listed(alone))
def test_a_gradient_is_the_same_where_nothing_else_is_needed(op: str, case: Case) -> None:
    made = CONTRACTS[op]
    call = build(made, case)
    grads, wanted = exams(made, case, call, partly=False).grads[0]
    ledger = Ledger()
    for name, want in zip(made.differentiable, wanted, strict=True):
        if want is not None:
            found = cast(TrainableOpModule, module_of(op)).run_backward(call, grads, None, frozenset({name}), offered(made, call)[0])
            assert [other for other, got in zip(made.differentiable, found, strict=True) if got is not None] == [name]
            got = found[made.differentiable.index(name)]
            assert got is not None
            ledger.compare(f"d{name}", got, want, LIMIT.gradients, "its own")


@pytest.mark.parametrize(
    ("op", "variant"),
    [("gated_delta_rule", "gated"), ("gated_delta_rule", "normalized keys"), ("slow_core", "gated"), ("dual_core", "recurrent")],
)
def test_rounding_does_not_show_in_dg_where_gates_forget_within_a_token(op: str, variant: str) -> None:
    made = CONTRACTS[op]
    chosen = next(one for one in made.variants if one.name == variant)
    case = replace(richest(made), name=variant, dtype=torch.float16, decay="fast", options=chosen.options, given=chosen.given)
    call = build(made, case)
    found = covering(offered(made, call), values=False)[:2]
    for candidate in [*found, as_one(found[0], case)] if op != "dual_core" else found:
        check_backward(made, candidate, module_of(op), exams(made, case, call, partly=False), FAST, Ledger(), candidate.label, again=False)


@pytest.mark.parametrize(("op", "variant"), [(op, name) for op, names in LEFT.items() for name in names])
def test_what_is_left_to_another_backend_is_refused_and_not_raised(op: str, variant: str) -> None:
    made = CONTRACTS[op]
    chosen = next(one for one in made.variants if one.name == variant)
    call = build(made, replace(richest(made), options=chosen.options, given=chosen.given), "meta")
    signature = signature_of(made, call, validate(made, call), regime="training")
    module = cast(TrainableOpModule, module_of(op))
    assert module.supports(signature, H100)
    assert not module.backward_candidates(signature, H100)

"""The CuPy backend's kernels on the CPU, each CUDA thread a fibre: right, complete, nothing else touched, and the same bits in either order of the threads.

The registry serves GPUs only, so the op modules are called directly, with the emulator as their engine. An op's default candidate runs every conformance
case in bfloat16 and float32; two others one case each: on a card the tuner's gate checks a candidate before it may win.
`pytest tests/test_cupy_emulated.py -k fused_uw` runs one op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import cast

import pytest
import torch
from titans_backends.backends.cupy import launch
from torch import Tensor

from tests import cuda_emulator
from tests.triton_machines import CARDS, H100
from titans_backends.backend import Candidate, OpModule, RememberingOpModule, TrainableOpModule
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build, cases
from titans_backends.contracts.contract import Call, Contract
from titans_backends.contracts.tolerance import tolerance
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.tuning.gate import check_backward, check_forward, failure
from titans_backends.tuning.ledger import Ledger
from titans_backends.tuning.suite import exam_of
from titans_backends.verdict import Verdict

pytestmark = [pytest.mark.slow, pytest.mark.skipif(cuda_emulator.missing() is not None, reason=str(cuda_emulator.missing()))]

OPS = tuple(import_module("titans_backends.backends.cupy").BACKEND.ops)
DTYPES = (torch.float32, torch.bfloat16)
"""float16 is the same code with two other instructions: one case of each op runs in it."""


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[cuda_emulator.EmulatorEngine]:
    """Every launch goes to the emulator."""
    emulator = cuda_emulator.EmulatorEngine()
    with launch.using(emulator):
        yield emulator


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN: what a kernel leaves out, or reads before it wrote it, shows."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: object, **kwargs: object) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def module_of(op: str) -> OpModule:
    """The op's module."""
    return cast(OpModule, import_module(f"titans_backends.backends.cupy.{op}"))


def supported(made: Contract, call: Call, machine: object = H100) -> Verdict:
    """Whether the op takes a call on a card."""
    return module_of(made.name).supports(signature_of(made, call, validate(made, call)), machine)  # type: ignore[arg-type]


def offered(made: Contract, call: Call, machine: object = H100) -> list[Candidate]:
    """What the op offers a card for a call; none where it refuses."""
    signature = signature_of(made, call, validate(made, call))
    return list(module_of(made.name).candidates(signature, machine)) if supported(made, call, machine) else []  # type: ignore[arg-type]


def problems(made: Contract, case: Case, choose: Callable[[list[Candidate]], list[Candidate]]) -> None:
    """Fails with a line for each of the chosen candidates that is wrong on a case; skips what the op refuses."""
    call = build(made, case)
    exam, offers = exam_of(made, case, call, training=False), offered(made, call)
    if not offers:
        pytest.skip(str(supported(made, call)))
    found = []
    for candidate in choose(offers):
        try:
            check_forward(made, candidate, module_of(made.name), exam, tolerance(case.dtype), Ledger(), candidate.label)
        except Exception as error:
            found.append(failure(error, candidate.label) if type(error).__name__ != "Rejected" else str(error))
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def sizes(made: Contract) -> Iterator[Case]:
    """Wide heads, K and V different, and chunks that are no power of two or long: what the conformance cases leave out."""
    step = made.name == "gated_delta_step"
    variants = [variant for variant in made.variants if not variant.options.get("chunk_offset")]
    base = Case("", B=1, G=1, H=2, T=2 if step else 70, options=variants[0].options, given=variants[0].given)
    yield replace(base, name="heads of 128", K=128, V=128, dtype=torch.bfloat16)
    yield replace(base, name="K of 64, V of 32", K=64, V=32, dtype=torch.float32)
    if not step and made.name != "fused_uw":
        yield replace(base, name="many short sequences", lengths=(1, 1, 1, 64, 1, 65, 0, 63, 1, 128), dtype=torch.bfloat16)
    if "chunk_size" in made.option_by_name:
        for chunk in (20, 128):
            yield replace(base, name=f"chunks of {chunk}", T=130, options={**base.options, "chunk_size": chunk}, dtype=torch.bfloat16)


def one(made: Contract) -> Iterator[Case]:
    """A case for every candidate: several tiles, narrow heads, where many candidates are one."""
    for variant in made.variants:
        case = Case(variant.name, T=3 if made.name == "gated_delta_step" else 130, B=1, G=1, H=2, K=32, V=32, dtype=torch.bfloat16)
        case = replace(case, options=variant.options, given=variant.given)
        if offered(made, build(made, case, "meta")):
            yield case
            return


def listed(generate: Callable[[Contract], Iterator[Case]]) -> list[object]:
    """Every op's cases as parameters."""
    return [pytest.param(op, case, id=f"{op}-{case.name}-{str(case.dtype).removeprefix('torch.')}") for op in OPS for case in generate(CONTRACTS[op])]


def distinct(op: str, offers: list[Candidate]) -> list[Candidate]:
    """The first of all that differ in more than decode's warps, which never meet."""
    kept: dict[object, Candidate] = {}
    for candidate in offers:
        params = tuple((name, value) for name, value in candidate.params if op != "gated_delta_step" or name != "warps")
        kept.setdefault((candidate.variant, params), candidate)
    return list(kept.values())


def others(op: str, offers: list[Candidate]) -> list[Candidate]:
    """Two beside the default, one of them of another variant where there is one."""
    found = distinct(op, offers)
    return [*found[1:2], *[each for each in found[2:] if each.variant != found[0].variant], *found[2:3]][:2]


def alternating(made: Contract) -> Iterator[Case]:
    """Every conformance case once, in one dtype after the other: all of both take the suite two minutes, and a card's run has them."""
    names = [variant.name for variant in made.variants]
    for index, case in enumerate(cases(made, DTYPES[0])):
        variant = case.name.split(",")[0]
        turn = index if variant not in names[1:] else names.index(variant)  # a variant beside the first in one dtype: its forms are compiled once
        yield replace(case, dtype=DTYPES[turn % len(DTYPES)])


COMPOSED = ("K != V, odd", "T=0", "packed with empty sequences")
"""What the kernels of an op that is made of other ops have to show beside its variants: the parts are tested on their own."""


def trained(made: Contract) -> Iterator[Case]:
    """The same for a backward; of an op whose backward is made of others' the variants and a few kinds of calls alone."""
    variants = {variant.name for variant in made.variants}
    for case in alternating(made):
        if made.name != "dual_core" or case.name in variants or case.name.endswith(COMPOSED):
            yield case


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("op", "case"), listed(alternating))
def test_the_default_keeps_the_contract(op: str, case: Case) -> None:
    problems(CONTRACTS[op], case, lambda offers: offers[:1])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("op", "case"), listed(sizes))
def test_the_default_takes_any_size(op: str, case: Case) -> None:
    problems(CONTRACTS[op], case, lambda offers: offers[:1])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("op", "case"), listed(one))
def test_other_candidates_keep_the_contract(op: str, case: Case) -> None:
    problems(CONTRACTS[op], case, lambda offers: others(op, offers))


TRAINABLE = tuple(op for op in OPS if hasattr(module_of(op), "run_backward"))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(op, case, id=f"{op}-{case.name}-{case.dtype}") for op in TRAINABLE for case in trained(CONTRACTS[op])],
)
def test_the_default_backward_keeps_the_contract(op: str, case: Case) -> None:
    made, module = CONTRACTS[op], cast(TrainableOpModule, module_of(op))
    call = build(made, case)
    if not supported(made, call):
        pytest.skip(str(supported(made, call)))
    found = module.backward_candidates(signature_of(made, call, validate(made, call)), H100)[:1]
    for candidate in found:
        check_backward(made, candidate, module, exam_of(made, case, call, training=True), tolerance(case.dtype), Ledger(), candidate.label)
    if not found:
        pytest.skip("it has no backward for this")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("op", TRAINABLE)
def test_a_frozen_input_launches_nothing_of_its_own(op: str, engine: cuda_emulator.EmulatorEngine) -> None:
    made, module = CONTRACTS[op], cast(TrainableOpModule, module_of(op))
    call = build(made, next(one(made)))
    candidate = module.backward_candidates(signature_of(made, call, validate(made, call)), H100)[0]
    grads = tuple(None if x is None else torch.ones_like(x) for x in made.reference(call))
    whole = module.run_backward(call, grads, None, frozenset(made.differentiable), candidate)
    before = engine.launches
    assert module.run_backward(call, grads, None, frozenset(), candidate) == tuple(None for _ in whole)
    assert engine.launches == before
    for place, name in enumerate(made.differentiable):
        if name not in made.tensors(call):
            continue
        alone = module.run_backward(call, grads, None, frozenset({name}), candidate)
        assert [x is not None for x in alone] == [at == place for at in range(len(alone))]
        assert torch.equal(cast(Tensor, alone[place]), cast(Tensor, whole[place])), name


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("op", "case"), listed(lambda made: (replace(case, dtype=torch.float16) for case in one(made))))
def test_the_default_runs_in_float16(op: str, case: Case) -> None:
    problems(CONTRACTS[op], case, lambda offers: offers[:1])


@pytest.mark.parametrize("op", OPS)
def test_the_default_launches_kernels_of_its_own(op: str, engine: cuda_emulator.EmulatorEngine) -> None:
    made = CONTRACTS[op]
    call = build(made, next(one(made)))
    before = engine.launches
    module_of(op).run(call, offered(made, call)[0])
    assert engine.launches > before, "no kernel ran: something else computed this"


@pytest.mark.parametrize("op", OPS)
def test_a_consumer_card_has_a_candidate_of_every_size(op: str) -> None:
    made = CONTRACTS[op]
    for keys in (32, 64, 128):
        for dtype in (*DTYPES, torch.float16):
            for variant in made.variants:
                case = Case("", T=2 if op == "gated_delta_step" else 256, K=keys, V=keys, dtype=dtype, options=variant.options, given=variant.given)
                call = build(made, case, "meta")
                if supported(made, call, CARDS[89]):
                    assert offered(made, call, CARDS[89]), f"{variant.name}: head_dim {keys} in {dtype}"


@pytest.mark.parametrize("op", OPS)
def test_a_remembered_call_repeats_on_other_tensors(op: str) -> None:
    made = CONTRACTS[op]
    case = replace(next(one(made)), dtype=torch.float32)
    first, second = build(made, case), build(made, replace(case, seed=3))  # the seed picks the shape of an argument that has up to three
    candidate, module = offered(made, first)[0], cast(RememberingOpModule, module_of(op))
    outputs, again = module.remember(first, candidate)
    assert again is not None, "the call was not remembered"
    for spec, got, want in zip(made.outputs, again(made.values(second)), module.run(second, candidate), strict=True):  # type: ignore[attr-defined]
        assert (got is None) == (want is None), spec.name
        assert got is None or torch.equal(got, cast(Tensor, want)), spec.name
    for spec, got, want in zip(made.outputs, again(made.values(first)), outputs, strict=True):
        assert got is None or torch.equal(got, cast(Tensor, want)), spec.name

"""gated_delta_rule by Hopper's own products, executed on the CPU as the machine code that NVRTC makes of it: right in both directions, ordered, and offered where it
serves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import cast

import numpy as np
import pytest
import torch
from titans_backends.backends.cupy import delta_hopper, delta_prepare, gated_delta_rule, launch
from torch import Tensor

from tests import cuda_emulator
from tests.test_cupy_compiled import _missing, compiled_with_log
from tests.triton_machines import CARDS, H100
from titans_backends.backend import Candidate
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.contracts.tolerance import tolerance
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.machine import Machine
from titans_backends.signature import Regime, Signature

if find_spec("triton") is None:
    pytest.skip(
        "the package triton, whose nvdisasm reads machine code, is not installed: pip install -c constraints.txt -e '.[test]'",
        allow_module_level=True,
    )

from tests.hopper_emulator.nvrtc import emulating

MADE = CONTRACTS["gated_delta_rule"]
KERNELS = ("delta_prepare_hopper", "delta_walk_hopper", "delta_reverse_hopper", "delta_gradients_hopper")
"""Executed as machine code; the others as C++."""
MOST_SPILLED = 160
"""Bytes a thread, of addresses that loaders hold."""
FINAL = {"output_final_state": True}
BASE = Case("all", B=1, T=100, G=1, H=2, K=128, V=128, dtype=torch.bfloat16, options=FINAL, given=("g", "gate", "initial_state"))

compiles = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))
emulates = pytest.mark.skipif(cuda_emulator.missing() is not None, reason=str(cuda_emulator.missing()))


@pytest.fixture(scope="module")
def engine() -> Iterator[None]:
    """What is not machine code goes to the emulator of CUDA C++."""
    with launch.using(cuda_emulator.EmulatorEngine()), np.errstate(all="ignore"):
        yield


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN."""
    real = torch.empty

    def empty(*args: object, **kwargs: object) -> Tensor:
        made = real(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", empty)


def call_of(case: Case) -> GatedDeltaRule:
    """A case's call, on the CPU."""
    return cast(GatedDeltaRule, build(MADE, case))


def facts(case: Case, regime: Regime = "training") -> Signature:
    """What a case's candidates are asked with."""
    call = build(MADE, case, "meta")
    return signature_of(MADE, call, validate(MADE, call), regime=regime)


def offered(case: Case, machine: Machine = H100, regime: Regime = "training") -> list[Candidate]:
    """Both directions' candidates of a card that Hopper's kernels run."""
    signature = facts(case, regime)
    found = [
        *gated_delta_rule.candidates(signature, machine),
        *(gated_delta_rule.backward_candidates(signature, machine) if regime == "training" else ()),
    ]
    return [one for one in found if "carriers" in dict(one.params)]


def one_of(case: Case, variant: str, direction: str, **params: int) -> Candidate:
    """The first of a variant, with some of its parameters."""
    found = next(one for one in offered(case) if (one.variant, one.direction) == (variant, direction))
    return replace(found, params=tuple((name, params.get(name, value)) for name, value in found.params))


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, of all numbers together; 0 of none."""
    assert found.shape == wanted.shape
    return 0.0 if not wanted.numel() else float((found.double() - wanted).norm() / wanted.norm())


def gradients(case: Case, call: GatedDeltaRule) -> tuple[tuple[Tensor | None, ...], dict[str, Tensor]]:
    """What arrives, and in float64 what the inputs get."""
    exact = MADE.to(call, torch.float64)
    inputs = {name: tensor.requires_grad_() for name, tensor in MADE.tensors(exact).items() if name in MADE.differentiable}
    outputs = [one for one in MADE.reference(exact) if one is not None]
    random = torch.Generator().manual_seed(1)
    arriving = [
        torch.randn(one.shape, generator=random, dtype=torch.float64).to(case.dtype if i == 0 else torch.float32) for i, one in enumerate(outputs)
    ]
    found = torch.autograd.grad(outputs, list(inputs.values()), [one.double() for one in arriving])
    return (arriving[0], arriving[1] if len(arriving) > 1 else None), dict(zip(inputs, found, strict=True))


def check_backward(case: Case, candidate: Candidate, call: GatedDeltaRule, kept: tuple[Tensor, ...] | None) -> None:
    """Fails where a gradient is not within the tolerance."""
    arriving, wanted = gradients(case, call)
    found = gated_delta_rule.run_backward(call, arriving, kept, frozenset(wanted), candidate)
    for name, got in zip(("q", "k", "v", "beta", "g", "gate", "initial_state"), found, strict=True):
        assert (got is None) == (name not in wanted)
        if got is not None:
            assert error(got, wanted[name]) < tolerance(case.dtype).gradients, name


def check_forward(case: Case, candidate: Candidate, call: GatedDeltaRule) -> tuple[Tensor, ...]:
    """Fails where an output is not; what is kept."""
    found = gated_delta_rule.run(call, candidate)
    for got, wanted in zip(found[:2], MADE.reference(MADE.to(call, torch.float64)), strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            assert error(got, wanted) < tolerance(case.dtype).outputs
    return tuple(one for one in found[2:] if one is not None)


@compiles
@emulates
@pytest.mark.slow
@pytest.mark.usefixtures("engine", "poisoned")
def test_a_backward_takes_what_its_forward_kept() -> None:
    """Grouped heads, ragged, gates and states; a block of the last pass takes four items one after the other."""
    case = replace(BASE, B=2)
    call = call_of(case)
    with emulating(only=KERNELS) as launched:
        kept = check_forward(case, one_of(case, "kept", "forward", carriers=1), call)
        check_backward(case, one_of(case, "kept", "backward", carriers=2, blocks=1), call, kept)
    assert launched == [*KERNELS]


@compiles
@emulates
@pytest.mark.slow
@pytest.mark.usefixtures("engine", "poisoned")
@pytest.mark.parametrize(
    ("case", "carriers"),
    [
        pytest.param(replace(BASE, T=66, lengths=(1, 0, 65), options={**FINAL, "qk_l2norm": True}), 1, id="packed, one empty, normalized"),
        pytest.param(replace(BASE, T=70, dtype=torch.float16, given=("g",), decay="hard", options={}), 2, id="float16, hard decays"),
    ],
)
def test_everything_is_computed_again_where_nothing_is_kept(case: Case, carriers: int) -> None:
    call = call_of(case)
    with emulating(only=KERNELS) as launched:
        check_backward(case, one_of(case, "wgmma", "backward", carriers=carriers), call, None)
    assert launched == [*KERNELS]


@compiles
@emulates
@pytest.mark.slow
@pytest.mark.usefixtures("engine", "poisoned")
@pytest.mark.parametrize(
    ("case", "carriers"),
    [
        pytest.param(replace(BASE, T=200, keys="correlated", given=("g",)), 2, id="correlated keys"),
        pytest.param(replace(BASE, T=70, view="misaligned", options={}), 1, id="rows that no copy takes"),
        pytest.param(replace(BASE, T=0), 1, id="no tokens"),
    ],
)
def test_the_forward_for_inference(case: Case, carriers: int) -> None:
    call = call_of(case)
    with emulating(only=KERNELS):
        assert not check_forward(case, one_of(replace(case, T=64, view="contiguous"), "wgmma", "forward", carriers=carriers), call)


@emulates
@pytest.mark.slow
@pytest.mark.usefixtures("engine", "poisoned")
def test_what_it_does_not_serve_other_kernels_do() -> None:
    """Without a gradient of o, and with inputs frozen so that one of the last pass's operands is not there."""
    case = replace(BASE, T=70)
    call = call_of(case)
    (d_o, d_final), wanted = gradients(case, call)
    candidate = one_of(case, "wgmma", "backward")
    with emulating(only=KERNELS) as launched:
        found = gated_delta_rule.run_backward(call, (None, d_final), None, frozenset(wanted), candidate)
        assert all(one is not None and bool(one.isfinite().all()) for one in found)
    assert not set(launched) & set(KERNELS)
    with emulating(only=KERNELS) as launched:
        queries = gated_delta_rule.run_backward(call, (d_o, None), None, frozenset(["q"]), candidate)[0]
        assert queries is not None
    assert launched == [*KERNELS[:2], "delta_gradients"]


@compiles
@pytest.mark.parametrize("dtype", ["Bfloat", "Half"])
@pytest.mark.parametrize(
    ("source", "macros"),
    [
        *((delta_hopper.PREPARE.source, (("NORMALIZED", each), ("EVENLY", each))) for each in (0, 1)),
        *(
            (delta_hopper.WALK.source, (("CARRIERS", each), ("OUTPUTS", outputs), ("KEEPS", keeps), ("CUT", cut)))
            for each, outputs, keeps, cut in ((1, 1, 0, 0), (2, 1, 1, 0), (2, 0, 1, 0), (1, 1, 1, 1), (2, 0, 0, 2))
        ),
        *((delta_hopper.REVERSE.source, (("CARRIERS", each), ("CUT", cut))) for each, cut in ((1, 0), (2, 0), (1, 1), (1, 2))),
        *((delta_hopper.GRADIENTS.source, (("NORMALIZED", each),)) for each in (0, 1)),
    ],
)
def test_the_compiler_lets_products_run_on(source: str, macros: tuple[tuple[str, int], ...], dtype: str) -> None:
    used, said = compiled_with_log(launch.Form(source, source.removesuffix(".cu"), (("DTYPE", dtype), *macros)), 90)
    for word in ("serialized", "injected", "setmaxnreg"):
        assert word not in said, said
    assert used.spilled <= MOST_SPILLED, said


@compiles
@emulates
@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("together", [False, True])
def test_the_first_pass_makes_what_that_of_every_card_does(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a block takes a v head or two, the second time one of three alone; above the diagonal's squares nothing is written, of an empty slot nothing at all."""
    monkeypatch.setattr(delta_hopper, "_FULL", 0 if together else 1 << 30)
    case = replace(BASE, T=101, lengths=(64, 0, 37), H=3, given=("g", "gate"), keys="correlated")
    rule = delta_prepare.rule_of(call_of(case), delta_hopper.SIDE)
    wanted, found = (delta_prepare.factors_of(rule) for _ in range(2))
    for one in (wanted, found):
        for tensor in (one.inverses, one.scores, one.lines):
            tensor.fill_(float("nan"))
    delta_prepare.prepare(rule, into=wanted)
    with emulating(only=KERNELS):
        delta_hopper.prepare(rule, into=found)
    for name in ("inverses", "scores", "lines"):
        ours, theirs = getattr(found, name).double(), getattr(wanted, name).double()
        assert not bool(ours.isnan().all()), name
        assert torch.equal(ours.isnan(), theirs.isnan()), name
        assert error(ours.nan_to_num(), theirs.nan_to_num()) < 1e-4, name


def races_of(case: Case, without: str = "") -> Counter[tuple[str, str, str]]:
    """The races in shared memory of a pair whose instructions of this name do nothing."""
    call = call_of(case)
    arriving, wanted = gradients(case, call)
    found: Counter[tuple[str, str, str]] = Counter()
    with emulating(found, without, KERNELS):
        kept = gated_delta_rule.run(call, one_of(case, "kept", "forward", carriers=2))[2:]
        gated_delta_rule.run_backward(call, arriving, kept, frozenset(wanted), one_of(case, "kept", "backward", carriers=1, blocks=1))
    return found


@compiles
@emulates
@pytest.mark.slow
@pytest.mark.usefixtures("engine")
def test_barriers_order_what_its_warps_share() -> None:
    """Four blocks take every stage, square and line again."""
    assert not races_of(replace(BASE, T=200, options={**FINAL, "qk_l2norm": True}))


@compiles
@emulates
@pytest.mark.slow
@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(("without", "what"), [("FENCE", "no fence"), ("DEPBAR", "read after write")])
def test_a_missing_fence_and_a_missing_wait_are_seen(without: str, what: str) -> None:
    assert what in {each for each, _, _ in races_of(replace(BASE, T=7, H=1, given=(), options={}), without)}


def test_it_is_offered_where_it_serves_and_nowhere_else() -> None:
    kinds = [(one.variant, one.direction) for one in offered(BASE)]
    assert {kind: kinds.count(kind) for kind in kinds} == {(variant, way): 1 for variant in ("wgmma", "kept") for way in ("forward", "backward")}
    assert offered(replace(BASE, dtype=torch.float16))
    for other in (replace(BASE, dtype=torch.float32), replace(BASE, K=64), replace(BASE, V=64), replace(BASE, K=120, V=120)):
        assert not offered(other), other
    for sm, machine in CARDS.items():
        assert bool(offered(BASE, machine)) == (sm == 90)
    assert {one.variant for one in offered(BASE, regime="inference")} == {"wgmma"}


def test_it_is_never_the_first_one() -> None:
    signature = facts(BASE)
    assert gated_delta_rule.candidates(signature, H100)[0].variant == "walk"
    assert gated_delta_rule.backward_candidates(signature, H100)[0].variant == "walks"


def test_who_keeps_agrees_with_who_takes() -> None:
    kept = [one for one in offered(BASE) if one.residual]
    assert all(one.agrees(other) for one in kept for other in kept)
    elsewhere = facts(replace(BASE, dtype=torch.float32))
    forward, backward = (
        [one for one in found(elsewhere, H100) if one.residual] for found in (gated_delta_rule.candidates, gated_delta_rule.backward_candidates)
    )
    assert any(one.agrees(other) for one in forward for other in backward), "the walks of every card keep, too"


@pytest.mark.parametrize(
    ("heads", "invariant", "carriers"),
    [
        pytest.param(64, False, [1], id="a processor for each half"),
        pytest.param(72, False, [2, 1], id="more halves than processors"),
        pytest.param(72, True, [1], id="whatever the batch"),
    ],
)
def test_two_carriers_are_offered_where_halves_of_heads_wait(heads: int, invariant: bool, carriers: list[int]) -> None:
    signature = replace(facts(replace(BASE, T=8192, G=8, H=heads)), batch_invariant=invariant)
    assert [one.param("carriers") for one in delta_hopper.forward_candidates(signature, H100)] == carriers

"""What the Triton backend's ops offer and refuse: on every card something that fits, and under batch invariance the same for every batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from tests import fresh
from tests.triton_forms import PRODUCTION, TRAINED, TRAINING, compilations, module_of, production, signature
from tests.triton_forms import offered as offered_in_regime
from tests.triton_machines import CARDS, H100
from titans_backends import registry
from titans_backends.backend import Candidate
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case
from titans_backends.machine import Machine
from titans_backends.offers import offer, source_modules
from titans_backends.signature import Regime, Signature

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="the package triton is not installed: pip install -c constraints.txt -e '.[test]'"
)

OPS = tuple(import_module("titans_backends.backends.triton").BACKEND.ops)
LONG = PRODUCTION[0]
UNKNOWN = Machine("cuda", "A card", "a_card", sm=90)
"""A card whose driver does not say how much shared memory a block may have, nor how many multiprocessors there are."""


def facts(op: str, case: Case, **changes: object) -> Signature:
    """The signature of a production call."""
    return replace(signature(op, production(op, case))[1], **changes)  # type: ignore[arg-type]


def offered(op: str, given: Signature, machine: Machine = H100) -> list[Candidate]:
    """What the op offers; a refusal is a failure here."""
    verdict = module_of(op).supports(given, machine)
    assert verdict, verdict
    return list(module_of(op).candidates(given, machine))


def test_the_manifest_names_every_op() -> None:
    assert set(CONTRACTS) == set(OPS)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("machine", [*CARDS.values(), UNKNOWN], ids=lambda machine: machine.slug)
@pytest.mark.parametrize("case", PRODUCTION, ids=str)
def test_every_card_is_offered_something(op: str, machine: Machine, case: Case) -> None:
    found = offered(op, facts(op, case), machine)
    assert len(set(found)) == len(found) > 0
    assert {one.backend for one in found} == {"triton"}
    assert {one.direction for one in found} == {"forward"}
    assert not any(one.saves_states for one in found)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("head_dim", [(16, 16), (20, 36), (96, 96), (256, 256), (64, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_head_size_up_to_256_is_served_on_a_small_card(op: str, head_dim: tuple[int, int], dtype: torch.dtype) -> None:
    case = replace(LONG, K=head_dim[0], V=head_dim[1], dtype=dtype)
    if op == "coupled_core" and (head_dim[0] > 32 or head_dim[1] > 64):
        return  # refused: below
    assert offered(op, facts(op, case), CARDS[89])


@pytest.mark.parametrize("op", OPS)
def test_under_batch_invariance_nothing_depends_on_batch_length_or_card(op: str) -> None:
    other, least = (128, 64) if op == "fused_uw" else (2 if CONTRACTS[op].max_tokens else 100, 1)  # fused_uw: whole chunks, so that its C stays
    sizes = [LONG, replace(LONG, B=7, T=other), replace(LONG, B=64, T=least)]
    machines = [H100, replace(H100, sms=16)]
    found = [offered(op, facts(op, case, batch_invariant=True), machine) for case in sizes for machine in machines]
    assert all(one == found[0] for one in found)
    assert any(candidate.batch_invariant for candidate in found[0])


@pytest.mark.parametrize(
    "op", ["slow_core", "gated_delta_rule", "dual_core", "uw_transform", "fused_uw", "gated_delta_step", "dual_core_step", "deep_core"]
)
@pytest.mark.parametrize("head_dim", [32, 128])
def test_the_number_of_streams_decides_the_order_and_never_the_set(op: str, head_dim: int) -> None:
    case = replace(LONG, K=head_dim, V=head_dim, T=1 if CONTRACTS[op].max_tokens else LONG.T)
    found = [set(offered(op, facts(op, replace(case, B=batch)))) for batch in (1, 2, 16)]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("op", OPS)
def test_what_it_cannot_do_is_refused_by_name(op: str) -> None:
    module, given = module_of(op), facts(op, LONG)
    assert "compute capability 8.0" in str(module.supports(given, replace(H100, sm=70)))
    assert "float64 is not in" in str(module.supports(replace(given, dtype=torch.float64), H100))
    wide = facts(op, replace(LONG, K=300, V=300))
    assert f"head_dim K=300 is above {32 if op == 'coupled_core' else 256}" in str(module.supports(wide, H100))


@pytest.mark.parametrize("regime", ["inference", "training"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": torch.float16}, "float16 misses its tolerances: of 46 cases on an H100 5 were wrong"),
        ({"dtype": torch.float16}, "use bfloat16 or float32, or backend='eager'"),
        ({"K": 33}, "head_dim K=33 is above 32, the widest that a card has examined; use backend='eager'"),
        ({"V": 65}, "head_dim V=65 is above 64, the widest that a card has examined; use backend='eager'"),
        ({"chunk_size": 65}, "chunk_size=65 is above 64, the longest that a card has examined in bfloat16; use float32, or backend='eager'"),
    ],
)
def test_of_coupled_core_what_no_card_has_examined_is_refused(changes: dict[str, object], said: str, regime: Regime) -> None:
    made = CONTRACTS["coupled_core"]
    options = {"output_final_state": True, **{name: value for name, value in changes.items() if name == "chunk_size"}}
    sizes = {name: value for name, value in changes.items() if name != "chunk_size"}
    widest = Case("", T=200, K=32, V=64, dtype=torch.bfloat16, options={"output_final_state": True, "chunk_size": 64}, given=made.variants[0].given)
    served = module_of("coupled_core").supports(signature("coupled_core", widest, regime=regime)[1], H100)
    assert served, served
    asked = signature("coupled_core", replace(widest, options=options, **sizes), regime=regime)[1]  # type: ignore[arg-type]
    assert said in str(module_of("coupled_core").supports(asked, H100))
    answer = offer(registry.get("triton"), asked, H100)
    assert not answer.verdict
    assert answer.forward == answer.backward == ()


def test_of_coupled_core_trained_in_float32_narrower_heads_are_served() -> None:
    made = CONTRACTS["coupled_core"]
    case = Case("", T=200, K=32, V=33, given=made.variants[0].given)
    module = module_of("coupled_core")
    trained = signature("coupled_core", case, regime="training")[1]
    assert "head_dim V=33 is above 32, the widest that a card has examined, trained in float32; use backend='eager'" in str(
        module.supports(trained, H100)
    )
    assert module.supports(signature("coupled_core", replace(case, V=32), regime="training")[1], H100)
    assert module.supports(signature("coupled_core", case)[1], H100)
    assert module.supports(signature("coupled_core", replace(case, dtype=torch.bfloat16), regime="training")[1], H100)


def test_coupled_core_takes_chunks_of_any_length_in_float32() -> None:
    case = replace(LONG, dtype=torch.float32)
    for chunk in (16, 64, 128, 1000):
        call = replace(production("coupled_core", case), options={"chunk_size": chunk})
        assert {one.variant for one in offered("coupled_core", signature("coupled_core", call)[1])} == {"prepared" if chunk <= 64 else "walked"}


@pytest.mark.parametrize("op", [op for op in OPS if op != "coupled_core"])
def test_float16_is_served(op: str) -> None:
    assert offered(op, facts(op, replace(LONG, dtype=torch.float16)))


@pytest.mark.parametrize(("op", "regime"), [*((op, "inference") for op in OPS), *((op, "training") for op in TRAINED)])
def test_the_source_of_a_candidate_holds_every_kernel_that_it_launches(op: str, regime: Regime) -> None:
    for case in PRODUCTION if regime == "inference" else TRAINING:
        call, given = signature(op, production(op, case), regime=regime)
        for one in offered_in_regime(op, given, H100):
            modules = source_modules(one, op)
            assert {launched.module for launched in compilations(op, call, one, 90)} <= set(modules)
            assert regime == "training" or not set(modules) & set(registry.get("triton").backward)


def test_the_modules_of_the_backward_are_there_and_are_its_own() -> None:
    backward = registry.get("triton").backward
    assert all(find_spec(name) is not None for name in backward)
    assert not forward_of(OPS) & set(backward)
    shared = {"titans_backends.backends.dual_parts"}  # with CuPy
    reached = {name for op in TRAINED for name in source_modules(Candidate("triton", "any", direction="backward"), op)}
    assert reached == forward_of(TRAINED) | set(backward) | shared


def forward_of(ops: Iterable[str]) -> set[str]:
    """The modules of some ops' forwards."""
    return {name for op in ops for name in source_modules(Candidate("triton", "any"), op)}


def test_the_manifest_imports_no_triton() -> None:
    code = "import sys, titans_backends as tb; tb.registry.known(); assert 'triton' not in sys.modules, 'triton was imported'"
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("heads", "offers_it"), [(32, True), (64, False), (128, False)])
def test_one_kernel_for_all_gradients_is_offered_to_narrow_heads_alone_and_never_first(heads: int, offers_it: bool) -> None:
    """Where a card has found it faster; wider heads have three, in tiles that a card has timed."""
    case = Case("long", B=1, T=8192, G=12, H=12, K=heads, V=heads, dtype=torch.bfloat16)
    given = signature("gated_delta_rule", production("gated_delta_rule", case), regime="training")[1]
    ones = [dict(one.params).get("gradients") == "one" for one in offered_in_regime("gated_delta_rule", given, H100)]
    assert any(ones) == offers_it
    assert not ones[0]

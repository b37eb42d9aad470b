"""gated_delta_rule's sequences in segments on Hopper, as machine code on the CPU: what a segment does to a state, the states between them, both directions, and where
they are offered."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from titans_backends.backends.cupy import delta_cut, delta_hopper, delta_kept, delta_prepare, gated_delta_rule, launch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.launching.remember import _Watch

if find_spec("triton") is None:
    pytest.skip(
        "the package triton, whose nvdisasm reads machine code, is not installed: pip install -c constraints.txt -e '.[test]'",
        allow_module_level=True,
    )

from tests.hopper_emulator.nvrtc import emulating
from tests.test_cupy_hopper import BASE, FINAL, H100, KERNELS, MADE, call_of, check_backward, check_forward, compiles, emulates, error, facts, one_of
from tests.test_cupy_hopper import engine as engine
from tests.test_cupy_hopper import gradients as gradients_of
from tests.test_cupy_hopper import poisoned as poisoned

EXECUTED = (*KERNELS, "delta_chain")
FEW = replace(BASE, T=8192, G=2, H=8)
"""Heads as a shard has them, on a sequence that is worth cutting."""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate's number is that of its segments, however short the sequence."""
    monkeypatch.setattr(delta_cut, "_fitting", lambda processors, heads, tokens: processors)
    monkeypatch.setattr(delta_cut, "_FEWEST", 1)


def cut(case: Case, variant: str, direction: str, number: int) -> Candidate:
    """A variant's candidate that cuts; with `counted` into so many segments."""
    one = one_of(replace(case, T=64, lengths=None, view="contiguous"), variant, direction)
    return replace(one, params=(*one.params, ("cut_for", number)))


def rule(case: Case) -> delta_prepare.Rule:
    """A case on blocks of 64 tokens."""
    return delta_prepare.rule_of(call_of(case), delta_hopper.SIDE)


def between(call: GatedDeltaRule, tokens: slice, initial: Tensor | None, *, values: bool) -> Tensor:
    """The state after some tokens, in float64; without `values` those are zeros, as many as there are keys."""
    part = {name: getattr(call, name)[:, tokens] for name in ("q", "k", "v", "beta", "g", "gate") if getattr(call, name) is not None}
    final = MADE.reference(MADE.to(replace(call, **{**part, "v": part["v"] * values}, initial_state=initial), torch.float64))[1]
    assert final is not None
    return final


@emulates
@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("segments", [2, 3, 6])
def test_the_chain_goes_from_segment_to_segment(segments: int, back: bool) -> None:
    """The first map forward and the last one back are nobody's, and so are both ends' places that a walk does not fill."""
    x, random = rule(replace(BASE, B=2, T=1, H=3)), torch.Generator().manual_seed(0)
    states, maps = (torch.randn(2, segments, 3, 128, 128, generator=random) for _ in range(2))
    maps /= 128**0.5
    maps[:, 0] = maps[:, -1] = states[:, -1 if back else 0] = float("nan")
    wanted = states.double()
    for i in range(segments - 2, 0, -1) if back else range(1, segments - 1):
        if back:
            wanted[:, i - 1] += maps[:, i].double().mT @ wanted[:, i]
        else:
            wanted[:, i + 1] += maps[:, i].double() @ wanted[:, i]
    delta_cut.chain(x, delta_cut.Cut(segments, states, maps), back=back)
    assert torch.equal(states.isnan(), wanted.isnan())
    for i in range(segments):
        if i != (segments - 1 if back else 0):
            assert error(states[:, i], wanted[:, i]) < 1e-6


@compiles
@emulates
@pytest.mark.usefixtures("engine", "poisoned", "counted")
def test_a_segment_says_what_it_does_to_a_state() -> None:
    """Five blocks in three segments; the last one's blocks are not walked."""
    case = replace(BASE, T=5 * 64 - 7, H=1, keys="correlated", given=("g", "initial_state"))
    call = call_of(case)
    x = rule(case)
    ends = delta_cut.cut_of(x, 3)
    assert ends is not None
    with emulating(only=EXECUTED) as launched:
        delta_hopper.walk(x, delta_hopper.prepare(x), 2, cut=ends, ends=True)
    assert launched == ["delta_prepare_hopper", "delta_walk_hopper"]
    first, second = slice(0, 64), slice(64, 3 * 64)
    identity = torch.eye(128)[None, None]
    for found, wanted in (
        (ends.states[1], between(call, first, call.initial_state, values=True)),
        (ends.states[2], between(call, second, None, values=True)),
        (ends.maps[0], between(call, first, identity, values=False)),
        (ends.maps[1], between(call, second, identity, values=False)),
    ):
        assert error(found, wanted[0]) < 8e-3
    for nobodys in (ends.states[0], ends.maps[2]):
        assert bool(nobodys.isnan().all())


@compiles
@emulates
@pytest.mark.slow
@pytest.mark.usefixtures("engine", "poisoned", "counted")
@pytest.mark.parametrize(
    ("case", "segments"),
    [
        pytest.param(replace(BASE, T=200), 4, id="grouped, ragged, gates and a state"),
        pytest.param(replace(BASE, T=200, G=2, keys="correlated", beta="extreme", given=(), options={}), 3, id="parallel keys, beta 0 1 2"),
        pytest.param(replace(BASE, T=131, H=1, decay="hard"), 5, id="more segments than blocks"),
    ],
)
def test_a_backward_takes_what_its_forward_kept_of_segments(case: Case, segments: int) -> None:
    call = call_of(case)
    with emulating(only=EXECUTED) as launched:
        kept = check_forward(case, cut(case, "kept", "forward", segments), call)
        check_backward(case, cut(case, "kept", "backward", segments), call, kept)
    prepare, walk, reverse, last = KERNELS
    assert launched == [prepare, walk, "delta_chain", walk, reverse, "delta_chain", reverse, last]


@compiles
@emulates
@pytest.mark.slow
@pytest.mark.usefixtures("engine", "poisoned", "counted")
def test_packed_sequences_are_cut_each_for_itself() -> None:
    """Computed again, normalized; one sequence is empty, one shorter than its segments."""
    case = replace(BASE, T=194, H=1, lengths=(1, 0, 193), options={**FINAL, "qk_l2norm": True})
    call = call_of(case)
    with emulating(only=EXECUTED):
        assert not check_forward(case, cut(case, "wgmma", "forward", 3), call)
        check_backward(case, cut(case, "wgmma", "backward", 3), call, None)


@compiles
@emulates
@pytest.mark.slow
@pytest.mark.usefixtures("engine", "poisoned", "counted")
@pytest.mark.parametrize(
    "case",
    [replace(BASE, T=0), replace(BASE, T=140, H=1, dtype=torch.float16, view="misaligned", given=())],
    ids=["no tokens", "rows that no copy takes"],
)
def test_the_forward_in_segments_for_inference(case: Case) -> None:
    with emulating(only=EXECUTED):
        assert not check_forward(case, cut(case, "wgmma", "forward", 3), call_of(case))


@compiles
@emulates
@pytest.mark.slow
@pytest.mark.usefixtures("engine", "poisoned", "counted")
def test_only_the_values_and_the_state_want_gradients() -> None:
    """Nothing of a forward is computed again but the maps."""
    case = replace(BASE, T=200, H=1)
    call = call_of(case)
    (d_o, d_final), wanted = gradients_of(case, call)
    with emulating(only=EXECUTED) as launched:
        found = gated_delta_rule.run_backward(call, (d_o, d_final), None, frozenset(["v", "initial_state"]), cut(case, "wgmma", "backward", 3))
    assert launched == [*KERNELS[:2], "delta_reverse_hopper", "delta_chain", "delta_reverse_hopper"]
    for name, got in (("v", found[2]), ("initial_state", found[6])):
        assert got is not None, name
        assert error(got, wanted[name]) < 8e-3, name


@compiles
@emulates
@pytest.mark.slow
@pytest.mark.usefixtures("engine", "counted")
def test_barriers_order_what_segments_share() -> None:
    """Five blocks to a segment, more than there are stages."""
    case = replace(BASE, T=16 * 64, G=1, H=1, given=("g",), options={})
    call = call_of(case)
    arriving, wanted = gradients_of(case, call)
    found: Counter[tuple[str, str, str]] = Counter()
    with emulating(found, only=EXECUTED):
        kept = gated_delta_rule.run(call, cut(case, "kept", "forward", 3))[2:]
        gated_delta_rule.run_backward(call, arriving, kept, frozenset(wanted), cut(case, "kept", "backward", 3))  # type: ignore[arg-type]
    assert not found


@compiles
@pytest.mark.parametrize("back", [0, 1])
def test_the_chain_spills_nothing(back: int) -> None:
    from tests.test_cupy_compiled import compiled_with_log

    used, said = compiled_with_log(launch.Form(delta_cut.CHAIN.source, delta_cut.CHAIN.name, (("BACK", back),)), 90)
    assert not used.spilled, said


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("regime", ["inference", "training"])
def test_a_call_in_segments_can_be_repeated(regime: str) -> None:
    """It takes memory and views of it, and does nothing else with a tensor."""
    case, both = replace(BASE, T=300), ("forward", "backward")
    forward, backward = (cut(case, "wgmma" if regime == "inference" else "kept", way, 4) for way in both)
    call = call_of(case)
    d_o = torch.zeros_like(call.v)
    with launch.TAPING.collecting() as forms, _Watch() as watch:
        kept = gated_delta_rule.run(call, forward)[2:]
        if regime == "training":
            gated_delta_rule.run_backward(call, (d_o, None), kept, frozenset(["q", "k", "v", "g"]), backward)  # type: ignore[arg-type]
    assert watch.plain
    assert sum(form.kernel == delta_cut.CHAIN.name for form in forms) == (1 if regime == "inference" else 2)
    if kept:
        assert [one.shape for one in kept if one is not None] == [one.shape for one in delta_kept.residual(call, forward)]
        assert len(kept) == len(delta_kept.Kept._fields) + 1


def offered_for(case: Case, regime: str = "training", **signature: object) -> list[int]:
    """The processors of every candidate that cuts, both directions."""
    asked = replace(facts(case, regime), **signature)  # type: ignore[arg-type]
    found = [*gated_delta_rule.candidates(asked, H100), *(gated_delta_rule.backward_candidates(asked, H100) if regime == "training" else ())]
    return [int(one.param("cut_for")) for one in found if "cut_for" in dict(one.params)]


@pytest.mark.parametrize(
    ("case", "segments"),
    [
        pytest.param(FEW, 8, id="as many as find a processor"),
        pytest.param(replace(FEW, T=2048 + 40), 4, id="of eight blocks at least"),
        pytest.param(replace(FEW, G=1, H=1), 15, id="as many as a chain is worth"),
        pytest.param(replace(FEW, B=2), 4, id="two sequences"),
        pytest.param(replace(FEW, T=16384, lengths=(16384 - 7, 7)), 4, id="packed"),
        pytest.param(replace(FEW, T=1024), 0, id="short"),
        pytest.param(replace(FEW, G=16, H=32), 0, id="many heads"),
        pytest.param(replace(FEW, dtype=torch.float32), 0, id="float32"),
    ],
)
def test_few_heads_of_long_sequences_are_cut(case: Case, segments: int) -> None:
    assert offered_for(case, "inference") == [132] * (segments > 0)
    assert offered_for(case) == [132] * 4 * (segments > 0)
    if segments:
        x = delta_prepare.rule_of(build(MADE, case, "meta"), delta_hopper.SIDE)
        made = delta_cut.cut_of(x, 132)
        assert made is not None
        assert made.segments == segments
        assert made.states.shape == made.maps.shape == (x.slots.sequences * segments, x.heads, 128, 128)


def test_a_short_call_is_examined_in_segments() -> None:
    """The gate's cases are too short to be worth it, and cut as long calls of few heads are."""
    for case, segments in ((replace(FEW, T=65), 8), (replace(FEW, T=200, B=2), 4), (replace(FEW, T=200, G=1, H=1), 8), (replace(FEW, T=65, H=64), 3)):
        x = delta_prepare.rule_of(build(MADE, case, "meta"), delta_hopper.SIDE)
        assert delta_cut.segments_of(x, 132) == segments


def test_what_a_table_knows_of_one_length_holds_for_others() -> None:
    """The same candidates, whose segments the sizes say."""
    for regime in ("inference", "training"):
        asked = [facts(replace(FEW, T=length), regime) for length in (2048, 3000, 6000, 65536)]
        found = [[one for one in gated_delta_rule.candidates(each, H100) if "cut_for" in dict(one.params)] for each in asked]
        assert found[0]
        assert all(each == found[0] for each in found)


def test_whole_sequences_stay_first_and_a_result_is_that_of_any_batch() -> None:
    found = [one for one in gated_delta_rule.candidates(facts(FEW), H100) if "carriers" in dict(one.params)]
    assert [(one.variant, "cut_for" in dict(one.params)) for one in found] == [("wgmma", False), ("wgmma", True), ("kept", False), ("kept", True)]
    assert not offered_for(FEW, batch_invariant=True)


def test_who_keeps_segments_agrees_with_who_takes_them() -> None:
    asked = facts(FEW)
    forward, backward = (
        [one for one in found(asked, H100) if one.residual] for found in (gated_delta_rule.candidates, gated_delta_rule.backward_candidates)
    )
    pairs = [(dict(one.params).get("cut_for"), dict(other.params).get("cut_for")) for one in forward for other in backward if one.agrees(other)]
    assert pairs == [(None, None), (132, 132)]
    other = gated_delta_rule.backward_candidates(asked, replace(H100, sms=114))
    assert not any(one.agrees(each) for one in forward if "cut_for" in dict(one.params) for each in other)

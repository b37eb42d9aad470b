"""A row whose pair is not offered to a call: which other numbers of its variant may stand for it, and what the shipped rows of few heads choose between their lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.triton_machines import H100
from titans_backends import dispatch, registry, tables
from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache.schema import Entry, canonical_when
from titans_backends.cache.staleness import Staleness
from titans_backends.dispatch import Choice
from titans_backends.machine import Machine
from titans_backends.offers import Pair
from titans_backends.plans import _tuned_here
from titans_backends.siblings import sibling
from titans_backends.tuning.problem import signature_of_bucket

ROW = Entry("cupy/wgmma", 5.0, 0.0, 0.0, params=(("carriers", 1), ("segments", 8)))
TRAINED = replace(ROW, backward="cupy/wgmma", backward_params=(("blocks", 132), ("segments", 8)))


def one(variant: str = "wgmma", **params: int | str | bool) -> Candidate:
    return Candidate("cupy", variant, tuple(params.items()))


def pair(variant: str = "wgmma", **params: int | str | bool) -> Pair:
    return Pair(one(variant, **params))


def test_the_fewest_other_numbers_stand_for_a_row() -> None:
    near = pair(carriers=1, segments=5)
    assert sibling(ROW, [pair(carriers=2, segments=5), pair(carriers=1), pair("walk", carriers=1, segments=5), near]) == near


@pytest.mark.parametrize(
    "offered",
    [
        pytest.param([], id="nothing"),
        pytest.param([pair(carriers=1)], id="another parameter is missing"),
        pytest.param([pair(segments=8, carriers=1)], id="another order"),
        pytest.param([pair("walk", carriers=1, segments=5)], id="another variant"),
        pytest.param([pair(carriers=1, segments="8")], id="a word for a number"),
        pytest.param([pair(carriers=True, segments=8)], id="a truth for a number"),
        pytest.param([pair(carriers=1, segments=4), pair(carriers=1, segments=16)], id="two that are as near"),
        pytest.param([Pair(replace(one(carriers=1, segments=5), saves_states=True))], id="it saves"),
        pytest.param([Pair(one(carriers=1, segments=5), one(blocks=132, segments=5))], id="both directions"),
    ],
)
def test_nothing_else_stands_for_a_row(offered: list[Pair]) -> None:
    assert sibling(ROW, offered) is None


def test_both_directions_of_a_pair_are_compared() -> None:
    near, other = (Pair(one(carriers=1, segments=4), one(blocks=132, segments=back)) for back in (8, 4))
    assert sibling(TRAINED, [other, near]) == near
    assert sibling(TRAINED, [Pair(one(carriers=1, segments=4))]) is None


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An H100 with Triton and CuPy, and the tables that come with the library alone."""
    real, all_tables = registry.availability, tables.sources
    verdict = real(registry.get("eager"), H100)

    def available(backend: object, machine: Machine) -> object:
        return verdict if backend.name in ("triton", "cupy", "eager") else real(backend, machine)  # type: ignore[attr-defined,arg-type]

    monkeypatch.setattr(registry, "availability", available)
    monkeypatch.setattr(dispatch, "sources", lambda machine: [one for one in all_tables(machine) if one.kind == "shipped"])
    tables.invalidate()
    yield
    tables.invalidate()


def asked(seq_len: int, machine: Machine = H100, **values: object) -> Choice:
    when = {"dtype": "bfloat16", "head_dim": (128, 128), "g": True, "group": 4, "streams": 8, "launch": "graph", **values}
    bucket = Bucket("gated_delta_rule", canonical_when(when, defaults_of("gated_delta_rule")), seq_len)  # type: ignore[arg-type]
    return dispatch.choose(signature_of_bucket(bucket, "cuda"), machine)


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("processors", [132, 114])
@pytest.mark.parametrize(
    ("seq_len", "values"),
    [
        pytest.param(4096, {}, id="tuned"),
        pytest.param(3000, {}, id="between two lengths"),
        pytest.param(2000, {"launch": "eager"}, id="below a length"),
        pytest.param(8192, {"streams": 16}, id="twice the heads"),
        pytest.param(16384, {"streams": 4}, id="half of them"),
        pytest.param(8192, {"streams": 16, "regime": "training"}, id="training"),
        pytest.param(8192, {"streams": 16, "regime": "training", "saves": "inputs"}, id="training that saves inputs alone"),
    ],
)
def test_shipped_rows_of_few_heads_speak_for_other_sizes_and_cards(seq_len: int, values: dict[str, object], processors: int) -> None:
    """One with fewer processors is told that its numbers are others."""
    choice = asked(seq_len, replace(H100, sms=processors), **values)
    assert choice.origin == "tuned"
    for candidate in (choice.pair.forward, choice.pair.backward):
        assert candidate is None or candidate.param("cut_for") == processors
    said = f"not among the candidates for this call, for which its backend offers the same variant as {choice.pair.label}"
    assert (said in choice.reason) == (processors != 132)


@pytest.mark.usefixtures("shipped")
def test_what_a_sibling_stands_for_is_still_to_be_tuned() -> None:
    """A call inside `autotune()` measures it: the row is of its bucket, but its numbers are another card's."""
    for processors in (132, 114):
        choice = asked(8192, replace(H100, sms=processors))
        assert choice.answered is not None
        assert choice.answered.hit is not None
        assert choice.answered.hit.kind == "exact"
        assert _tuned_here(replace(choice, answered=replace(choice.answered, staleness=Staleness("fresh")))) == (processors == 132)

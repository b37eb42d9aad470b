"""The race of all backends and peers: its cases, its arithmetic, its merging and its pages, and one tiny case measured on a CPU."""

from __future__ import annotations

import argparse
import xml.etree.ElementTree
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import titans_backends as tb
from tests.scripts import script
from titans_backends.backend import Backend, Candidate
from titans_backends.buckets import defaults_of
from titans_backends.cache.problems import parse_problems
from titans_backends.cache.schema import Bucket, canonical_when
from titans_backends.cache.timings import Measurement
from titans_backends.offers import Offer, Pair
from titans_backends.verdict import ACCEPTED

race = script("benchmarks/race.py")
cells = script("benchmarks/race_cells.py")
results = script("benchmarks/race_results.py")
lines = script("benchmarks/race_lines.py")
page = script("benchmarks/race_page.py")
reach = script("benchmarks/race_reach.py")
measure = script("benchmarks/race_measure.py")
ROOT = Path(__file__).parent.parent
CASE = "1x8192 16/32 D128 forward"


def entrant(label: str, who: str, us: float, **more: object) -> object:
    return results.Entrant(label, who, graph_us=us, wall_us=2 * us, pick_us=2 * us, pick_spread=0.0, **more)


def picked(label: str, who: str, us: float, order: int, simplicity: int = 3) -> object:
    return results.Picked(label, who, us, 0.001, simplicity, order)


def two_runs() -> object:
    """Triton's default 300, CuPy 280, FlashInfer in a later run where Triton took half as long: 110 there, 220 here; its own call 100 there."""
    first = results.Part(
        (
            entrant("triton/scan", "triton", 300.0),
            entrant("cupy/walk", "cupy", 280.0),
            entrant("fla_ungated, own call", "fla_ungated", 1.0, kind="other"),
        ),
        (picked("triton/scan", "triton", 300.0, 0), picked("cupy/walk", "cupy", 280.0, 1)),
        {"graph": results.Chosen("triton/scan", "tuned", "a row"), "wall": results.Chosen("triton/scan", "default", "none")},
        {"flashinfer": "not installed"},
        "triton/scan",
        floor_us=70.0,
    )
    later = results.Part(
        (
            entrant("triton/scan", "triton", 150.0),
            entrant("flashinfer/prefill", "flashinfer", 110.0),
            entrant("flashinfer, own call", "flashinfer", 100.0, kind="own"),
        ),
        (picked("triton/scan", "triton", 150.0, 0), picked("flashinfer/prefill", "flashinfer", 110.0, 4, 6)),
    )
    facts = {"device": "a card", "date": "2026-11-23", "torch": "2.11.0", "versions": {"triton": "3.6.0"}}
    return results.Results({"fla": facts, "flashinfer": facts}, {CASE: {"fla": first, "flashinfer": later}})


def test_the_cases_are_the_peers_rows_and_the_small_heads() -> None:
    names = [str(case) for case in cells.CASES]
    assert len(set(names)) == len(names) == 37
    peers = [name for name in names if " D128 " in name or name.startswith("1x8192 12/12 D32 ")]
    assert len(peers) == 23
    assert sum(name.endswith("forward") for name in peers) == 14
    first = {(case.cell.G, case.cell.H, case.cell.D): case.cell.T for case in reversed(cells.CASES) if case.cell.B == 1}
    assert set(first.values()) == {8192}


def test_the_cases_can_be_tuned(tmp_path: Path) -> None:
    assert race.main(["--shapes", str(tmp_path / "shapes.yaml")]) == 0
    met = parse_problems((tmp_path / "shapes.yaml").read_text(encoding="utf-8"), "shapes.yaml", defaults_of)
    assert len(met) == 37
    assert all(dict(one.problem.bucket.when)["launch"] == "graph" for one in met)
    assert sum(one.count.backward for one in met) == 16


def test_a_later_run_stands_on_the_first_ones_scale() -> None:
    found = results.standings(two_runs().cases[CASE])
    assert found.scales == {"flashinfer": {"graph": pytest.approx(2.0), "wall": pytest.approx(2.0)}}
    assert {one.label: one.graph_us for one in found.timed("graph")} == {
        "flashinfer, own call": pytest.approx(200.0),
        "flashinfer/prefill": pytest.approx(220.0),
        "cupy/walk": 280.0,
        "triton/scan": 300.0,
    }
    assert found.refused == {}


def test_what_the_first_run_measures_itself_a_later_one_only_compares_by() -> None:
    """Another candidate of Triton's among the later run's finalists would win, on a scale that is not its own."""
    told = two_runs()
    parts = dict(told.cases[CASE])
    other = (entrant("triton/other", "triton", 10.0), entrant("triton/scan + flashinfer/prefill", "triton+flashinfer", 120.0))
    parts["flashinfer"] = replace(
        parts["flashinfer"],
        entrants=(*parts["flashinfer"].entrants, *other),
        contenders=(*parts["flashinfer"].contenders, picked("triton/other", "triton", 10.0, 5)),
    )
    found = results.standings(parts)
    labels = {one.label for one in found.entrants}
    assert "triton/other" not in labels
    assert "triton/scan + flashinfer/prefill" in labels
    assert "triton/other" not in {one.label for one in found.contenders}


def test_a_time_whose_samples_disagree_gives_no_scale() -> None:
    """Of both runs one call's eager time; the later one's samples lie 46 % apart."""
    told = two_runs()
    parts = dict(told.cases[CASE])
    noisy = replace(parts["flashinfer"].entrants[0], wall_us=900.0, wall_spread=0.46)
    parts["flashinfer"] = replace(parts["flashinfer"], entrants=(noisy, *parts["flashinfer"].entrants[1:]))
    assert results.standings(parts).scales == {"flashinfer": {"graph": pytest.approx(2.0), "wall": pytest.approx(2.0)}}, "the graph's scale"


def test_what_shares_nothing_with_the_first_run_is_left_out_and_said() -> None:
    told = two_runs()
    parts = dict(told.cases[CASE])
    parts["flashinfer"] = replace(parts["flashinfer"], entrants=parts["flashinfer"].entrants[1:])
    found = results.standings(parts)
    assert found.adrift == ("flashinfer",)
    assert found.winner("graph").label == "cupy/walk"


def test_regret_is_over_the_fastest_and_what_computes_something_else_wins_nothing() -> None:
    found = results.standings(two_runs().cases[CASE])
    assert found.winner("graph").label == "flashinfer, own call"
    assert found.winner("graph", backends=True).label == "flashinfer/prefill"
    assert found.regret("triton/scan", "graph") == pytest.approx(0.5)
    assert found.regret("flashinfer/prefill", "graph") == pytest.approx(0.1)
    assert found.regret("flashinfer/prefill", "graph", backends=True) == 0.0
    assert found.regret("nobody", "graph") is None


def test_the_choice_is_the_tuners_rule() -> None:
    found = results.standings(two_runs().cases[CASE])
    assert results.chosen_of(found, "graph") == "flashinfer/prefill"
    assert results.chosen_of(found, "wall") == "flashinfer/prefill"
    assert results.chosen_of(found, "graph", ("flashinfer",)) == "cupy/walk"
    near = [picked("default", "triton", 100.0, 0), picked("other", "cupy", 98.0, 1)]
    assert results.rule_of(near) == "default"  # 2 % are not the 3 % that a default is replaced by
    tied = [picked("default", "triton", 100.0, 0), picked("simple", "eager", 81.0, 1, 0), picked("fast", "cupy", 80.0, 2, 5)]
    assert results.rule_of(tied) == "simple"
    assert results.rule_of([]) == ""


def test_rows_stand_by_heads_then_by_length() -> None:
    names = [
        "1x8192 12/12 D32 forward",
        "8x1024 16/32 D128 forward",
        "1x8192 16/32 D128 forward",
        "1x512 16/32 D128 forward",
        "1x512 2/8 D128 forward",
    ]
    told = results.Results(two_runs().runs, {name: two_runs().cases[CASE] for name in names})
    assert [str(line.case) for line in lines.in_order(lines.lines_of(told, "graph"))] == [
        "1x512 2/8 D128 forward", "1x512 16/32 D128 forward", "1x8192 16/32 D128 forward", "8x1024 16/32 D128 forward", "1x8192 12/12 D32 forward"
    ]  # fmt: skip


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    told = two_runs()
    told.begun["plain"] = CASE
    told.write(tmp_path / "race.json")
    again = results.Results.read(tmp_path / "race.json")
    assert again.cases == told.cases
    assert again.begun == {"plain": CASE}
    assert results.Results.read(tmp_path / "none.json").cases == {}


def test_merging_keeps_times_and_takes_newer_ones() -> None:
    one, other = two_runs(), two_runs()
    newer = replace(other.cases[CASE]["fla"], entrants=(entrant("triton/scan", "triton", 7.0),))
    other.cases = {CASE: {"fla": newer, "flashinfer": results.Part(failed="its process ended")}, "1x512 2/8 D128 forward": {"fla": newer}}
    found = results.merged(one, other)
    assert found.cases[CASE]["fla"] is newer
    assert found.cases[CASE]["flashinfer"] == one.cases[CASE]["flashinfer"]
    assert set(found.cases) == {CASE, "1x512 2/8 D128 forward"}


def test_the_tables_say_who_won_and_what_choices_cost() -> None:
    told = two_runs()
    text = page.compact(told)
    assert "disp Triton +50.0 %" in text
    assert "here FlashInfer +10.0 %" in text
    filled = page.page_of(f"# Race\n\n{page.BEGIN}\n{page.END}\n", told)
    row = "| 1×8192 16/32 D128 | 70 | 300 | 280 | 220 | FlashInfer, own call **200** | Triton: +50.0 % | FlashInfer: +10.0 % | CuPy: +40.0 % |"
    assert row in filled
    assert "Fastest of all: FlashInfer in 1 (1 by its own function), of 1 cases." in filled
    assert "| tuned here, with the peers installed | 0 of 1 | +10.0 % | +10.0 % | 1×8192 16/32 D128 forward | 1 of 1 |" in filled
    assert "Tuned here, more than 5 % over the fastest: 1×8192 16/32 D128 forward +10.0 %." in filled
    assert "over that of its own function, geometric mean: FlashInfer 1.100 (1.100 to 1.100, 1 cases)." in filled
    assert page.page_of(filled, told) == filled
    assert "Not measured yet" in page.page_of(filled, results.Results())
    with pytest.raises(ValueError, match="lacks the marks"):
        page.page_of("# Race\n", told)


def test_the_picture_is_a_file_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib")
    picture = script("benchmarks/race_picture.py")
    wide, narrow = picture.written(lines.lines_of(two_runs(), "graph"), tmp_path / "race.svg", "a card")
    assert narrow == tmp_path / "race-narrow.svg"
    for path in (wide, narrow):
        text = path.read_text(encoding="utf-8")
        said = [element.text for element in xml.etree.ElementTree.fromstring(text).iter() if element.text]
        assert {
            "16/32 of 128",
            "8192",
            "FlashInfer",
            "hollow: a peer’s own function, where it differs",
            "200 µs",
            "+10.0 %",
            "+50.0 %",
            "a card, in a CUDA graph from a cold cache. Left is better. 1 of 37 cases.",
        } <= set(said)
        assert "prefers-color-scheme:dark" in text
    with pytest.raises(ValueError, match="no case with a time"):
        picture.drawn([], "a card")


def test_the_page_says_what_the_results_say() -> None:
    assert page.main(["--check"]) == 0, "type: python benchmarks/race_page.py --draw"


def test_a_process_that_dies_costs_its_case_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, calls = tmp_path / "race.json", list[str]()

    def dying(name: str, *_: object) -> int:
        calls.append(name)
        told = results.Results.read(path)
        if len(calls) == 1:
            told.begun[name] = CASE
        told.write(path)
        return -11 if len(calls) == 1 else 0

    monkeypatch.setattr(race, "process", dying)
    asked = argparse.Namespace(seconds=30.0, warm=False, device="cpu", json=path, again=False)
    assert race.parent(["fla"], {}, list(cells.CASES), asked) == 0
    assert calls == ["fla", "fla"]
    assert results.Results.read(path).cases[CASE]["fla"].failed == "its process ended with status -11"


@pytest.mark.parametrize(
    ("kind", "entrant_failed", "part_failed", "status"),
    [
        ("backend", "", "", 0),
        ("backend", "wrong: o is off by 3.0e-01, where 2e-02 is allowed", "", 1),
        ("own", "wrong: o is off by 3.0e-01, where 2e-02 is allowed", "", 0),
        ("backend", "", "backward fla/kept: ValueError: wrong: dq is off by 3.0e-01, where 4e-02 is allowed", 1),
        ("backend", "RuntimeError: out of memory", "backward fla/kept: RuntimeError: out of memory", 0),
    ],
)
def test_the_status_says_whether_a_backend_was_wrong(
    kind: str, entrant_failed: str, part_failed: str, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "race.json"

    def measured(name: str, *_: object) -> int:
        one = results.Entrant("fla/rule", "fla", kind, failed=entrant_failed)
        results.Results({}, {CASE: {name: results.Part((one,), failed=part_failed)}}, {}).write(path)
        return 0

    monkeypatch.setattr(race, "process", measured)
    asked = argparse.Namespace(seconds=30.0, warm=False, device="cpu", json=path, again=False)
    assert race.parent(["fla"], {}, list(cells.CASES), asked) == status


def test_what_cannot_win_by_the_shipped_timings_does_not_race() -> None:
    some = [Candidate("triton", name) for name in ("first", "near", "far", "unknown")]
    peer = [Candidate("flash_qla", "auto"), Candidate("flash_qla", "not")]
    offers = [
        Offer(Backend(name, "", 1, {}, 1, {}), ACCEPTED, None, tuple(side))
        for name, side in (("triton", some), ("flash_qla", peer), ("numba", peer[:0]))
    ]
    available = [Pair(candidate) for one in offers for candidate in one.forward]
    when = {"dtype": "bfloat16", "head_dim": (128, 128), "streams": 32, "g": True}

    def bucket(seq_len: int, **changed: object) -> Bucket:
        return Bucket("gated_delta_rule", canonical_when({**when, **changed}, defaults_of("gated_delta_rule")), seq_len)

    def measured(**us: float) -> list[Measurement]:
        return [Measurement(f"triton/{name}", us=found) for name, found in us.items()]

    rows = {
        bucket(8192): measured(first=130.0, near=100.0, far=120.0),
        bucket(2048): measured(first=30.0, near=28.0, far=40.0),
        bucket(512): measured(first=20.0, far=10.0),  # the third nearest is not asked
        bucket(8192, head_dim=(64, 64)): measured(far=1.0),
    }
    forward, backward = reach.racing(offers, available, cells.GROUPS["fla"], [], bucket(8192, launch="graph"), rows)
    assert [one.variant for one in forward] == ["first", "near", "unknown", "auto"]  # nobody has timed the third
    assert backward == []
    everyone, _ = reach.racing(offers, available, cells.GROUPS["fla"], [], bucket(8192), None)
    assert [one.variant for one in everyone] == ["first", "near", "far", "unknown", "auto"]
    unknown, _ = reach.racing(offers, available, cells.GROUPS["fla"], [peer[1]], bucket(8192, head_dim=(32, 32)), rows)
    assert [one.variant for one in unknown] == ["first", "near", "far", "unknown", "auto", "not"]


def test_a_race_that_is_not_over_says_so() -> None:
    told = two_runs()
    assert "**Partial: 1 of 37 cases have been measured, and FLA and FlashQLA in none.** What stands here" in page.markdown(told)
    assert "pictures/race.svg" not in page.markdown(told)


def test_a_race_of_all_cases_is_not_called_partial_for_a_peer_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "CASES", (CASE,))
    (told,) = lines.partial(two_runs())  # type: ignore[arg-type]
    assert told.startswith("**All 1 cases have been measured, and FLA and FlashQLA in none.** `fastest` is")


def right(x: Mapping[str, Tensor], state: bool) -> tuple[Tensor | None, ...]:
    return tb.get_op("gated_delta_rule", backend="eager")(**x, output_final_state=state)


def wrong(x: Mapping[str, Tensor], state: bool) -> tuple[Tensor | None, ...]:
    o, final = right(x, state)
    assert o is not None
    return o.roll(1, 1), final


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_a_case_is_checked_and_timed_and_what_is_wrong_has_no_time(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "takes", lambda name, case: True)
    case = cells.Case(cells.Cell(1, 70, 1, 2, 16), mode)
    group = replace(cells.GROUPS["fla"], backends=("eager",))
    rules = measure.Rules(0.0, 0.0, 0.0, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        part = measure.measured(case, group, {"fla": right, "flash_qla": wrong}, None, rules, "cpu", None)
    finally:
        torch.set_num_threads(threads)
    by_label = {one.label: one for one in part.entrants}
    assert by_label["fla, own call"].graph_us > 0
    assert by_label["flash_qla, own call"].failed.startswith("wrong: o is off by")
    assert by_label["flash_qla, own call"].graph_us is None
    assert by_label["flash_qla, own call"].wall_us is None
    ours = [one for one in part.entrants if one.kind == "backend"]
    assert ours
    assert all(one.wall_us > 0 and not one.failed for one in ours)
    names = {"o", "final_state"} if mode == "forward" else {"o", "dq", "dk", "dv", "dbeta", "dg"}
    assert all(set(one.errors) == names for one in ours)
    assert part.dispatch["graph"].label in by_label
    assert results.rule_of(part.contenders) in by_label

    if mode == "training":  # nothing of that group trains: it measures nothing again
        later = measure.measured(case, cells.GROUPS["compiled"], {}, replace(part, entrants=()), rules, "cpu", None)
        assert later.entrants == ()
        assert later.seconds > 0


def test_what_get_op_runs_is_asked_again_and_nothing_else_of_a_race_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case, path = cells.Case(cells.Cell(1, 70, 1, 2, 16), "forward"), tmp_path / "race.json"
    (label,) = {chosen.label for chosen in measure.dispatched(case, "cpu").values()}
    old = {way: results.Chosen("old", "tuned", "by a row") for way in ("graph", "wall")}
    part = results.Part((entrant("old", "triton", 10.0), entrant(label, "eager", 20.0)), dispatch=old, candidates=7)
    results.Results({}, {str(case): {"fla": part}}, {}).write(path)
    given = ["--ask", "--device", "cpu", "--cell", "1x70 1/2 D16", "--json", str(path)]
    assert race.main(given) == 0
    found = results.Results.read(path).cases[str(case)]["fla"]
    assert {chosen.label for chosen in found.dispatch.values()} == {label}
    assert replace(found, dispatch=old) == part
    assert f"{case}, graph: old -> {label} (" in capsys.readouterr().out

    results.Results({}, {str(case): {"fla": replace(part, entrants=part.entrants[:1])}}, {}).write(path)
    assert race.main(given) == 1
    assert "which has no time" in capsys.readouterr().out
    results.Results({}, {str(case): {"fla": results.Part(failed="it ran out of memory")}}, {}).write(path)
    assert race.main(given) == 1
    assert f"not asked -> {label}, which has no time" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds no race"):
        race.main([*given[:-1], str(tmp_path / "none.json")])


def test_the_backward_of_the_named_pair_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = measure._posed(cells.Case(cells.Cell(1, 70, 1, 2, 16), "training"), "cpu")
    asked = measure.asked_of(subject, True)
    named = [pair for pair in measure.pairs(asked.offers, asked.signature) if pair.backward.backend == "eager"]
    backward, ran = measure.module_of(named[0].backward), list[Candidate]()
    run = backward.run_backward
    monkeypatch.setattr(backward, "run_backward", lambda *given: (ran.append(given[-1]), run(*given))[1])
    for pair in named:
        with measure.running(asked, pair):
            measure.user_of(subject, pair, True)()
    assert ran == [pair.backward for pair in named]
    assert len(set(ran)) > 1

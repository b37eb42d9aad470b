"""A race as the report shows it: one scale for all runs, who is fastest, what the choices cost, and which files are no race."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.report_facts import race
from titans_backends.reporting.race_file import Race, read_race
from titans_backends.reporting.race_rows import race_headline, race_rows


def test_a_row_knows_the_fastest_of_all_and_what_choices_cost() -> None:
    one = next(row for row in race_rows(race()) if row.way == "graph" and row.row.place.seq_len == 512)
    assert one.fastest.label == "flashinfer, own call"
    assert [(best.who, best.us) for best in one.row.best] == [("flashinfer", pytest.approx(200.0)), ("cupy", 280.0), ("triton", 300.0)]
    assert one.costs == {"tuned": pytest.approx(0.1), "shipped": pytest.approx(0.4)}
    assert one.row.winner is not None
    assert (one.row.winner.label, one.row.winner.us) == ("flashinfer/prefill", pytest.approx(220.0))
    assert one.row.over_default == pytest.approx(300 / 220)
    assert one.row.share == pytest.approx(70 / 220)
    assert one.standings.refused == {"numba_cpu": "it does not run on cuda"}


def test_rows_stand_by_direction_launch_heads_and_length() -> None:
    assert [(one.row.place.regime, one.way, one.row.place.size, one.row.place.seq_len) for one in race_rows(race())] == [
        *(("inference", way, "16/32 × 128", seq_len) for way in ("graph", "wall") for seq_len in (512, 2048)),
        *(("training", way, "2/8 × 128, 8 sequences", 1024) for way in ("graph", "wall")),
    ]


def test_a_pair_of_two_backends_wins_under_both_names_and_draws_no_line() -> None:
    one = race_rows(race())[-1]
    assert one.fastest.who == "cupy + triton"
    assert [best.who for best in one.row.best] == ["triton", "eager"]
    assert "in 1" in "".join(race_headline([one]))


def test_the_headline_counts_cases_once() -> None:
    told = list(race_headline(race_rows(race())))
    assert told[0].startswith("3 cases of gated_delta_rule in bfloat16, 2 forward and 1 forward and backward: flashinfer, cupy, triton, eager,")
    assert (
        "In a CUDA graph, from a cold cache, the fastest is flashinfer in 2 and cupy + triton in 1, in 2 of these by a peer’s own function."
        in told[1]
    )


def test_a_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "race.json"
    path.write_text(json.dumps(asdict(race())), encoding="utf-8")
    assert [one.costs for one in race_rows(read_race(path))] == [one.costs for one in race_rows(race())]


@pytest.mark.parametrize("text", ["[]", '{"cases": {}}', '{"runs": {}, "cases": {"x": {"fla": {"entrants": [{"what": 1}]}}}}', "{", "3"])
def test_what_is_no_race_is_a_value_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "race.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^it is no race: |line 1 column 2"):
        read_race(path)


def test_names_that_are_no_case_and_cases_without_a_time_are_left_out() -> None:
    told = race()
    name, parts = next(iter(told.cases.items()))
    bare = {run: replace(part, entrants=()) for run, part in parts.items()}
    assert race_rows(Race(told.runs, {"someone's case": parts, name: bare})) == []


def test_the_page_shows_the_race(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the package matplotlib is not installed: pip install 'titans-backends[report]'")
    pytest.importorskip("jinja2", reason="the package jinja2 is not installed: pip install 'titans-backends[report]'")
    from tests.report_facts import facts
    from titans_backends.reporting.page import page
    from titans_backends.reporting.race_view import race_view
    from titans_backends.reporting.view import page_view

    view = race_view(race(), "race.json")
    assert view is not None
    assert [(one.what, one.launch, one.within, one.beside, one.cases, one.mean, one.worst) for one in view.choices] == [
        ("tuned there, peers installed", "in a graph", 1, 3, 3, "+6.7 %", "+10.0 %"),
        ("shipped tables, which name no peer", "in a graph", 0, 0, 2, "+40.0 %", "+40.0 %"),
        ("tuned there, peers installed", "eagerly", 1, 3, 3, "+6.7 %", "+10.0 %"),
        ("shipped tables, which name no peer", "eagerly", 0, 0, 2, "+40.0 %", "+40.0 %"),
    ]
    [size, fields] = view.groups[0].map.lines[0]
    assert (size, fields[0].who, fields[0].time, fields[0].mark) == ("16/32 × 128", "flashinfer, own", "200 µs", "tuned +10.0 %")
    title, told, candidates = view.groups[0].panels[0].numbers[0]
    assert title == "512 tokens"
    assert "floor 70.0 µs: 35 % of the fastest’s time" in told
    assert [one.label for one in candidates if one.chosen] == ["flashinfer/prefill"]
    assert [one.note for one in candidates if one.note] == ["computes another rule: not in the race"]
    assert view.failed == (("8x1024 2/8 D128 training", "flash_qla/chunked + flash_qla/chunked", "wrong: dg is off by 0.2"),)
    text = page(page_view(facts()))
    assert text.index('id="race"') < text.index('id="m0"'), "the race stands before machines that are not here"
    assert text.count('id="race"') == 1
    here = replace(facts(), machines=(replace(facts().machines[0], here=True),))
    text = page(page_view(here))
    assert text.index('id="m0"') < text.index('id="race"')
    assert race_view(Race(), "race.json") is None

"""What rows of the other launch cost, from the timings in the repository: the limit that `cache.neighbour` sets keeps its promise, and the page says what was found."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import script
from titans_backends.buckets import defaults_of, field
from titans_backends.cache import file
from titans_backends.cache.neighbour import LEAST_US
from titans_backends.cache.schema import canonical_when

neighbours = script("benchmarks/neighbours.py")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def timings() -> Any:
    """The shipped card's."""
    table = file.read_timings(neighbours.RESULTS / "nvidia_h100_80gb_hbm3.timings.yaml", defaults_of).table
    assert table is not None
    return table


@pytest.mark.parametrize(("launch", "worst"), [("graph", 1.06), ("eager", 1.01)])
def test_from_the_limit_on_the_other_launchs_winner_gains_and_costs_little_at_worst(timings: Any, launch: str, worst: float) -> None:
    speak = [one.over_default for one in neighbours.neighbours(timings, "inference", launch) if one.other_us >= LEAST_US]
    assert len(speak) >= 10
    assert sum(speak) / len(speak) < 0.95
    assert max(speak) < worst


@pytest.mark.parametrize("launch", ["graph", "eager"])
def test_in_training_it_gains_from_twice_the_limit_on(timings: Any, launch: str) -> None:
    speak = [one.over_default for one in neighbours.neighbours(timings, "training", launch) if one.other_us >= 2 * LEAST_US]
    assert len(speak) >= 3
    assert max(speak) <= 1


def test_below_the_limit_there_is_a_reason_for_it(timings: Any) -> None:
    assert max(one.over_default for one in neighbours.neighbours(timings) if one.other_us < LEAST_US) > 1.05


@pytest.mark.parametrize("launch", ["graph", "eager"])
def test_the_page_tells_what_the_command_prints(timings: Any, launch: str) -> None:
    """A word for each figure: who measures the card anew corrects docs/cache.md with them."""
    page = (ROOT / "docs" / "cache.md").read_text(encoding="utf-8")
    for least in (0.0, LEAST_US):
        line = neighbours.told(neighbours.neighbours(timings, "inference", launch), least)
        for figure in re.findall(r"\d\.\d{3}|\d+(?= of )", line):
            assert figure in page, f"docs/cache.md lacks {figure} of: {line}"


def test_where_times_cross_a_choice_changes_rightly_more_often_than_halfway(timings: Any) -> None:
    found = neighbours.between(timings)
    assert len(found) >= 30
    assert sum(one.crossing for one in found) < 0.5 * sum(one.nearest for one in found)
    assert sum(one.crossing <= 0.05 for one in found) > 0.8 * len(found)


@pytest.mark.parametrize("slug", ["nvidia_h100_80gb_hbm3", "nvidia_h200"])
def test_the_tuners_page_tells_what_that_costs(slug: str) -> None:
    page = (ROOT / "docs" / "tuner.md").read_text(encoding="utf-8")
    table = file.read_timings(neighbours.RESULTS / f"{slug}.timings.yaml", defaults_of).table
    for line in neighbours.told_between(neighbours.between(table)).splitlines():
        count, near, mean, worst = re.findall(r"[\d.]+ %|\d+(?= lengths|,? within)", line.replace("within 5 %", "within"))
        assert f"| {count} | {near} | {mean} | {worst} |" in page, line


def test_the_command_prints_both_lines_and_refuses_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert neighbours.main([str(neighbours.RESULTS / "nvidia_h200.timings.yaml")]) == 0
    assert "from 0 us: 19 of 19 buckets" in capsys.readouterr().out
    assert neighbours.main(["missing.yaml"]) == 1
    assert "there is no such file" in capsys.readouterr().err


def test_in_training_the_pairs_are_compared(timings: Any) -> None:
    """As if graphs took what eager calls take: then eager's winner is the graph's, and no default is faster than what it may save."""
    eager = [bucket for bucket in timings.rows if (field(bucket, "regime"), field(bucket, "launch")) == ("training", "eager")][:6]
    graphs = {
        bucket._replace(when=canonical_when({**dict(bucket.when), "launch": "graph"}, defaults_of(bucket.op))): timings.rows[bucket]
        for bucket in eager
    }
    found = neighbours.neighbours(replace(timings, rows={**{bucket: timings.rows[bucket] for bucket in eager}, **graphs}), "training")
    assert {one.bucket for one in found} == set(graphs)
    assert all(one.us == one.other_us == one.best_us and one.over_default <= 1 for one in found)
    assert any(one.over_default < 1 for one in found)

"""What eager rows cost in graphs, from the timings in the repository: the limit that `cache.neighbour` sets keeps its promise, and the page says what was found."""

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
def measured() -> list[Any]:
    """The shipped card's buckets with both launches."""
    table = file.read_timings(neighbours.RESULTS / "nvidia_h100_80gb_hbm3.timings.yaml", defaults_of).table
    assert table is not None
    return neighbours.neighbours(table)


def test_from_the_limit_on_an_eager_winner_gains_in_a_graph_and_costs_little_at_worst(measured: list[Any]) -> None:
    speak = [one.over_default for one in measured if one.eager_us >= LEAST_US]
    assert len(speak) >= 10
    assert sum(speak) / len(speak) < 0.95
    assert max(speak) < 1.06


def test_below_the_limit_there_is_a_reason_for_it(measured: list[Any]) -> None:
    assert max(one.over_default for one in measured if one.eager_us < LEAST_US) > 1.05


def test_the_page_tells_what_the_command_prints(measured: list[Any]) -> None:
    """A word for each figure: who measures the card anew corrects docs/cache.md with them."""
    page = (ROOT / "docs" / "cache.md").read_text(encoding="utf-8")
    for least in (0.0, LEAST_US):
        line = neighbours.told(measured, least)
        for figure in re.findall(r"\d\.\d{3}|\d+(?= of )", line):
            assert figure in page, f"docs/cache.md lacks {figure} of: {line}"


def test_the_command_prints_both_lines_and_refuses_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert neighbours.main([str(neighbours.RESULTS / "nvidia_h200.timings.yaml")]) == 0
    assert "from 0 us: 19 of 19 buckets" in capsys.readouterr().out
    assert neighbours.main(["missing.yaml"]) == 1
    assert "there is no such file" in capsys.readouterr().err


def test_in_training_the_pairs_are_compared() -> None:
    """As if graphs took what eager calls take: then eager's winner is the graph's, and no default is faster than what it may save."""
    table = file.read_timings(neighbours.RESULTS / "nvidia_h100_80gb_hbm3.timings.yaml", defaults_of).table
    assert table is not None
    eager = [bucket for bucket in table.rows if (field(bucket, "regime"), field(bucket, "launch")) == ("training", "eager")][:6]
    graphs = {
        bucket._replace(when=canonical_when({**dict(bucket.when), "launch": "graph"}, defaults_of(bucket.op))): table.rows[bucket] for bucket in eager
    }
    found = neighbours.neighbours(replace(table, rows={**{bucket: table.rows[bucket] for bucket in eager}, **graphs}), "training")
    assert {one.bucket for one in found} == set(graphs)
    assert all(one.us == one.eager_us == one.best_us and one.over_default <= 1 for one in found)
    assert any(one.over_default < 1 for one in found)

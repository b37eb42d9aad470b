"""The pages that show what was measured of the tuner say what the results say, and show what is bad as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.scripts import script
from titans_backends.buckets import field
from titans_backends.cli.assess import _json
from titans_backends.recording import read
from titans_backends.tuning.assess import Assessment
from titans_backends.tuning.assess_order import in_order, spread_out
from titans_backends.tuning.events import CompiledAhead
from titans_backends.tuning.first_use import FirstUse
from titans_backends.tuning.plan import plan
from titans_backends.tuning.recorded import demands
from titans_backends.tuning.regret import Assessed, Choice, Flip
from titans_backends.tuning.run import TuneRequest

page = script("benchmarks/tuner_page.py")
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["assess", "recorded"])
def test_the_committed_page_is_what_the_results_say(name: str) -> None:
    before = (ROOT / "docs" / page.PAGES[name]).read_text(encoding="utf-8")
    assert page.written(name, before, ROOT / "benchmarks" / "results") == before, "type: python benchmarks/tuner_page.py"


def test_every_figure_and_every_pair_is_shown(tmp_path: Path) -> None:
    one, other = plan(
        "cpu", ops=["gated_delta_rule"], seq_lens=[64, 256], heads=[(2, 2)], head_dims=[(16, 16)], dtypes=["float32"], regimes=["inference"]
    )
    best, bad = Choice("eager/best", 100.0, 0.01, 0.0, False), Choice("eager/bad", 108.0, 0.01, 0.08, True)
    near = Choice("eager/near", 104.0, 0.1, 0.04, False)
    found = Assessment(
        (Assessed(one, "eager/best", 100.0, 0.01, 7, (best, bad), Flip("outside", 0.08)),),
        (Assessed(one._replace(seq_len=128), "eager/best", 100.0, 0.01, 7, (near,), None, (64, 256)),),
        (12.0, 9.0), (1, 1), (FirstUse(one, 1.25, 0.002, "tuned", True),), ((other, "the budget ended"),), 60.0, CompiledAhead(30, 14, 20.0), 2,
    )  # fmt: skip
    (tmp_path / "assess.json").write_text(json.dumps(_json(found, TuneRequest((one, other), backends=("eager", "numba_cpu")), "tb it")))
    text = page.written("assess", f"# A\n{page.BEGIN}\n{page.END}\nrest\n", tmp_path)
    for said in (
        "Measured in 60 s by `tb it`, racing:",
        "| time to tune | | 12 s for 1 buckets, then 9 s for 1 buckets, in 2 batches |",
        ", racing: eager, numba_cpu and the default.",
        "| mean regret | at most 1 % | 4.0 % over 1 buckets, 2 choices of two tunes |",
        "| worst regret | at most 5 % | 8.0 %; of those beyond the noise 8.0 % |",
        "| flips outside ties and the default's margin | 0 | 1 of 1 |",
        "| midpoints with at most 5 % regret | at least 95 % | 100.0 % of 1, worst 4.0 % |",
        "| first call of a fresh process with the shipped table | no tuning | 1.25 s, the second 2.00 ms (gated_delta_rule, choice: tuned) |",
        "| 64 | `eager/best`, then `eager/bad` | 8.0 % | outside, 8.0 % | the same | 100 | 1.0 % | 7 |",
        "| 128 | `eager/near` | 4.0 % (noise) |  | `eager/best` | 100 | 1.0 % | 7 |",
        "Not assessed: 1 because the budget ended.",
    ):
        assert said in text
    assert text.endswith("rest\n")
    with pytest.raises(ValueError, match="lacks the marks"):
        page.page_of("no marks", "text")


def test_a_recorded_line_shows_all_three_ways_and_a_wrong_one_as_wrong() -> None:
    line = {
        "model": "encoder", "regime": "training", "tokens": 64, "ms": {"untuned": 4.0, "before": 3.0, "after": 2.0}, "covered": 0.5, "problems": 3, "rows": 2,
        "difference": 0.3, "wrong": "the outputs differ by 3.0e-01", "winners": {"dual_core 64": "eager/x"},
    }  # fmt: skip
    told = {
        "device": {"name": "A"},
        "environment": {"date": "2026-01-01", "torch": "2"},
        "lines": [line],
        "tune_s": 9.0,
        "buckets_left": 1,
        "left": ["b: why"],
    }
    text = page.recorded(told)
    assert "| encoder | training | 64 | 4.00 | 3.00 | 2.00 | 2.00 | 1.50 | 2 of 3 | 50.0 % | 3e-01 WRONG |" in text
    assert "dual_core 64 `eager/x`" in text
    assert "--json benchmarks/results/recorded.json`: one tune of 9 s for all of them, 1 left when the budget ended." in text
    assert "Not measured: b: why." in text
    text = page.recorded({**told, "command": "tb it", "tunes": {"encoder": 4.0, "transformers": 5.0}})
    assert "By `tb it`: a tune of 4 s for encoder, 5 s for transformers, 1 left when the budget ended." in text


def test_the_assessed_problems_can_be_measured_and_have_midpoints() -> None:
    found = demands(read(ROOT / "benchmarks" / "assess_shapes.yaml"), "cuda")
    buckets = spread_out([one.bucket for one in found], None)
    assert {field(bucket, "regime") for bucket in buckets} == {"inference"}
    between = [bucket for bucket, neighbours in in_order(buckets) if neighbours is not None]
    assert len(buckets) >= 30
    assert len(between) >= 20
    assert all(bucket.seq_len % 16 == 0 for bucket in between)  # so that they run what was compiled for their neighbours

"""The layer's benchmark on a CPU, tiny: every mode is checked against the plain stack and timed, what time does not reach is said, and the page is written."""

from __future__ import annotations

import math
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch

from tests.scripts import script

times = script("benchmarks/layer_times.py")
report = script("benchmarks/layer_report.py")
page = script("benchmarks/seeds_page.py")
PAGE = Path(__file__).parent.parent / "docs" / "seeds.md"
TINY = ["--device", "cpu", "--stack", "32,1,1,32", "--budget", "0.0001"]


def test_every_mode_is_right_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert times.main([*TINY, "--lengths", "128", "--precisions", "highest,bfloat16", "--json", str(tmp_path / "times.json")]) == 0
    read = report.Report.read(tmp_path / "times.json")
    assert len(read.rows) == 4 * 2 * 2 + 8 * 2
    assert not [row for row in read.rows if row.failed or not row.eager_ms > 0]
    assert max(row.error for row in read.rows if row.precision == "highest") < 1e-5
    assert "recurrent: the stack" in capsys.readouterr().out

    (tmp_path / "times.json").rename(tmp_path / "layer_times.json")
    text, pictures = page.page_of(PAGE.read_text(encoding="utf-8"), tmp_path)
    assert "| (7) merge at the end with 0.1 |" in text
    assert "Not measured yet: `python benchmarks/scores.py" in text
    xml.etree.ElementTree.fromstring(pictures["layer_times.svg"])


def test_the_page_says_what_the_results_say() -> None:
    written = PAGE.read_text(encoding="utf-8")
    text, pictures = page.page_of(written, PAGE.parent.parent / "benchmarks" / "results")
    assert text == written, "type: python benchmarks/seeds_page.py"
    for name, picture in pictures.items():
        assert (PAGE.parent / "pictures" / name).read_text(encoding="utf-8") == picture, f"{name}: type: python benchmarks/seeds_page.py"


def test_what_is_wrong_has_no_time_and_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    honest = times.Bench.encoder

    def other(self: object, mode: str) -> torch.nn.Module:
        encoder = honest(self, mode)
        encoder.register_forward_hook(lambda _module, _args, out: out._replace(tokens=out.tokens.roll(1, 1)))
        return encoder

    monkeypatch.setattr(times.Bench, "encoder", other)
    assert times.main([*TINY, "--lengths", "40", "--modes", "flat", "--precisions", "highest"]) == 1
    assert "wrong: relative error" in capsys.readouterr().err


def test_what_the_time_does_not_reach_is_said(tmp_path: Path) -> None:
    times.main([*TINY, "--lengths", "40", "--modes", "flat", "--seconds", "0", "--json", str(tmp_path / "times.json")])
    read = report.Report.read(tmp_path / "times.json")
    assert read.not_measured == ["table flat 40"]
    assert math.isnan(read.found("flat", 40, "highest", "ours").eager_ms)

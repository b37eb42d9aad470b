"""Scores preserved: similarities of sentence pairs rank alike on every backend and in float64; and how two lists of scores are compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.scripts import script

pairs = script("examples/sentence_pairs.py")
scores = script("benchmarks/scores.py")
stsb = script("examples/stsb.py")


def short_pairs(count: int) -> list[tuple[str, str]]:
    """Documentation strings of a few lengths up to 140 characters, so that sentences of one length go through the float64 model together."""
    found = [tuple(text[: max(60, min(len(text), 140) // 20 * 20)] for text in pair) for pair in pairs.docstring_pairs(count)]
    return [(first, second) for first, second in found if first != second]


@pytest.mark.parametrize("mode", ["flat", "loop", "dual", "recurrent"])
def test_similarities_rank_as_in_float64(mode: str, backend_name: str) -> None:
    found = list(scores.scores(short_pairs(60), [mode], [backend_name], [torch.float32, torch.bfloat16], [32, 1, 1, 32], "cpu"))
    if found[0].refused:
        pytest.skip(found[0].refused)
    assert not [score for score in found if score.wrong]


def test_the_pairs_are_the_same_every_time_and_never_one_sentence_twice() -> None:
    found = pairs.docstring_pairs(500)
    assert found == pairs.docstring_pairs(500)
    assert len(set(found)) == 500
    assert all(first != second for first, second in found)


def test_correlations_of_known_lists() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([2.0, 1.0, 4.0, 3.0, 100.0])
    assert pairs.spearman(a, b) == pytest.approx(0.8)
    assert pairs.spearman(a, a**3) == pytest.approx(1.0)
    assert pairs.spearman(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.948683298)  # 4.5 / sqrt(4.5 * 5)
    assert pairs.pearson(a, 3 - 2 * a) == pytest.approx(-1.0)


def test_stsb_reads_a_file_with_a_header_and_one_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plain.tsv").write_text("main\tnews\t2017\t1\t2.5\tA man runs.\tA man sleeps.\nmain\tnews\t2017\t2\t4.0\tIt rains.\tRain falls.\n")
    (tmp_path / "named.tsv").write_text("score\tsentence1\tsentence2\n2.5\tA man runs.\tA man sleeps.\n4.0\tIt rains.\tRain falls.\n")
    read = [stsb.read(tmp_path / f"{name}.tsv", "") for name in ("plain", "named")]
    assert read[0][0] == read[1][0] == [("A man runs.", "A man sleeps."), ("It rains.", "Rain falls.")]
    assert read[0][1].tolist() == read[1][1].tolist() == [2.5, 4.0]
    assert stsb.main(["--tsv", str(tmp_path / "named.tsv"), "--stack", "32,1,1,32", "--modes", "flat", "--device", "cpu"]) == 0
    assert "Spearman" in capsys.readouterr().out
    assert stsb.main(["--tsv", str(tmp_path / "plain.tsv"), "--columns", "1,2,3", "--stack", "32,1,1,32"]) == 0
    (tmp_path / "plain.tsv").write_text("a\tb\tc\n")
    assert stsb.main(["--tsv", str(tmp_path / "plain.tsv")]) == 2
    assert "--columns S1,S2,SCORE" in capsys.readouterr().err

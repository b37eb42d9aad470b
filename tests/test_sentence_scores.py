"""Scores preserved: similarities of sentence pairs rank alike on every backend and in float64; and how two lists of scores are compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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
    assert stsb.main(["--tsv", str(tmp_path / "plain.tsv"), "--columns", "3,6,4", "--stack", "32,1,1,32", "--modes", "flat"]) == 0
    (tmp_path / "plain.tsv").write_text("a\tb\tc\n")
    assert stsb.main(["--tsv", str(tmp_path / "plain.tsv")]) == 2
    assert "--columns S1,S2,SCORE" in capsys.readouterr().err


NAMED = "score\tsentence1\tsentence2\tother\n2.5\tA man runs.\tA man sleeps.\t1\n4.0\tIt rains.\tRain falls.\t3\n"


def test_columns_win_over_a_header_which_is_no_pair(tmp_path: Path) -> None:
    file = tmp_path / "named.tsv"
    file.write_text("\ufeff" + NAMED.replace("man runs", "man\u2028\x85runs").replace("\n", "\r\n"), encoding="utf-8")
    assert stsb.read(file, "")[1].tolist() == [2.5, 4.0]
    pairs, scores = stsb.read(file, "3,2,4")
    assert pairs == [("A man sleeps.", "A man\u2028\x85runs."), ("Rain falls.", "It rains.")]
    assert scores.tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("text", "asked", "said"),
    [
        (NAMED, ["--columns", "1,2"], "--columns 1,2: wanted three different"),
        (NAMED, ["--columns", "a,b,c"], "--columns a,b,c: wanted three different"),
        (NAMED, ["--columns", "0,1,2"], "--columns 0,1,2: wanted three different"),
        (NAMED, ["--stack", "32,2"], "--stack 32,2: wanted four whole numbers"),
        (NAMED, ["--stack", "32,3,1,32"], "where H divides D"),
        (NAMED, ["--modes", "flut"], "--modes flut: known are flat"),
        (NAMED, ["--device", "nonsense"], "type --device"),
        (NAMED, ["--weights", "nowhere"], "--weights nowhere cannot be read"),
        (NAMED, ["--weights", "bad"], "--weights bad cannot be read"),
        (NAMED, ["--weights", "small", "--modes", "flat"], "--weights small do not fit --modes flat --stack 32,1,1,32: it lacks"),
        (NAMED, ["--tsv", "nowhere"], "--tsv nowhere: No such file"),
        (NAMED.splitlines()[0], [], "has a header and no pair"),
        ("\n\n", [], "is empty"),
        ("A man\t2.5\nIt\t3\n", [], "line 1: wanted sentences in columns 1 and 2 and the score in column 3, found 2 columns"),
        (NAMED + "\nIt snows.\n", [], "line 5: wanted sentences in columns 2 and 3 and the score in column 1, found 1 column with"),
        (NAMED + "nan\tA\tB\n", [], "line 4: wanted sentences in columns 2 and 3 and the score in column 1, found 'nan', no finite number"),
        (NAMED + "-inf\tA\tB\n", [], "found '-inf', no finite number"),
        ("A\tB\t1\nA\tC\t1\n", [], "has 2 pairs of one score, 1;"),
        (b"caf\xe9\tB\t1\n", [], "is not UTF-8 (invalid continuation byte at byte 3)"),
    ],
)
def test_stsb_says_in_one_line_what_does_not_fit(
    text: str | bytes, asked: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.tsv").write_bytes(text if isinstance(text, bytes) else text.encode())
    Path("bad").write_bytes(b"no tensors")
    save_file({"embeddings.weight": torch.zeros(256, 16)}, "small")
    assert stsb.main(["--tsv", "pairs.tsv", "--stack", "32,1,1,32", "--device", "cpu", *asked]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_stsb_takes_weights_that_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, weights = tmp_path / "named.tsv", tmp_path / "weights"
    file.write_text(NAMED)
    state = stsb.encoder_of("flat", [32, 1, 1, 32], None).state_dict()
    save_file(state, weights)
    asked = ["--tsv", str(file), "--stack", "32,1,1,32", "--modes", "flat", "--device", "cpu", "--weights", str(weights)]
    assert stsb.main(asked) == 0
    save_file({name: torch.zeros(256, 16) if name == "embeddings.weight" else value for name, value in state.items()}, weights)
    assert stsb.main(asked) == 2
    assert "embeddings.weight is [256, 16] and must be [256, 32]" in capsys.readouterr().err

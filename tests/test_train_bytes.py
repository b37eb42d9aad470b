"""The byte-level example: a run that was interrupted and resumed is the run that was not, and the model guesses no byte that it has seen."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.scripts import script

train_bytes = script("examples/train_bytes.py")
TINY = ["--width", "32", "--heads", "1", "--layers", "1", "--batch", "2", "--tokens", "40", "--warmup", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file, many times."""
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes() * 10), dtype=torch.uint8)
    monkeypatch.setattr(train_bytes, "corpus", lambda: text)


@pytest.mark.parametrize("merge", ["scalar", "flux"])
def test_three_steps_and_one_more_are_four(merge: str, tmp_path: Path) -> None:
    whole, parts, curve = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors", tmp_path / "curve.json"
    assert train_bytes.main([*TINY, "--merge", merge, "--steps", "4", "--checkpoint", str(whole)]) == 0
    assert train_bytes.main([*TINY, "--merge", merge, "--steps", "3", "--checkpoint", str(parts)]) == 0
    assert train_bytes.main(["--device", "cpu", "--resume", "--steps", "4", "--checkpoint", str(parts), "--json", str(curve)]) == 0
    want, got = load_file(whole), load_file(parts)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    (told,) = json.loads(curve.read_text())["curves"]
    assert told["first"] == 3
    assert len(told["losses"]) == 1
    assert bool(told["merge"]) == (merge == "scalar")


@pytest.mark.parametrize("mode", ["recurrent", "flat"])
def test_no_logit_depends_on_a_later_byte(mode: str) -> None:
    torch.manual_seed(0)
    model = train_bytes.ByteModel(train_bytes.Recipe(mode=mode, width=32, heads=1, layers=2)).requires_grad_(False)
    ids = torch.randint(0, 256, (1, 140))
    changed = ids.clone()
    changed[0, 135:] = 0
    torch.testing.assert_close(model(changed)[:, :135], model(ids)[:, :135])


def test_no_step_draws_what_validation_reads() -> None:
    recipe, text = train_bytes.Recipe(batch=32, tokens=16), torch.arange(256, dtype=torch.uint8).repeat(500)
    held_out = set(range(0, (len(text) - 1) // 16, train_bytes.HELD_OUT))
    starts = torch.arange(len(text))
    drawn = {int(piece[0]) // 16 for step in range(50) for piece in train_bytes.pieces(starts, recipe, step)}
    assert not drawn & held_out
    assert {int(piece[0]) // 16 for piece in train_bytes.pieces(starts, recipe, -1)} <= held_out


def test_a_backend_that_fails_does_not_stop_the_comparison(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    honest = train_bytes.train

    def train(run: object, steps: int, backend: str, *more: object) -> None:
        if backend == "broken":
            raise RuntimeError("illegal address")
        honest(run, steps, backend, *more)

    monkeypatch.setattr(train_bytes, "COMPARED", ("broken", "eager"))
    monkeypatch.setattr(train_bytes, "refused", lambda *_: "")
    monkeypatch.setattr(train_bytes, "only", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(train_bytes, "train", train)
    assert train_bytes.main([*TINY, "--compare", "--steps", "1"]) == 1
    told = capsys.readouterr().out
    assert "broken FAILED RuntimeError: illegal address" in told
    assert "eager" in told


def test_a_run_that_is_stopped_keeps_its_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = train_bytes.Run.advance

    def advance(self: object, text: torch.Tensor) -> torch.Tensor:
        if self.step == 25:
            raise KeyboardInterrupt
        return honest(self, text)

    monkeypatch.setattr(train_bytes.Run, "advance", advance)
    with pytest.raises(KeyboardInterrupt):
        train_bytes.main([*TINY, "--json", str(tmp_path / "curve.json")])
    (told,) = json.loads((tmp_path / "curve.json").read_text())["curves"]
    assert len(told["losses"]) == 20
    assert told["tokens_per_s"] > 0
    assert told["validation"] is None


def test_comparing_leaves_out_who_cannot_train_here_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "curves.svg"
    assert train_bytes.main([*TINY, "--compare", "--steps", "2", "--picture", str(picture)]) == 0
    told = capsys.readouterr()
    assert "eager" in told.out
    assert "triton is left out" in told.err
    assert picture.read_text().startswith("<svg")
    assert train_bytes.main(["--compare", "--resume"]) == 2
    assert "leave --checkpoint and --resume out" in capsys.readouterr().err


WITHOUT_CUDA = [] if torch.cuda.is_available() else [(["--device", "cuda"], "type --device cpu")]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--batch", "0"], "--batch 0: wanted a whole number from 1"),
        (["--warmup", "-1"], "--warmup -1: wanted a whole number from 0"),
        (["--tokens", "1000000000"], "or fewer"),
        (["--width", "30", "--heads", "4"], "type --width 32"),
        (["--rate", "nan"], "--rate nan: wanted a finite number"),
        (["--steps", "0"], "--steps 0: wanted"),
        (["--checkpoint-every", "-1"], "0 writes it in the end only"),
        (["--device", "nonsense"], "type --device"),
        (["--device", "meta"], "computes nothing"),
        (["--checkpoint", "nowhere/a"], "type mkdir -p nowhere first"),
        (["--json", "nowhere/a"], "type mkdir -p nowhere first"),
        (["--picture", "."], "--picture . is a folder"),
        (["--resume"], "--resume wants a --checkpoint that is there, got None"),
        (["--compare", "--backend", "eager"], "leave --checkpoint and --resume out, and --backend"),
        *WITHOUT_CUDA,
    ],
)
def test_what_cannot_be_had_is_one_line_before_training(
    asked: Sequence[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_bytes, "train", None)
    assert train_bytes.main([*TINY, *asked]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_zeros_that_mean_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = list[int]()
    honest = train_bytes.Run.save
    monkeypatch.setattr(train_bytes.Run, "save", lambda self, path: (saved.append(self.step), honest(self, path)))
    asked = ["--warmup", "0", "--steps", "2", "--checkpoint-every", "0", "--checkpoint", str(tmp_path / "a")]
    assert train_bytes.main([*TINY, *asked]) == 0
    assert saved == [2]


def test_resuming_says_what_the_checkpoint_decides_and_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, resume = tmp_path / "kept", ["--device", "cpu", "--resume", "--checkpoint", str(tmp_path / "kept")]
    assert train_bytes.main([*TINY, "--steps", "1", "--checkpoint", str(kept)]) == 0
    capsys.readouterr()
    assert train_bytes.main([*resume, "--steps", "1", "--width", "64", "--heads", "1", "--picture", str(tmp_path / "a.svg")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"taken from {kept}: --width 32 (not 64)"
    assert told[1].endswith("has done 1 already; type --steps 101, or any more than 1")
    whole = kept.read_bytes()
    for damaged in (b"", whole[:-100], whole.replace(b'"run"', b'"ruin"'), whole.replace(b'\\"heads\\": 1', b'\\"heads\\": 7')):
        assert damaged != whole
        kept.write_bytes(damaged)
        assert train_bytes.main([*resume, "--steps", "2"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--checkpoint {kept} holds no run of this example" in line


def test_a_run_that_diverged_has_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(train_bytes.Run, "loss", lambda self, ids: sum(value.sum() for value in self.model.parameters()) * float("nan"))
    assert train_bytes.main([*TINY, "--steps", "1", "--picture", str(tmp_path / "a.svg")]) == 1
    assert capsys.readouterr().err.endswith("has no finite point; measure something first; type a smaller --rate than 0.001\n")

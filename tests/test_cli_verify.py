"""`verify`: counts what conformance finds, in a child process that may die without ending the command."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Sequence

import pytest
import torch
from typer.testing import CliRunner

from titans_backends.cli import app
from titans_backends.conformance import Item, Result, items

run = CliRunner().invoke
MODULE = importlib.import_module("titans_backends.cli.verify")


class Deadly:
    """An item that ends the process that receives it, as a faulting kernel would."""

    def __init__(self, like: Item) -> None:
        self.op, self.backend, self.case, self.regime = like.op, like.backend, like.case, like.regime

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (9,)

    def __str__(self) -> str:
        return "deadly"


def test_a_child_that_dies_is_one_wrong_case_and_the_others_are_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = items("eager", ops=["fused_uw"], dtypes=[torch.float64], regimes=["inference"])
    monkeypatch.setattr(MODULE, "items", lambda *_, **__: [Deadly(sound[0]), *sound])
    result = run(app, ["verify", "--op", "fused_uw", "--backend", "eager", "--device", "cpu"])
    assert result.exit_code == 1, result.output
    assert "deadly: its process died with exit status 9" in result.stdout
    assert f"{len(sound)} of {len(sound) + 1} cases right" in result.stdout
    assert "eager fused_uw" in result.stderr


def made_up(monkeypatch: pytest.MonkeyPatch, *statuses: str) -> None:
    def examined(work: Sequence[Item], timeout_s: float) -> list[Result]:
        cycle = [statuses[i % len(statuses)] for i in range(len(work))]
        return [
            Result(item, status, f"{status} [here]" if status != "passed" else "", 1e-7, 5e-6, ("eager/x", "forward eager/x"))  # type: ignore[arg-type]
            for item, status in zip(work, cycle, strict=True)
        ]

    monkeypatch.setattr(MODULE, "_examined", examined)


def test_everything_right_is_status_0(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, "passed")
    result = run(app, ["verify", "--device", "cpu", "--backend", "eager"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    rows = json.loads(run(app, ["verify", "--device", "cpu", "--backend", "eager", "--json"]).stdout)
    cases = sum(row["cases"] for row in rows)
    assert f"{cases} of {cases} cases right" in result.stdout
    assert {row["regime"] for row in rows} == {"inference", "training"}
    assert {tuple(row["candidates"]) for row in rows} == {("forward eager/x",)}


def test_one_wrong_case_is_status_1_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, "passed", "failed")
    result = run(app, ["verify", "--op", "fused_uw", "--backend", "eager", "--device", "cpu"])
    assert result.exit_code == 1
    assert "failed [here]" in result.stdout
    assert "10 wrong" in result.stdout


def test_refusals_are_neither_right_nor_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, "refused", "passed")
    result = run(app, ["verify", "--op", "fused_uw", "--backend", "eager", "--device", "cpu", "--json"])
    assert result.exit_code == 0
    assert {(row["passed"], row["refused"], row["failed"]) for row in json.loads(result.stdout)} == {(10, 0, 0), (0, 10, 0)}


def test_what_is_refused_altogether_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, "refused", "passed")
    told = run(app, ["verify", "--op", "fused_uw", "--backend", "eager", "--device", "cpu"], env={"COLUMNS": "160"}).stdout
    assert "refused: fused_uw eager inference float32: refused [here]" in told
    assert "training float32: refused" not in told


def test_nothing_that_ran_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, "refused")
    assert run(app, ["verify", "--op", "fused_uw", "--device", "cpu"]).exit_code == 1

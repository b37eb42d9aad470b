"""`bench`: checked, then timed, in this process; a wrong kernel has no time and makes the status 1."""

from __future__ import annotations

import importlib
import json

import pytest
from typer.testing import CliRunner

from titans_backends.cli import app
from titans_backends.tuning.ceilings import Ceilings
from titans_backends.tuning.gate import GateResult
from titans_backends.tuning.session import Checked, Session

SMALL = ["--seq-len", "32", "--heads", "1", "--head-dim", "16", "--device", "cpu", "--budget", "0.01"]
run = CliRunner().invoke


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up ceilings instead of measured ones."""
    module = importlib.import_module("titans_backends.cli.bench")
    monkeypatch.setattr(module, "measure", lambda device, dtype: Ceilings(1e9, 1e9))


def test_the_choice_the_default_and_the_reference_stand_side_by_side() -> None:
    result = run(app, ["bench", "fused_uw", "gated_delta_rule", *SMALL, "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(row["op"], row["what"]) for row in rows] == [
        (op, what) for op in ("fused_uw", "gated_delta_rule") for what in ("chosen", "default", "reference")
    ]
    assert all(row["median_us"] > 0 and row["floor_us"] > 0 for row in rows)
    assert all(row["share_of_floor"] == pytest.approx(row["floor_us"] / row["median_us"]) for row in rows)


def test_training_times_forward_and_backward_and_knows_no_floor() -> None:
    result = run(app, ["bench", "fused_uw", *SMALL, "--regime", "training", "--json"])
    rows = json.loads(result.stdout)
    assert " + " in rows[0]["candidate"]
    assert {row["floor_us"] for row in rows} == {None}
    table = run(app, ["bench", "fused_uw", *SMALL, "--regime", "training"], env={"COLUMNS": "80"}).stdout
    assert "of floor  " not in table
    assert max(map(len, table.splitlines())) <= 80


def test_a_wrong_kernel_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "check", lambda *_: Checked(GateResult("u is off by 0.5 on [strided]")))
    result = run(app, ["bench", "fused_uw", *SMALL])
    assert result.exit_code == 1
    assert "u is off by 0.5 on [strided]" in result.stdout

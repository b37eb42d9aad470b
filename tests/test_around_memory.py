"""The benchmark of the ops around the memory says what it has as it goes: short calls first, a line and a row a candidate, no large call before its turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.scripts import script
from titans_backends.backend import Candidate
from titans_backends.contracts.case import Case

bench = script("benchmarks/around_memory.py")
TWO = [Candidate("triton", "rows", (("rows", 16),)), Candidate("triton", "rows", (("rows", 32),))]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order, where nothing is run: calls made, groups compiled, candidates measured."""
    told: list[str] = []

    def build(contract: object, case: Case, device: str) -> str:
        told.append(f"made {contract.name} {case.name}")  # type: ignore[attr-defined]
        return case.name

    def measured(op: str, case: Case, direction: str, call: object, candidate: Candidate, limits: object, budget_s: float) -> dict[str, object]:
        told.append(f"{op} {case.name} {direction}")
        if case.name == bench.SMALL.name:
            raise KeyboardInterrupt
        return {"op": op, "case": case.name, "direction": direction, "candidate": candidate.label}

    monkeypatch.setattr(bench, "build", build)
    monkeypatch.setattr(bench, "candidates", lambda op, call, direction: list(TWO))
    monkeypatch.setattr(bench, "ahead", lambda wanted: told.append(f"compiled {sum(len(one[2]) for one in wanted)}") or 1.0)
    monkeypatch.setattr(bench, "ceilings", lambda: None)
    monkeypatch.setattr(bench, "measured", measured)
    return told


def test_what_was_measured_before_it_was_stopped_is_there(made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == len(bench.OPS) * 2 * len(TWO)
    assert {row["case"] for row in rows} == {bench.SHORT.name}
    assert capsys.readouterr().out.count(" | triton/rows") == len(rows)
    assert made[: len(bench.OPS) + 2] == [
        *(f"made {op} {bench.SHORT.name}" for op in bench.OPS),
        "compiled 20",
        f"{bench.OPS[0]} {bench.SHORT.name} forward",
    ]
    assert not [line for line in made if bench.LARGE.name in line]


def test_quick_measures_the_defaults_of_short_calls(made: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--quick", "--op", "short_conv", "--op", "token_flux"])
    short = bench.SHORT.name
    assert made == [f"made short_conv {short}", f"made token_flux {short}", "compiled 4"] + [
        f"{op} {short} {direction}" for op in ("short_conv", "token_flux") for direction in ("forward", "backward")
    ]
    assert "rows=16" in capsys.readouterr().out


def test_every_op_is_measured_in_both_directions_at_every_size() -> None:
    found = list(bench.cases(bench.OPS))
    assert len(found) == len({(op, case.name, direction) for op, case, direction in found}) == len(bench.OPS) * 3 * 2
    assert [case.name for _, case, _ in found[:: 2 * len(bench.OPS)]] == [bench.SHORT.name, bench.SMALL.name, bench.LARGE.name]

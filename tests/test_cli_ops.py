"""`ops`: everything that it says is what the contracts say."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from titans_backends.cli import app
from titans_backends.contracts import CONTRACTS

run = CliRunner().invoke


def test_every_op_is_listed_with_its_backends() -> None:
    result = run(app, ["ops"])
    rows = json.loads(run(app, ["ops", "--json"]).stdout)
    assert result.exit_code == 0
    assert [row["name"] for row in rows] == list(CONTRACTS)
    for row in rows:
        line = next(line for line in result.stdout.splitlines() if line.startswith(f"{row['name']} "))
        assert row["summary"] in line
        assert all(name in line for name in row["backends"])
        assert "eager" in row["backends"]


@pytest.mark.parametrize("name", CONTRACTS)
@pytest.mark.parametrize("columns", ["80", "120"])
def test_one_op_shows_every_parameter_and_fits_the_terminal(name: str, columns: str) -> None:
    result = run(app, ["ops", name], env={"COLUMNS": columns})
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= int(columns)
    opening = {line.split()[0] for line in result.stdout.splitlines() if line}
    assert set(CONTRACTS[name].parameters) <= opening


def test_json_holds_the_signature_and_the_key() -> None:
    op = json.loads(run(app, ["ops", "gated_delta_rule", "--json"]).stdout)
    assert op["signature"].startswith("gated_delta_rule(q, k, v, beta, g=None, *, gate=None, scale=None, chunk_size=None,")
    assert op["key"]["group"] == 1
    assert [argument["name"] for argument in op["arguments"] if argument["optional"]] == ["g", "gate", "initial_state", "cu_seqlens"]

"""`ops`: everything that it says is what the contracts say."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from titans_backends.cli import app
from titans_backends.contracts import CONTRACTS, contract
from titans_backends.contracts.case import build, case_dims, cases
from titans_backends.contracts.letters import LETTERS, letters_of
from titans_backends.contracts.validate import validate

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


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_letter_of_a_layout_is_explained(name: str) -> None:
    said = json.loads(run(app, ["ops", name, "--json"]).stdout)
    layouts = [layout for argument in said["arguments"] for layout in argument["layouts"]] + [output["dims"] for output in said["outputs"]]
    used = {letter for layout in layouts for letter in layout.split()}
    assert set(said["letters"]) == used
    told = run(app, ["ops", name]).stdout.split("\nletters\n")[1].split("\nformula\n")[0]
    assert [line.split()[0].replace("...", "*") for line in told.splitlines() if line.strip()] == list(said["letters"])


def test_no_letter_is_explained_that_no_layout_has() -> None:
    assert set().union(*(letters_of(made) for made in CONTRACTS.values())) == set(LETTERS)


@pytest.mark.parametrize("name", ["short_conv", "qkv_prepare", "token_flux", "chunk_flux"])
def test_what_a_letter_is_said_to_be_it_is(name: str) -> None:
    made = contract(name)
    case = next(iter(cases(made)))
    dims = {**case_dims(case), **validate(made, build(made, case, "meta"))}
    known = {"W": 4, "J": dims["K"] + dims["V"], "X": dims["K"] + dims["V"] + 1, "Y": 1, "N": dims["B"]}
    assert {letter: dims[letter] for letter in letters_of(made) if letter in known} == {
        letter: known[letter] for letter in letters_of(made) if letter in known
    }

"""An option of one value that is typed twice is a sentence, for every verb; what takes several, and a plain flag, may be repeated."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from titans_backends.cli import app
from titans_backends.cli.failures import MisuseError
from titans_backends.cli.words import options_of
from titans_backends.contracts import contract

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not refused may write here, beside the cache, which every test has for itself."""
    monkeypatch.chdir(tmp_path)


def verbs(group: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from verbs(command, (*above, name))
        else:
            yield (*above, name), command


def single_valued() -> Iterator[tuple[tuple[str, ...], str]]:
    for verb, command in verbs(get_command(app)):
        for one in command.params:
            if one.param_type_name == "option" and not one.multiple and not one.is_flag:
                yield verb, one.opts[0]


def test_every_single_valued_option_of_every_verb_is_refused_when_it_comes_twice() -> None:
    tried = 0
    for verb, option in reversed([*single_valued()]):  # those that measure last
        result = run(app, [*verb, option, "1", f"{option}=1"])
        assert result.exit_code == 2, (verb, option, result.output)
        assert f"error: {option} was given 2 times and takes one value; type it once: {option} " in " ".join(result.stderr.split()), (verb, option)
        assert result.stdout == ""
        tried += 1
    assert tried > 40


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("tune --quick --full --dry-run", "--quick/--full was given 2 times and takes one value; type it once: --quick or --full"),
        ("explain gated_delta_rule --seq-len 8 --packed --seq-len 16 --seq-len 8", "--seq-len was given 3 times and takes one value"),
        ("explain --batch 2 gated_delta_rule --batch 3", "--batch was given 2 times"),
        (
            "explain slow_core --option chunk_size=64 --option chunk_size=32",
            "--option chunk_size was given twice; type it once, like --option chunk_size=32",
        ),
    ],
)
def test_a_contradiction_is_refused_wherever_its_halves_stand(words: str, said: str) -> None:
    result = run(app, shlex.split(words), env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert said in result.stderr


def test_help_is_given_whatever_came_before_it() -> None:
    result = run(app, ["tune", "--budget", "1", "--budget", "2", "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_what_takes_several_values_and_a_flag_may_be_repeated() -> None:
    result = run(app, shlex.split("ops --json --json"))
    assert result.exit_code == 0, result.output
    result = run(app, shlex.split("tune --seq-lens 64 --seq-lens 96 --heads 1 --head-dim 8 --dry-run --json"))
    assert result.exit_code == 0, result.output
    assert {64, 96} <= {row["seq_len"] for row in json.loads(result.stdout)}


def test_two_options_of_an_op_are_two() -> None:
    assert options_of(contract("slow_core"), ["chunk_size=32", "scale=2"]) == {"chunk_size": 32, "scale": 2.0}
    with pytest.raises(MisuseError, match="--option scale was given twice"):
        options_of(contract("slow_core"), ["scale=1", "chunk_size=32", "scale=1"])

"""What was typed, typed again: only what was typed, spelled as it must be, and without what is left out."""

from __future__ import annotations

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from titans_backends.cli.typed import typed_again

app = typer.Typer()


@app.command("verb")
def verb(
    ctx: typer.Context,
    op: Annotated[list[str] | None, typer.Option()] = None,
    seq_len: Annotated[int | None, typer.Option()] = None,
    timeout: Annotated[float, typer.Option()] = 60.0,
    from_file: Annotated[str | None, typer.Option("--from")] = None,
    quick: Annotated[bool | None, typer.Option("--quick/--full")] = None,
    doubtful: Annotated[bool, typer.Option("--doubtful")] = False,
    budget: Annotated[float | None, typer.Option()] = None,
) -> None:
    typer.echo(typed_again(ctx, without=("budget",)))


@pytest.mark.parametrize(
    ("typed", "again"),
    [
        ([], ""),
        (["--op", "a,b", "--op", "c", "--seq-len", "64"], " --op a,b --op c --seq-len 64"),
        (["--quick", "--timeout", "60"], " --timeout 60 --quick"),
        (["--full", "--doubtful", "--budget", "3"], " --full --doubtful"),
        (["--from", "my shapes.yaml", "--timeout", "0.5"], " --timeout 0.5 --from 'my shapes.yaml'"),
    ],
)
def test_the_command_is_what_was_typed_but_for_what_is_left_out(typed: list[str], again: str) -> None:
    assert CliRunner().invoke(app, typed).output == f"titans-backends verb{again}\n"

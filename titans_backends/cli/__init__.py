"""The command line: `titans-backends` and `python -m titans_backends`, one file per verb. Importing the library never imports this.

Results go to stdout, progress and errors to stderr; `exit_codes` says what the status means.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from typing import Annotated

import typer

from titans_backends import __version__
from titans_backends.cli import exit_codes
from titans_backends.cli.bench import bench
from titans_backends.cli.cache import cache
from titans_backends.cli.doctor import doctor
from titans_backends.cli.explain import explain
from titans_backends.cli.failures import CommandGroup, show_warning
from titans_backends.cli.new_backend import new_backend
from titans_backends.cli.once import Commands
from titans_backends.cli.ops import ops
from titans_backends.cli.report import report
from titans_backends.cli.tune import tune
from titans_backends.cli.verify import verify

__all__ = ["app", "main"]

app = Commands(
    name="titans-backends",
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("tune")(tune)
app.command("autotune", help="The same as tune.")(tune)
app.command("doctor")(doctor)
app.command("ops")(ops)
app.command("explain")(explain)
app.command("bench")(bench)
app.command("verify")(verify)
app.command("report")(report)
app.command("new-backend")(new_backend)
app.add_typer(cache, name="cache")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Kernels for memory layers of the Titans and DeltaNet family, chosen per machine by measurement.

    Start with: titans-backends tune
    """


def main() -> None:
    """Runs the command line and exits with its status; an exception that nobody expected is shown whole, with status 2."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a replaced stream: it is what it is
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    warnings.showwarning = show_warning
    try:
        app()
    except Exception:
        traceback.print_exc()
        sys.stderr.write("error: this is a fault of titans_backends itself; please report it with the lines above\n")
        sys.exit(exit_codes.MISUSED)

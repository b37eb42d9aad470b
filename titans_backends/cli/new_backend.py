"""`new-backend`: writes a backend that passes the conformance suite on one op, and says what to type next."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import titans_backends
from titans_backends.cli.failures import MisuseError, user_input
from titans_backends.cli.show import command, console, print_json, say
from titans_backends.contracts import contract
from titans_backends.reporting import numbers
from titans_backends.scaffold import KINDS, checked_name, in_tree, kind_named, plugin

__all__ = ["new_backend"]


def new_backend(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is called: a Python identifier in lower case.", show_default=False)],
    op: Annotated[str, typer.Option(metavar="OP", help="The op to begin with.")] = "fused_uw",
    kind: Annotated[str, typer.Option(metavar="KIND", help=f"What it is written in: {', '.join(KINDS)}.")] = "torch",
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="The project's folder.", show_default="titans-backends-NAME")] = None,
    inside: Annotated[bool, typer.Option("--in-tree", help="A folder of this checkout's backends/ instead of a project of its own.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The folder, its files and the commands as JSON.")] = False,
) -> None:
    """Write a new backend that passes the conformance suite on one op: manifest, op module, test and, as a plugin, its pyproject.toml."""
    with user_input():
        contract(op)
        checked_name(name, in_tree=inside)
        flavour = kind_named(kind, op)
        if inside and output is not None:
            raise MisuseError("--in-tree writes into backends/ of this checkout, --output elsewhere; give one of the two")
        made = in_tree(name, op, flavour, _checkout()) if inside else plugin(name, op, flavour, output)
        try:
            made.write()
        except OSError as error:
            raise MisuseError(f"{made.folder} cannot be written: {error.strerror or error}; name another folder with --output") from error
    if as_json:
        print_json({"folder": str(made.folder), "files": list(made.files), "next": list(made.next), "advice": flavour.advice})
        return
    out = console()
    say(out, f"wrote {numbers.amount(len(made.files), 'file')} in {made.folder}: {', '.join(made.files)}")
    say(out, "\nnext")
    for line in made.next:
        command(out, line)
    if flavour.advice:
        say(out, f"\n{flavour.advice}", "dim")


def _checkout() -> Path:
    """The checkout that this library runs from."""
    root = Path(titans_backends.__file__).parent.parent
    if not ((root / "backends").is_dir() and (root / "pyproject.toml").is_file()):
        raise MisuseError(f"--in-tree wants a checkout, and titans_backends runs from {root}; leave --in-tree out, for a project of its own")
    return root

"""What was typed, as a command to type again."""

from __future__ import annotations

import shlex
from collections.abc import Collection

import typer

__all__ = ["typed_again"]


def typed_again(ctx: typer.Context, without: Collection[str] = ()) -> str:
    """The command with the options that were typed, in the order of its help; `without` leaves out parameters by name."""
    words = ["titans-backends", ctx.command.name or ""]
    for option in ctx.command.params:
        source = None if option.name is None else ctx.get_parameter_source(option.name)
        if option.name is None or source is None or source.name != "COMMANDLINE" or option.name in without:
            continue
        value = ctx.params[option.name]
        if isinstance(value, bool):
            words.append((option.opts if value else option.secondary_opts)[0])
            continue
        for one in value if isinstance(value, (list, tuple)) else [value]:
            words += [option.opts[0], f"{one:g}" if isinstance(one, float) else str(one)]
    return shlex.join(words)

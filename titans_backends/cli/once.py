"""An option that takes one value is given once: of two values the parser would keep the last and say nothing. The same for every verb, present and to come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand

from titans_backends.cli.failures import MisuseError

__all__ = ["Commands"]

Verb = TypeVar("Verb", bound=Callable[..., Any])


class Commands(typer.Typer):
    """Verbs whose options are given once; options of several values (`list[str]`) and plain flags, of which two say what one says, may be repeated."""

    def command(self, name: str | None = None, **more: Any) -> Callable[[Verb], Verb]:
        """As typer's."""
        return super().command(name, **{"cls": _Command, **more})


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """MisuseError for an option that came twice; else as every command's."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        if not ctx.resilient_parsing and not any(parameter.is_eager for parameter in order):  # completing a word, or asking for help
            _expect_once(order)
        return super().parse_args(ctx, args)


def _expect_once(order: list[Any]) -> None:
    """`order`: the parameters as they were typed, each as often as it was."""
    given = Counter(id(parameter) for parameter in order)
    for parameter in order:
        times, repeatable = given[id(parameter)], getattr(parameter, "multiple", True)  # an argument has no `multiple`, and stands in `order` once
        if times < 2 or repeatable:
            continue
        if parameter.is_flag and not parameter.secondary_opts:
            continue
        names = "/".join([*parameter.opts[:1], *parameter.secondary_opts[:1]])
        once = " or ".join([*parameter.opts[:1], *parameter.secondary_opts[:1]]) if parameter.is_flag else f"{names} {parameter.metavar or 'VALUE'}"
        raise MisuseError(f"{names} was given {times} times and takes one value; type it once: {once}")

"""`ops`: what there is to call, or one op's contract in full. Everything shown is read from the contracts' tables and docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from titans_backends import registry
from titans_backends.buckets import defaults_of
from titans_backends.cli.show import Column, Group, Json, console, facts, heading, print_json, say, table
from titans_backends.contracts import CONTRACTS, contract
from titans_backends.contracts.contract import Argument, Contract, Option
from titans_backends.contracts.letters import letters_of

__all__ = ["ops"]

_ROLES = {
    "operand": "the operands' dtype",
    "gate": "the operands' dtype or float32",
    "state": "float32; float64 with float64 operands",
    "index": "int32 or int64",
}


def ops(
    name: Annotated[str | None, typer.Argument(help="One op, in full.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """List the ops, or show one op's contract: arguments, options, outputs, formula, and what a measurement of it depends on."""
    if name is None:
        rows = [_row(op) for op in CONTRACTS.values()]
        if as_json:
            print_json(rows)
        else:
            _show_all(console(), rows)
        return
    op = contract(name)
    if as_json:
        print_json(_whole(op))
    else:
        _show_one(console(), op)


def _backends(op: Contract) -> list[str]:
    return sorted(backend.name for backend in registry.known().values() if op.name in backend.ops)


def _signature(op: Contract) -> str:
    """As one would type it: names and defaults, without types."""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(op.make_call).parameters.values()]
    outputs = ", ".join(o.name if o.when is None else f"{o.name} or None" for o in op.outputs)
    return f"{op.name}{inspect.Signature(bare)} -> ({outputs})"


def _row(op: Contract) -> dict[str, Json]:
    return {"name": op.name, "summary": op.summary, "signature": _signature(op), "backends": _backends(op)}


def _show_all(out: Console, rows: list[dict[str, Json]]) -> None:
    columns = (Column("op", style="bold"), Column("computes", flexible=True), Column("backends", flexible=True))
    cells = [[str(row["name"]), str(row["summary"]), ", ".join(_strings(row["backends"]))] for row in rows]
    table(out, columns, [Group("", cells)])
    out.print()
    facts(
        out, [("one op in full", "titans-backends ops gated_delta_rule"), ("which kernel runs", "titans-backends explain gated_delta_rule")], indent=0
    )


def _strings(value: Json) -> list[str]:
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else []


def _documentation(op: Contract) -> str:
    """The docstring of the op's file, which holds the formula."""
    return inspect.cleandoc(sys.modules[op.make_call.__module__].__doc__ or op.summary)


def _argument(argument: Argument, op: Contract) -> dict[str, Json]:
    return {
        "name": argument.name,
        "layouts": list(argument.dims),
        "dtype": _ROLES[argument.role],
        "optional": argument.optional,
        "differentiable": argument.name in op.differentiable,
    }


def _option(option: Option) -> dict[str, Json]:
    return {"name": option.name, "default": option.default, "accepts": _accepts(option), "in_key": option.in_key}


def _accepts(option: Option) -> str:
    if option.choices:
        said = " or ".join(option.choices)
    else:
        said = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}[option.kind]
        said += f" from {option.minimum} on" if option.minimum is not None else ""
    return f"{said}, or None" if option.nullable else said


def _whole(op: Contract) -> dict[str, Json]:
    return {
        **_row(op),
        "documentation": _documentation(op),
        "arguments": [_argument(argument, op) for argument in op.arguments],
        "options": [_option(option) for option in op.options],
        "outputs": [{field.name: getattr(output, field.name) for field in dataclasses.fields(output)} for output in op.outputs],
        "letters": {**letters_of(op)},
        "key": {name: list(value) if isinstance(value, tuple) else value for name, value in defaults_of(op.name).items()},
        "seq_len": op.seq_len_is,
    }


def _show_one(out: Console, op: Contract) -> None:
    say(out, Text.assemble((op.name, "bold"), f": {op.summary}"))
    out.print()
    say(out, _signature(op))
    heading(out, "arguments")
    columns = [Column("name"), Column("layout", flexible=True), Column("dtype", flexible=True), Column(""), Column("gradient")]
    rows = [_argument_cells(argument, op) for argument in op.arguments]
    table(out, columns, [Group("", rows)])
    if op.options:
        heading(out, "options")
        columns = [Column("name"), Column("default"), Column("accepts", flexible=True), Column("in the key")]
        table(out, columns, [Group("", [[o.name, str(o.default), _accepts(o), "yes" if o.in_key else ""] for o in op.options])])
    heading(out, "outputs")
    columns = [Column("name"), Column("layout"), Column("dtype"), Column("asked for by", flexible=True)]
    outputs = [[o.name, _layout(o.dims), f"as {o.like}" if o.like else "float32 or float64", f"{o.when}=True" if o.when else ""] for o in op.outputs]
    table(out, columns, [Group("", outputs)])
    heading(out, "letters")
    facts(out, [(letter.replace("*", "..."), meaning) for letter, meaning in letters_of(op).items()])
    heading(out, "formula")
    say(out, _documentation(op))
    heading(out, "tuned by")
    fields = ", ".join(name if value is None else f"{name} ({value})" for name, value in defaults_of(op.name).items())
    facts(out, [("seq_len", op.seq_len_is), ("key", fields), ("backends", ", ".join(_backends(op)) or "none")])


def _argument_cells(argument: Argument, op: Contract) -> list[str]:
    layouts = " or ".join(map(_layout, argument.dims))
    return [
        argument.name,
        layouts,
        _ROLES[argument.role],
        "optional" if argument.optional else "",
        "yes" if argument.name in op.differentiable else "",
    ]


def _layout(dims: str) -> str:
    return f"[{', '.join(dims.replace('*', '...').split())}]"

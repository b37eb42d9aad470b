"""An op's torch schema: a call's fields in order, as the registered op takes them, and back. A tensor that may also be a number is two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from torch import Tensor

from titans_backends.contracts.contract import Call, Contract

__all__ = ["flatten", "schema_of", "unflatten"]


def schema_of(op: Contract, *, mutates: tuple[str, ...] = ()) -> list[str]:
    """The schema of each field; a tensor that may also be a number is two."""
    alias = dict(zip(mutates, "abcdefgh", strict=False))
    parts: list[str] = []
    for field in fields(op.make_call):  # type: ignore[arg-type]  # a dataclass by contract
        argument, option = op.argument_by_name.get(field.name), op.option_by_name.get(field.name)
        if argument is not None:
            kind = f"Tensor({alias[field.name]}!)" if field.name in alias else "Tensor?" if argument.optional else "Tensor"
            parts.append(f"{kind} {field.name}")
            if argument.fill == "mixing":
                parts.append(f"float {field.name}_number")
        elif option is not None:
            kind = {"int": "SymInt" if option.name in ("chunk_offset", "block_offset") else "int"}.get(option.kind, option.kind)
            parts.append(f"{kind}{'?' if option.nullable else ''} {field.name}")
    return parts


def flatten(op: Contract, values: Sequence[object], *, in_place: bool = False) -> list[object]:
    """A call's field values as the schema wants them; that of the op in place has no `inplace`."""
    flat: list[object] = []
    for name, value in zip(op.parameters, values, strict=True):
        if in_place and name == "inplace":
            continue
        argument = op.argument_by_name.get(name)
        if argument is not None and argument.fill == "mixing":
            flat += (value, 0.0) if isinstance(value, Tensor) else (None, value)
        else:
            flat.append(value)
    return flat


def unflatten(op: Contract, flat: Sequence[object], *, in_place: bool = False) -> Call:
    """The call of a schema's arguments."""
    given: dict[str, object] = {}
    rest = iter(flat)
    for name in op.parameters:
        if in_place and name == "inplace":
            given[name] = True
            continue
        value = next(rest)
        argument = op.argument_by_name.get(name)
        if argument is not None and argument.fill == "mixing":
            number = next(rest)
            value = number if value is None else value
        given[name] = value
    return op.make_call(**given)

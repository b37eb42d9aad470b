"""The skeleton that both cache files share, read and written: schema, device, environments, then op, `when`, seq_len.

What stands at a seq_len is the caller's: one entry in the table, a list of measurements in the timings. A field of `when` that equals
its op's default is never written, and dropped where a person wrote it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

from titans_backends.cache import emit
from titans_backends.cache.nodes import Cursor, SchemaError, compose
from titans_backends.cache.schema import ALWAYS, SCHEMA, Bucket, DefaultsOf, Device, Environment, Params, When, WhenValue, canonical_when, full_when

__all__ = [
    "Document",
    "ForeignDevice",
    "FutureSchema",
    "OtherFile",
    "dump_document",
    "dump_params",
    "dump_when",
    "parse_document",
    "parse_params",
    "parse_when",
]

Cell = TypeVar("Cell")
_NUMBERS = {"sm", "sms", "threads"}


class FutureSchema(SchemaError):
    """A file of a later version of this library."""


class ForeignDevice(SchemaError):
    """A file that was measured on another device."""


class OtherFile(SchemaError):
    """A file of this library's that is no table."""


@dataclass(frozen=True, slots=True)
class Document(Generic[Cell]):
    """A file's content, with one cell per bucket."""

    device: Device
    environments: Mapping[str, Environment]
    cells: Mapping[Bucket, Cell]


def parse_document(
    text: str, origin: str, defaults_of: DefaultsOf, cell: Callable[[Cursor, Mapping[str, Environment]], Cell], expected: Device | None
) -> Document[Cell]:
    """The content of a file; SchemaError names `origin` and line; FutureSchema, OtherFile and ForeignDevice come before the rows are looked at."""
    root = compose(text, origin)
    _check_schema(root)
    if any(key.node.value == "problems" for key, _ in root.mapping()):
        raise OtherFile(
            f"{origin}: the problems of a model, not a tuned table, which `titans-backends tune --from {shlex.quote(origin)}` makes of them"
        )
    top = root.fields(("schema", "device", "environments", "ops"), required=("schema", "device", "environments", "ops"))
    device = _device(top["device"])
    if expected is not None and not device.same(expected):
        message = f"measured on {device.kind} {device.slug}, this machine is {expected.kind} {expected.slug}"
        raise ForeignDevice(str(top["device"].error(message)))
    environments = {key.text(): _environment(value) for key, value in top["environments"].mapping()}
    cells: dict[Bucket, Cell] = {}
    for op, rows in top["ops"].mapping():
        defaults = _defaults(op.text(), defaults_of)
        for row in rows.items():
            parts = row.fields(("when", "by_seq_len"), required=("when", "by_seq_len"))
            when = parse_when(parts["when"], defaults)
            for key, value in parts["by_seq_len"].mapping():
                bucket = Bucket(op.text(), when, key.integer(1))
                if bucket in cells:
                    raise key.error(f"{bucket.op} has this `when` with seq_len {bucket.seq_len} twice")
                cells[bucket] = cell(value, environments)
    return Document(device, environments, cells)


def dump_document(header: Iterable[str], document: Document[list[str]], defaults_of: DefaultsOf) -> str:
    """The text of a file, sorted; a cell is what follows its seq_len: one line, or a list of them."""
    lines = [f"# {line}" for line in header]
    lines += [f"schema: {SCHEMA}", f"device: {_flat(document.device)}"]
    letters = sorted(document.environments, key=lambda letter: (len(letter), letter))
    lines.append("environments:" if letters else "environments: {}")
    lines += [f"  {emit.scalar(letter)}: {_flat(document.environments[letter])}" for letter in letters]
    lines.append("ops:" if document.cells else "ops: {}")
    last_op = None
    for (op, when), by_seq_len in sorted(_grouped(document.cells).items(), key=lambda row: _order(row[0][0], row[0][1], defaults_of)):
        if op != last_op:
            lines.append(f"  {emit.scalar(op)}:")
            last_op = op
        lines += [f"    - when: {dump_when(when)}", "      by_seq_len:"]
        for seq_len, (first, *more) in sorted(by_seq_len.items()):
            lines += [f"        {seq_len}:{first}", *more]
    return "\n".join(lines) + "\n"


def parse_params(cursor: Cursor) -> Params:
    """A candidate's parameters, in the order of the file."""
    params = []
    for key, value in cursor.mapping():
        scalar = value.scalar()
        if scalar is None:
            raise value.error("a parameter must be text, a number, true or false, found nothing")
        params.append((key.text(), scalar))
    return tuple(params)


def dump_params(params: Params) -> str:
    """A candidate's parameters as a flow mapping."""
    return emit.flow_mapping((key, emit.scalar(value)) for key, value in params)


def _check_schema(root: Cursor) -> None:
    for key, value in root.mapping():
        if key.scalar() == "schema":
            schema = value.integer(1)
            if schema > SCHEMA:
                raise FutureSchema(str(value.error(f"schema {schema}, this version reads schema {SCHEMA}")))
            return
    raise root.error("schema missing")


def _device(cursor: Cursor) -> Device:
    found = cursor.fields([field.name for field in fields(Device)], required=("kind", "slug", "name"))
    text = {name: value.text() for name, value in found.items() if name not in _NUMBERS}
    numbers = {name: value.integer(0) for name, value in found.items() if name in _NUMBERS}
    return Device(text["kind"], text["slug"], text["name"], numbers.get("sm"), numbers.get("sms"), numbers.get("threads"), text.get("isa"))


def _environment(cursor: Cursor) -> Environment:
    found = cursor.fields([field.name for field in fields(Environment)], required=("titans_backends", "torch"))
    return Environment(**{name: value.text() for name, value in found.items()})


def _flat(facts: Device | Environment) -> str:
    pairs = ((field.name, getattr(facts, field.name)) for field in fields(facts))
    return emit.flow_mapping((name, emit.scalar(value)) for name, value in pairs if value is not None)


def _defaults(op: str, defaults_of: DefaultsOf) -> Mapping[str, WhenValue] | None:
    try:
        return defaults_of(op)
    except KeyError:  # an op of a later version: its rows are carried along as they are
        return None


def parse_when(cursor: Cursor, defaults: Mapping[str, WhenValue] | None) -> When:
    """A key in its canonical form; without defaults, of an op that this version does not know, as it stands."""
    given = {}
    for key, value in cursor.mapping():
        name = key.text()
        if defaults is not None and name not in defaults and name not in ALWAYS:
            raise key.error(f"unknown field {name!r}; known here: {', '.join(sorted({*defaults, *ALWAYS}))}")
        given[name] = value.integer(1) if name == "streams" else _when_value(value)
    missing = [name for name in ALWAYS if defaults is not None and name not in defaults and name not in given]
    if missing:
        raise cursor.error(f"{', '.join(missing)} missing")
    return canonical_when(given, defaults or {})


def _when_value(cursor: Cursor) -> WhenValue:
    if cursor.is_list:
        return tuple(element.integer(-(2**63)) for element in cursor.items())
    value = cursor.scalar()
    if value != value:
        raise cursor.error("a field of `when` cannot be .nan")
    return value


def dump_when(when: When) -> str:
    """A key as a flow mapping."""
    return emit.flow_mapping((name, emit.flow_list(value) if isinstance(value, tuple) else emit.scalar(value)) for name, value in when)


def _grouped(cells: Mapping[Bucket, Cell]) -> dict[tuple[str, When], dict[int, Cell]]:
    groups: dict[tuple[str, When], dict[int, Cell]] = {}
    for bucket, cell in cells.items():
        groups.setdefault((bucket.op, bucket.when), {})[bucket.seq_len] = cell
    return groups


def _order(op: str, when: When, defaults_of: DefaultsOf) -> tuple[object, ...]:
    """Sorts by the full key, and values of different types as null, numbers and flags, text, lists. ValueError unless canonical."""
    defaults = _defaults(op, defaults_of) or {}
    if when != canonical_when(when, defaults):
        raise ValueError(f"a key of {op} is not canonical (see canonical_when): {dump_when(when)}")
    return (op, tuple((name, _rank(value), () if value is None else value) for name, value in full_when(when, defaults)))


def _rank(value: WhenValue) -> int:
    if value is None:
        return 0
    return 1 if isinstance(value, (bool, int, float)) else 2 if isinstance(value, str) else 3

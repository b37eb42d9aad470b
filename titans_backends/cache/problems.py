"""The file of problems that a model met, as `record` writes it and `tune --from` reads it: one line per problem, sorted, counts last.

A problem is a bucket with the sizes that it was met in and the kind of device; `saves` is never part of it, since the tuner writes the rows of both from
one measurement. Nothing here decides what a problem is worth.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from titans_backends.cache import emit
from titans_backends.cache.document import FutureSchema, dump_when, parse_when
from titans_backends.cache.nodes import Cursor, SchemaError, compose
from titans_backends.cache.schema import Bucket, DefaultsOf, WhenValue

__all__ = ["SCHEMA", "Count", "Met", "Problem", "Problems", "dump_problems", "merge_problems", "parse_problems"]

SCHEMA = 1
"""The file format that this version writes; it reads this one and none above."""

_HEADER = (
    "titans_backends: the problems that a model met. Written by `titans_backends.record`, read by `titans-backends tune --from`.",
    "forward, backward: how often each ran. when, seq_len: the row of a tuned table that speaks for it. T: tokens of a row; N: sequences.",
)
_WANTED = 'What is wanted here is written by: with titans_backends.record("shapes.yaml"): model(batch)'
_FIELDS = ("op", "device", "seq_len", "when", "sizes", "batch_invariant", "forward", "backward")
_REQUIRED = ("op", "device", "seq_len", "when", "sizes", "forward")
_SIZES = ("B", "T", "N", "G", "H")
_MATRICES = ("C", "matrices")
_DTYPES = ("bfloat16", "float16", "float32", "float64")
_CLOSED: Mapping[str, tuple[str, ...]] = {
    "dtype": _DTYPES,
    "regime": ("inference", "training"),
    "launch": ("eager", "graph"),
    "saves": ("any", "inputs"),
    "float32": ("highest", "high", "medium"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """What was computed: a bucket, the sizes behind it and the kind of device. `batch_invariant`: under that policy, for which no table is asked."""

    bucket: Bucket
    sizes: tuple[tuple[str, int], ...]
    device: str
    batch_invariant: bool = False


@dataclass(frozen=True, slots=True)
class Count:
    """How often each direction ran."""

    forward: int = 0
    backward: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.forward + other.forward, self.backward + other.backward)


Problems = Mapping[Problem, Count]


@dataclass(frozen=True, slots=True)
class Met:
    """One line of a file, with the place to complain about."""

    problem: Problem
    count: Count
    cursor: Cursor

    def error(self, message: str) -> SchemaError:
        """A SchemaError that names file and line."""
        return self.cursor.error(message)


def merge_problems(older: Problems, newer: Problems) -> dict[Problem, Count]:
    """Both sets, the counts added where both have a problem."""
    merged = dict(older)
    for problem, count in newer.items():
        merged[problem] = merged.get(problem, Count()) + count
    return merged


def parse_problems(text: str, origin: str, defaults_of: DefaultsOf) -> tuple[Met, ...]:
    """The lines of a file; SchemaError names `origin` and line, what was found and what is accepted."""
    root = _recording(text, origin)
    top = root.fields(("schema", "problems"), required=("schema", "problems"))
    schema = top["schema"].integer(1)
    if schema > SCHEMA:
        raise FutureSchema(str(top["schema"].error(f"schema {schema}, this version reads schema {SCHEMA}")))
    found: dict[Problem, Met] = {}
    for item in top["problems"].items():
        met = _met(item, defaults_of)
        if met.problem in found:
            raise item.error(f"this problem stands here twice, first in line {found[met.problem].cursor.line}; add the counts and leave one")
        found[met.problem] = met
    return tuple(found.values())


def _recording(text: str, origin: str) -> Cursor:
    """The root of the file; SchemaError says what it is where it is no recording, and how one is made."""
    try:
        root = compose(text, origin)
        names = [str(key.node.value) for key, _ in root.mapping()]
    except SchemaError as error:
        raise error if "problems:" in text else SchemaError(f"{error}. {_WANTED}") from error
    if "problems" in names:
        return root
    if not {"device", "ops"} <= set(names):
        has = f"its fields are {', '.join(names[:4])}" if names else "it has no fields"
        raise SchemaError(f"{origin}: not the problems of a model: {has}. {_WANTED}")
    if origin.endswith(".timings.yaml"):
        raise SchemaError(f"{origin}: the timings of a tuned table, not the problems of a model. {_WANTED}")
    shown = shlex.quote(origin)
    raise SchemaError(
        f"{origin}: a tuned table, not the problems of a model. To see it: titans-backends cache show {shown}. "
        f"To choose by it: export TITANS_BACKENDS_CACHE={shown}. {_WANTED}"
    )


def dump_problems(problems: Problems, defaults_of: DefaultsOf) -> str:
    """The text of a file, sorted by op, device, key, length and sizes."""
    lines = [f"# {line}" for line in _HEADER]
    lines += [f"schema: {SCHEMA}", "problems:" if problems else "problems: []"]
    told = {problem: _line(problem, problems[problem], defaults_of) for problem in problems}
    ordered = sorted(problems, key=lambda one: (one.bucket.op, one.device, dump_when(one.bucket.when), one.bucket.seq_len, one.sizes, told[one]))
    return "\n".join([*lines, *(f"  - {told[problem]}" for problem in ordered)]) + "\n"


def _line(problem: Problem, count: Count, defaults_of: DefaultsOf) -> str:
    bucket = problem.bucket
    fields = [
        ("op", emit.scalar(bucket.op)),
        ("device", emit.scalar(problem.device)),
        ("seq_len", str(bucket.seq_len)),
        ("when", dump_when(bucket.when)),
        ("sizes", emit.flow_mapping((name, str(size)) for name, size in problem.sizes)),
        ("batch_invariant", "true" if problem.batch_invariant else ""),
        ("forward", str(count.forward)),
        ("backward", str(count.backward) if count.backward else ""),
    ]
    return emit.flow_mapping((name, text) for name, text in fields if text)


def _met(cursor: Cursor, defaults_of: DefaultsOf) -> Met:
    found = cursor.fields(_FIELDS, required=_REQUIRED)
    op = found["op"].text()
    try:
        defaults = defaults_of(op)
    except KeyError:
        defaults = None
    if defaults is None:
        raise found["op"].error(f"unknown op {op!r}; see: titans-backends ops")
    when = parse_when(found["when"], defaults)
    _check_when(found["when"], defaults)
    bucket = Bucket(op, when, found["seq_len"].integer(1))
    sizes = _sizes(found["sizes"], _MATRICES if op == "fused_uw" else _SIZES)
    _check_sizes(found["sizes"], bucket, {**defaults, **dict(when)}, dict(sizes))
    invariant = found["batch_invariant"].flag() if "batch_invariant" in found else False
    count = Count(found["forward"].integer(0), found["backward"].integer(0) if "backward" in found else 0)
    if not count.forward and not count.backward:
        raise found["forward"].error("it ran neither forward nor backward; leave the line out")
    return Met(Problem(bucket, sizes, found["device"].text(), invariant), count, cursor)


def _sizes(cursor: Cursor, names: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    found = cursor.fields(names, required=names)
    return tuple((name, found[name].integer(1)) for name in names)


def _check_when(cursor: Cursor, defaults: Mapping[str, WhenValue]) -> None:
    """A field whose value is of a kind that no call has."""
    for key, value in cursor.mapping():
        name = key.text()
        if name in _CLOSED:
            value.choice(_CLOSED[name])
        elif name == "head_dim":
            if not value.is_list or len(value.items()) != 2 or any(size.integer(1) < 1 for size in value.items()):
                raise value.error(f"head_dim must be two sizes, [K, V], found {value.found}")
        elif name == "group":
            value.integer(1)
        elif isinstance(defaults.get(name), bool):
            value.flag()


def _check_sizes(cursor: Cursor, bucket: Bucket, when: Mapping[str, WhenValue], sizes: Mapping[str, int]) -> None:
    """Sizes that are not those of the key beside them."""
    if bucket.op == "fused_uw":
        told = {"seq_len": (bucket.seq_len, sizes["C"] * sizes["matrices"]), "chunk_size": (when["chunk_size"], sizes["C"])}
    else:
        length = round(sizes["T"] / sizes["N"]) if when["packed"] else sizes["T"]
        told = {"seq_len": (bucket.seq_len, max(1, length)), "streams": (when["streams"], sizes["N"] * sizes["H"])}
        told["group"] = (when["group"], sizes["H"] // sizes["G"])
        if not when["packed"] and sizes["N"] != sizes["B"]:
            raise cursor.error(f"N = {sizes['N']} sequences in B = {sizes['B']} rows are packed, but `when` does not say packed: true")
    for name, (stated, given) in told.items():
        if stated != given:
            raise cursor.error(f"these sizes make {name} {given}, but it says {name} {stated}")

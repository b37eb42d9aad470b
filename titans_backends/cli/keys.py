"""How a bucket is written for people and for `--json`: what is always worth saying first, then every field that is not the default."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.text import Text

from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache.schema import full_when
from titans_backends.cli.show import Json
from titans_backends.reporting.place import dims_text, field_text

__all__ = ["by_key", "key_json", "key_text", "key_title", "place"]

Row = TypeVar("Row")

_FIRST = ("regime", "launch", "dtype", "streams", "group", "head_dim")


def key_text(bucket: Bucket) -> str:
    """A key but its op and length: `inference · float32 · 12 streams · head_dim 32 · g`."""
    try:
        given = dict(full_when(bucket.when, defaults_of(bucket.op)))
        default = defaults_of(bucket.op)
    except KeyError:  # an op of a later version: its row is carried along as it stands
        given, default = dict(bucket.when), {}
    parts = [str(given.get("regime", "inference"))]
    if given.get("launch", "eager") != "eager":
        parts.append(f"{given['launch']} launch")
    parts.append(str(given.get("dtype")))
    if bucket.op != "fused_uw":
        streams = given.get("streams")
        parts.append(f"{streams} stream{'s' * (streams != 1)}")
    if given.get("group", 1) != 1:
        parts.append(f"group {given['group']}")
    parts.append(f"head_dim {dims_text(given.get('head_dim'))}")
    parts += [field_text(name, value) for name, value in given.items() if name not in _FIRST and value != default.get(name, _ABSENT)]
    return " · ".join(parts)


_ABSENT = object()


def key_title(bucket: Bucket) -> Text:
    """The op in bold, then its key."""
    return Text.assemble((bucket.op, "bold"), "  ", (key_text(bucket), "dim"))


def place(bucket: Bucket) -> str:
    """One bucket on one line."""
    return f"{bucket.op} {key_text(bucket)} · seq_len {bucket.seq_len}"


def key_json(bucket: Bucket) -> dict[str, Json]:
    """Op, length, and every field of the key, defaults filled in."""
    try:
        when = full_when(bucket.when, defaults_of(bucket.op))
    except KeyError:  # as above
        when = bucket.when
    return {
        "op": bucket.op,
        "seq_len": bucket.seq_len,
        "when": {name: list(value) if isinstance(value, tuple) else value for name, value in when},
    }


def by_key(rows: Iterable[tuple[Bucket, Row]]) -> list[tuple[Bucket, list[tuple[Bucket, Row]]]]:
    """Rows that differ in length only, together and by length, in the order of their first; with the first's bucket."""
    groups: dict[tuple[str, object], list[tuple[Bucket, Row]]] = {}
    for bucket, row in rows:
        groups.setdefault((bucket.op, bucket.when), []).append((bucket, row))
    return [(found[0][0], sorted(found, key=lambda pair: pair[0].seq_len)) for found in groups.values()]

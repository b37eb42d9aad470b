"""What the tuner and its children say to each other: one JSON object a line, and how buckets, candidates and machines are written in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import cast

from titans_backends.backend import Candidate, Param
from titans_backends.buckets import Bucket, WhenValue
from titans_backends.machine import Machine

__all__ = ["Message", "bucket_from", "bucket_to", "candidate_from", "candidate_to", "dump", "load", "machine_from", "machine_to"]

Message = Mapping[str, object]


def dump(message: Message) -> bytes:
    """One line."""
    return json.dumps(message).encode() + b"\n"


def load(line: bytes) -> dict[str, object]:
    """A line's object; ValueError for anything else."""
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError(f"not an object: {line[:80]!r}")
    return found


def bucket_to(bucket: Bucket) -> Message:
    """A bucket as plain data."""
    when = [[name, list(value) if isinstance(value, tuple) else value] for name, value in bucket.when]
    return {"op": bucket.op, "when": when, "seq_len": bucket.seq_len}


def bucket_from(data: object) -> Bucket:
    """The bucket again."""
    given = cast(dict[str, object], data)
    when = cast(list[tuple[str, object]], given["when"])
    fields = tuple((name, cast(WhenValue, tuple(value) if isinstance(value, list) else value)) for name, value in when)
    return Bucket(cast(str, given["op"]), fields, cast(int, given["seq_len"]))


def candidate_to(candidate: Candidate) -> Message:
    """A candidate as plain data."""
    return asdict(candidate)


def candidate_from(data: object) -> Candidate:
    """The candidate again."""
    given = dict(cast(dict[str, object], data))
    params = cast(list[tuple[str, Param]], given.pop("params"))
    sources = cast(list[str], given.pop("sources"))
    return Candidate(**given, params=tuple((name, value) for name, value in params), sources=tuple(sources))  # type: ignore[arg-type]


def machine_to(machine: Machine) -> Message:
    """A machine's facts as plain data."""
    return asdict(machine)


def machine_from(data: object) -> Machine:
    """The machine again."""
    return Machine(**cast(dict[str, object], data))  # type: ignore[arg-type]

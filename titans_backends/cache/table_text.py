"""The table of winners as YAML text: one line per bucket, sorted, byte-identical when it is read and written again.

What a person added in comments is not kept.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import cast

from titans_backends.cache import emit
from titans_backends.cache.document import Document, dump_document, dump_params, parse_document, parse_params
from titans_backends.cache.nodes import Cursor
from titans_backends.cache.schema import OBJECTIVES, DefaultsOf, Device, Entry, Environment, Objective, Table

__all__ = ["dump_table", "parse_table"]

_HEADER = (
    "titans_backends: which candidate runs where, as measured. Written by `titans-backends tune`, read by every call.",
    "use: the winner; next: the runner-up. us, next_us: medians in microseconds; spread: half-width of the 95 % interval / median.",
    "peak_mib: peak memory beyond the inputs in MiB; source: hash of the winner's code. A field left out of `when` has its op's default.",
    "until: the next longer row's length, and up to which length this row speaks for a call between the two; without it the nearer one does.",
)
_FIELDS = (
    "use",
    "params",
    "backward",
    "backward_params",
    "saves_states",
    "us",
    "spread",
    "peak_mib",
    "next",
    "next_us",
    "doubt",
    "objective",
    "max_memory_mib",
    "until",
    "env",
    "source",
)
_REQUIRED = ("use", "us", "spread", "peak_mib", "env")


def parse_table(text: str, origin: str, defaults_of: DefaultsOf, expected: Device | None = None) -> Table:
    """A table from its text; SchemaError names `origin` and line, ForeignDevice where it is not the `expected` device's."""
    document = parse_document(text, origin, defaults_of, _parse_entry, expected)
    return Table(document.device, document.environments, document.cells)


def dump_table(table: Table, defaults_of: DefaultsOf) -> str:
    """The text of a table."""
    cells = {bucket: [f" {_dump_entry(entry, repr((entry.params, entry.backward_params)))}"] for bucket, entry in table.rows.items()}
    return dump_document(_HEADER, Document(table.device, table.environments, cells), defaults_of)


def _parse_entry(cursor: Cursor, environments: Mapping[str, Environment]) -> Entry:
    found = cursor.fields(_FIELDS, required=_REQUIRED)
    return Entry(
        use=found["use"].candidate(),
        us=found["us"].quantity(),
        spread=found["spread"].quantity(),
        peak_mib=found["peak_mib"].quantity(),
        params=parse_params(found["params"]) if "params" in found else (),
        backward=found["backward"].candidate() if "backward" in found else None,
        backward_params=parse_params(found["backward_params"]) if "backward_params" in found else (),
        saves_states=found["saves_states"].flag() if "saves_states" in found else False,
        next=found["next"].text() if "next" in found else None,
        next_us=found["next_us"].quantity() if "next_us" in found else None,
        doubt=found["doubt"].quantity() if "doubt" in found else None,
        objective=cast(Objective, found["objective"].choice(OBJECTIVES)) if "objective" in found else "time",
        max_memory_mib=found["max_memory_mib"].quantity() if "max_memory_mib" in found else None,
        until=_parse_until(found["until"]) if "until" in found else None,
        env=found["env"].choice(environments),
        source=found["source"].text() if "source" in found else "",
    )


def _parse_until(cursor: Cursor) -> tuple[int, int]:
    """`[2048, 1180]`: towards the row at 2048, up to 1180."""
    found = [item.integer(1) for item in cursor.items()]
    if len(found) != 2 or found[1] >= found[0]:
        raise cursor.error("until must be two lengths, that of the next longer row and a shorter one up to which this row speaks: [2048, 1180]")
    return found[0], found[1]


@functools.lru_cache(maxsize=8192)  # of a large table a tuner changes one row at a time
def _dump_entry(entry: Entry, _params: str) -> str:
    """One line; `_params` tells entries apart that are equal but not alike: 1, 1.0 and True."""
    fields = [
        ("use", emit.scalar(entry.use)),
        ("params", dump_params(entry.params) if entry.params else ""),
        ("backward", emit.scalar(entry.backward) if entry.backward is not None else ""),
        ("backward_params", dump_params(entry.backward_params) if entry.backward_params else ""),
        ("saves_states", "true" if entry.saves_states else ""),
        ("us", emit.scalar(entry.us)),
        ("spread", emit.scalar(entry.spread)),
        ("peak_mib", emit.scalar(entry.peak_mib)),
        ("next", emit.scalar(entry.next) if entry.next is not None else ""),
        ("next_us", emit.scalar(entry.next_us) if entry.next_us is not None else ""),
        ("doubt", emit.scalar(entry.doubt) if entry.doubt is not None else ""),
        ("objective", entry.objective if entry.objective != "time" else ""),
        ("max_memory_mib", emit.scalar(entry.max_memory_mib) if entry.max_memory_mib is not None else ""),
        ("until", emit.flow_list(entry.until) if entry.until is not None else ""),
        ("env", emit.scalar(entry.env)),
        ("source", emit.scalar(entry.source) if entry.source else ""),
    ]
    return emit.flow_mapping((name, text) for name, text in fields if text)

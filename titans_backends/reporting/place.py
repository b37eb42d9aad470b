"""Where a bucket stands, in words: what of its key is a setting, what a size, and what a place on a chart's axis."""

from __future__ import annotations

from dataclasses import dataclass

from titans_backends.buckets import Bucket, WhenValue, defaults_of
from titans_backends.cache.schema import full_when

__all__ = ["Place", "dims_text", "field_text", "place_of"]

_SAID_FIRST = ("regime", "launch", "dtype", "streams", "group", "head_dim", "seq_len")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a bucket stands: `setting` is everything of its key but sizes, `size` its streams and heads' size, `streams × head_dim`."""

    op: str
    regime: str
    launch: str
    dtype: str
    options: tuple[str, ...]
    size: str
    streams: int
    seq_len: int

    @property
    def setting(self) -> str:
        """For people: `inference · graph · bfloat16 · g`. Training is measured as it is called, eagerly, unless its key says otherwise."""
        return " · ".join([self.regime, *([self.launch] if self.regime == "inference" or self.launch != "eager" else []), self.dtype, *self.options])

    @property
    def line(self) -> tuple[str, str, str]:
        """What a curve over sequence lengths has in common."""
        return self.op, self.setting, self.size


def place_of(bucket: Bucket) -> Place:
    """Where a bucket stands, for people."""
    try:
        defaults = defaults_of(bucket.op)
    except KeyError:  # an op of a later version
        defaults = {}
    given = dict(full_when(bucket.when, defaults))
    options = tuple(field_text(name, value) for name, value in given.items() if name not in _SAID_FIRST and value != defaults.get(name, _ABSENT))
    streams = given.get("streams")
    count = streams if isinstance(streams, int) else 1
    sizes = [dims_text(given.get("head_dim")) if bucket.op == "fused_uw" else f"{count} × {dims_text(given.get('head_dim'))}"]
    if given.get("group", 1) != 1:
        sizes.append(f"group {given['group']}")
    regime, launch, dtype = (str(given.get(name, default)) for name, default in (("regime", "inference"), ("launch", "eager"), ("dtype", "")))
    return Place(bucket.op, regime, launch, dtype, options, ", ".join(sizes), count, bucket.seq_len)


_ABSENT = object()


def field_text(name: str, value: WhenValue) -> str:
    """A field of a key: `g`, `no delta`, `chunk_size=64`."""
    return name if value is True else f"no {name}" if value is False else f"{name}={value}"


def dims_text(value: WhenValue) -> str:
    """head_dim: `128`, or `128x64` for K = 128 and V = 64."""
    if not isinstance(value, tuple) or len(value) != 2:
        return str(value)
    return str(value[0]) if value[0] == value[1] else f"{value[0]}x{value[1]}"

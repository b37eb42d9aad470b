"""`tune --doubtful`: the rows of a table whose choice its measurements leave open, and the words that cannot stand beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from titans_backends.buckets import Bucket
from titans_backends.cache.paths import timings_path
from titans_backends.cli.failures import MisuseError
from titans_backends.machine import Machine
from titans_backends.tuning.doubt import doubtful
from titans_backends.tuning.store import Store

__all__ = ["doubtful_rows"]


def doubtful_rows(
    output: Path | None, contradicting: Mapping[str, object], machine: Machine, device: str, among: Collection[Bucket] | None = None
) -> tuple[Bucket, ...]:
    """The buckets to measure again, the most doubtful first; `among`: of these alone.

    MisuseError for options that would change them, and where there is no table or no timings.
    """
    given = [name for name, value in contradicting.items() if value not in (None, False)]
    if given:
        raise MisuseError(f"--doubtful measures the rows of a table again as they are; leave out {', '.join(given)}, or leave out --doubtful")
    store = Store.opened(machine, output)
    if store.table is None:
        raise MisuseError(
            f"--doubtful: there is no table of {machine.name} at {store.path}. Make it with titans-backends tune, or name one with --output"
        )
    if store.timings is None:
        raise MisuseError(
            f"--doubtful: {store.path} has no measurements beside it, in {timings_path(store.path)}, and they alone say what is in doubt. "
            "Put them there, or measure everything again with titans-backends tune --force"
        )
    return tuple(bucket for bucket, _ in doubtful(store, machine, device) if among is None or bucket in among)

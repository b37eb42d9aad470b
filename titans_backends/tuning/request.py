"""What a tune is asked to do. Says which backends race and how many heads a bucket's sequences have; plans and measures nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from titans_backends import registry
from titans_backends.buckets import Bucket
from titans_backends.tuning.select import Objective

__all__ = ["TIMEOUT_S", "TuneRequest"]

TIMEOUT_S = 60.0
"""What one candidate's compilation and check may take."""


@dataclass(frozen=True, slots=True)
class TuneRequest:
    """What to tune. `buckets` come from `plan.plan`.

    `backends` limits what is measured (None: all; with `quick` those whose manifest says quick); the default always is. `budget_s` limits
    the whole, `bucket_s` one race, `timeout_s` one candidate's compilation and check. `output` names another file than the user's cache.
    `force` measures what is current too, `doubtful` those alone whom current measurements leave open. `heads`: v heads of a sequence,
    where that divides a bucket's streams; `heads_by_bucket` has them for some buckets. `ahead`: compiles side by side first.
    `midpoints`: where two neighbouring lengths chose differently their choices meet between them, too; `beside` are neighbours that were tuned earlier.
    """

    buckets: tuple[Bucket, ...]
    device: str = "cpu"
    quick: bool = True
    backends: tuple[str, ...] | None = None
    objective: Objective = "time"
    max_memory_mib: float | None = None
    budget_s: float | None = None
    bucket_s: float | None = None
    timeout_s: float = TIMEOUT_S
    output: Path | None = None
    force: bool = False
    doubtful: bool = False
    heads: int | None = None
    heads_by_bucket: Mapping[Bucket, int] = field(default_factory=dict)
    ahead: bool = True
    midpoints: bool = True
    beside: tuple[Bucket, ...] = ()

    def heads_of(self, bucket: Bucket) -> int | None:
        """The v heads of a bucket's sequences, where somebody said; of a length that nobody named those of its key's others."""
        known = self.heads_by_bucket
        return known[bucket] if bucket in known else next((heads for one, heads in known.items() if one[:2] == bucket[:2]), self.heads)

    def asks(self, backend: str) -> bool:
        """Whether a backend's candidates are to race."""
        if self.backends is not None:
            return backend in self.backends
        return not self.quick or registry.get(backend).quick

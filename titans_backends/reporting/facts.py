"""What a report is made from, as frozen values: files, machines, ceilings, and per bucket its row, its measurements and what the backends say.

Gathered once at the edge (`gather`), so that every figure of the report is a pure function of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from titans_backends.cache.schema import Bucket, Device, Entry, Environment, Params
from titans_backends.cache.timings import Measurement
from titans_backends.contracts.contract import Work
from titans_backends.reporting.race_file import Race

__all__ = ["Ceilings", "Facts", "FileFacts", "Identity", "MachineFacts", "Measured", "Origin", "RaceFacts", "Refusal", "State"]

Origin = Literal["named", "user", "shipped", "results"]
"""Where a row comes from: the file that TITANS_BACKENDS_CACHE names, the user's cache, a shipped table, or timings without a table."""

Identity = tuple[str, Params, Literal["forward", "backward"], bool]
"""A candidate as the timings know it: name, sorted parameters, direction, whether states are saved. See `Measurement.identity`."""


@dataclass(frozen=True, slots=True)
class State:
    """Whether a row still holds; unchecked where this installation cannot say. `command` renews it."""

    kind: Literal["fresh", "stale", "ignored", "unchecked"]
    reason: str = ""
    command: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A backend that was not in a bucket's race, and why."""

    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class Measured:
    """One bucket on one machine.

    `entry` is its row, None where there are timings but no table. `measurements` are of the race that the row came from, empty where they are not
    kept. `default` names the members of the untuned default; None with `default_reason` where that is not known. `renew` is the command that
    measures the bucket again.
    """

    bucket: Bucket
    origin: Origin
    entry: Entry | None = None
    environment: Environment | None = None
    measurements: tuple[Measurement, ...] = ()
    state: State = State("unchecked")
    default: tuple[Identity, ...] | None = None
    default_reason: str = ""
    work: Work | None = None
    refusals: tuple[Refusal, ...] = ()
    renew: str = ""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a machine does at best, as measured: `rates` in FLOP/s by `bf16`, `tf32`, `fp32` (multiply-adds counted as two), and `copy` in bytes/s.

    `sources` name the files that they come from; there are none where this machine was measured for the report.
    """

    rates: Mapping[str, float]
    sources: tuple[str, ...]

    @property
    def origin(self) -> str:
        """Where they come from, as a sentence."""
        return f"The best that {', '.join(self.sources)} saw on such a machine." if self.sources else "Measured on this machine for this report."

    @property
    def copy(self) -> float | None:
        """Bytes per second of a copy, read and written."""
        return self.rates.get("copy")

    def flop_per_s(self, dtype: str, float32: str) -> float | None:
        """The rate for products of a dtype under a float32 matmul precision; None where it was not measured.

        At `highest` a float32 product may also be made of three TF32 ones, so the ceiling is the greater of the two ways.
        """
        if dtype in ("bfloat16", "float16"):
            return self.rates.get("bf16")
        if dtype != "float32":
            return None
        exact, rounded = self.rates.get("fp32"), self.rates.get("tf32")
        if float32 != "highest":
            return rounded if rounded is not None else exact
        return max(exact, (rounded or 0.0) / 3) if exact is not None else None


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A file that was looked at: how many rows of it the report shows, or what is wrong with it."""

    origin: Origin
    path: str
    holds: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """One device with everything known about it. `here`: this process runs on it. `repeated`: rows left out because they repeat another's."""

    device: Device
    here: bool
    cells: tuple[Measured, ...]
    files: tuple[FileFacts, ...] = ()
    environments: tuple[Environment, ...] = ()
    ceilings: Ceilings | None = None
    repeated: int = 0


@dataclass(frozen=True, slots=True)
class RaceFacts:
    """A race of all backends and peers, and the file that it was read from."""

    path: str
    race: Race


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything. `problems` are files that belong to no machine: damaged, foreign, of a later version."""

    machines: tuple[MachineFacts, ...]
    made: str
    version: str
    problems: tuple[FileFacts, ...] = field(default=())
    races: tuple[RaceFacts, ...] = field(default=())

"""`tune --from FILE`: the words that cannot stand beside it, the problems of the file for this device, and the table of what its rows cover."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from titans_backends import recording
from titans_backends.buckets import Bucket
from titans_backends.cache.nodes import SchemaError
from titans_backends.cache.problems import Met
from titans_backends.cache.writing import CacheError
from titans_backends.cli.failures import MisuseError
from titans_backends.cli.show import Column, Group, Json, say, table
from titans_backends.machine import Machine
from titans_backends.reporting import numbers
from titans_backends.tuning import ceilings
from titans_backends.tuning.recorded import Cost, Coverage, covered, demands, ordered
from titans_backends.tuning.report import TuneReport

_GLANCE_BYTES = 2**20

__all__ = ["Recorded", "coverage_json", "from_file", "show_coverage"]


@dataclass(frozen=True, slots=True)
class Recorded:
    """The file's buckets for one kind of device, the most expensive first, and what was left out, as sentences."""

    costs: tuple[Cost, ...]
    left_out: tuple[str, ...]

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """In the order in which they are tuned."""
        return tuple(cost.demand.bucket for cost in self.costs)

    @property
    def heads(self) -> dict[Bucket, int]:
        """The v heads that each was met with."""
        return {cost.demand.bucket: cost.demand.heads for cost in self.costs if cost.demand.heads is not None}

    def covered(self, report: TuneReport) -> tuple[Coverage, ...]:
        """How much of the recording the report's rows cover."""
        return covered(self.costs, {row.bucket: row for row in report.rows})


def from_file(path: Path, contradicting: Mapping[str, object], machine: Machine, device: str) -> Recorded:
    """The problems of a file. MisuseError for options that would change them, and where it has none for this device; SchemaError names the line."""
    given = [name for name, value in contradicting.items() if value is not None]
    if given:
        raise MisuseError(f"--from tunes the problems of {path} as they were met; leave out {', '.join(given)}, or leave out --from for a grid")
    if not path.exists():
        raise MisuseError(f'--from {path}: there is no such file. Make it with: with titans_backends.record("{path}"): model(batch)')
    if path.is_dir():
        inside = [one for one in sorted(path.glob("*.yaml")) if _is_recording(one)]
        found = (
            f"; in it: {', '.join(f'titans-backends tune --from {shlex.quote(str(one))}' for one in inside[:3])}" if inside else ", and none is in it"
        )
        raise MisuseError(f"--from {path}: a folder, not a file that titans_backends.record wrote{found}")
    lines = recording.read(path)
    wanted = demands(lines, machine.kind)
    left_out = _left_out(lines, machine.kind)
    if not wanted:
        why = "; ".join(left_out) or "it holds no problem"
        raise MisuseError(f"--from {path}: nothing to tune on {machine.kind}: {why}. {_instead(lines, machine.kind)}")
    return Recorded(ordered(wanted, machine, functools.cache(functools.partial(ceilings.measure, device))), left_out)


def _is_recording(path: Path) -> bool:
    """Whether to name it; what is too large to be read at once is not looked into."""
    try:
        return path.stat().st_size <= _GLANCE_BYTES and bool(recording.read(path))
    except (SchemaError, CacheError, OSError):
        return False


def _left_out(lines: Sequence[Met], kind: str) -> tuple[str, ...]:
    elsewhere: dict[str, int] = {}
    for met in lines:
        elsewhere[met.problem.device] = elsewhere.get(met.problem.device, 0) + 1
    elsewhere.pop(kind, None)
    said = [f"{numbers.amount(count, 'problem')} met on {device}" for device, count in sorted(elsewhere.items())]
    pinned = sum(met.problem.batch_invariant for met in lines if met.problem.device == kind)
    return (*said, *([f"{numbers.amount(pinned, 'problem')} under batch invariance, for which no table is asked"] if pinned else []))


def _instead(lines: Sequence[Met], kind: str) -> str:
    """What to record where nothing of a file is to be tuned."""
    if not lines:
        return "Record a model that calls the ops: titans-backends ops"
    if any(met.problem.device == kind for met in lines):
        return "Record outside of policy(batch_invariant=True)"
    return "Record on this device, or name another with --device"


def coverage_json(found: Sequence[Coverage]) -> list[Json]:
    """One object per op."""
    return [{**asdict(one)} for one in found]


def show_coverage(to: Console, found: Sequence[Coverage]) -> None:
    """The table, then the whole in one sentence."""
    columns = [Column("op"), *(Column(title, "right") for title in ("calls", "rows", "time", "of the model", "covered", "vs default"))]
    table(to, columns, [Group("", [_cells(one) for one in found])])
    whole = sum(one.total_us for one in found)
    part = sum(one.covered * one.total_us for one in found) / whole if whole else 0.0
    to.print()
    say(to, f"tuned rows cover {numbers.percent(part)} of the recorded time in our ops, {numbers.time_us(whole)} in all")
    before, after = sum(one.before_us or 0.0 for one in found), sum(one.after_us or 0.0 for one in found)
    if after:
        say(to, f"the covered calls took {numbers.time_us(before)} by the untuned default and take {numbers.time_us(after)} by the winners")
    estimated = sum(one.estimated for one in found)
    if estimated:
        said = f"{numbers.amount(estimated, 'bucket has', 'buckets have')} no measurement; the time there is an estimate from the work"
        say(to, Text(said, "yellow"))


def _cells(one: Coverage) -> list[str]:
    rows = f"{one.rows} of {one.buckets}"
    gain = numbers.gain(one.before_us, one.after_us)
    return [one.op, str(one.calls), rows, numbers.time_us(one.total_us), numbers.percent(one.share), numbers.percent(one.covered), gain]

"""One figure of the training benchmark, and the tables that people read. Imported by training.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from device_timing import shortened
from training_peers import OTHERS

__all__ = ["AGAIN", "STORED", "Line", "memory_table", "peers_table", "problem_shown"]

AGAIN, STORED = "computed again", "stored"
AIM, NEAR = 1.4, 1.05


@dataclass(slots=True)
class Line:
    """One way to do one step. Microseconds; errors are relative to float64's by name: root mean square, and the largest over the largest.

    `forward_us` and `backward_us`: the pair's candidates alone, in graphs of their own; `peak_mib`: above the inputs and the gradient that arrives.
    """

    part: str
    op: str
    what: str
    who: str
    pair: str = ""
    floor_us: float = math.nan
    graph_us: float = math.nan
    forward_us: float = math.nan
    backward_us: float = math.nan
    wall_us: float = math.nan
    host_us: float = math.nan
    peak_mib: float = math.nan
    inputs_mib: float = math.nan
    errors: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    checked_tokens: int = 0
    failed: str = ""

    @property
    def ours(self) -> bool:
        """Whether it is this library's."""
        return self.who not in OTHERS


def of_cell(lines: Sequence[Line]) -> tuple[Line | None, Line | None, dict[str, Line]]:
    """The default, the best of ours, and the peers by name, each where it was measured."""
    steps = [line for line in lines if line.pair and not math.isnan(line.graph_us)]
    first = next((line for line in steps if line.who.startswith("default")), None)
    return first, min(steps, key=lambda line: line.graph_us, default=None), {line.who: line for line in lines if not line.ours}


def by_problem(lines: Iterable[Line]) -> dict[tuple[str, str], list[Line]]:
    """The lines of each op and case."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        found.setdefault((line.op, line.what), []).append(line)
    return found


def shown(line: Line, name: str) -> str:
    """A line for people."""
    numbers = {
        "graph": (line.graph_us, ".1f"), "of floor": (line.floor_us / line.graph_us, ".0%"), "forward": (line.forward_us, ".1f"),
        "backward": (line.backward_us, ".1f"), "eager": (line.wall_us, ".1f"), "host": (line.host_us, ".1f"), "peak MiB": (line.peak_mib, ".1f"),
        "error": (max(line.errors.values(), default=math.nan), ".1e"),
    }  # fmt: skip
    said = "".join(f"  {label} {value:{form}}" for label, (value, form) in numbers.items() if not math.isnan(value))
    return f"    {line.who}:{said}{'  ' + name if name else ''}{'  FAILED ' + line.failed if line.failed else ''}"


def problem_shown(lines: Sequence[Line]) -> Iterator[str]:
    """A problem's lines, the fastest first."""
    names = shortened({line.pair for line in lines if line.pair})
    floor = f", floor {lines[0].floor_us:.1f} us" if lines and not math.isnan(lines[0].floor_us) else ""
    yield f"{lines[0].op}: {lines[0].what}{floor}"
    for line in sorted(lines, key=lambda line: line.graph_us if not math.isnan(line.graph_us) else math.inf):
        yield shown(line, names.get(line.pair, ""))


def peers_table(lines: Sequence[Line]) -> Iterator[str]:
    """Ours beside each peer: times, ratios with their mean, and the gradients' errors."""
    cells = by_problem(lines)
    present = [name for name in OTHERS if any(line.who == name for line in lines)]
    ratios: dict[str, list[float]] = {}
    yield (
        "\nforward and backward, us, graph"
        + " " * 16
        + "floor   default      best"
        + "".join(f"{name:>12s}   x best" for name in present)
        + "   best pair"
    )
    for (_, what), found in cells.items():
        first, best, others = of_cell(found)
        if best is None:
            yield f"{what:45s} nothing of ours ran"
            continue
        text = f"{what:44s} {best.floor_us:8.1f} {first.graph_us if first else math.nan:9.1f} {best.graph_us:9.1f}"
        for name in present:
            other = others.get(name, Line("", "", "", name))
            text += f"{other.graph_us:12.1f} {other.graph_us / best.graph_us:8.2f}"
            for kind, mine in (("best, graph", best.graph_us), ("default, graph", first.graph_us if first else math.nan)):
                ratios.setdefault(f"{name} / ours, {kind}", []).append(other.graph_us / mine)
            if first is not None:
                ratios.setdefault(f"{name} / ours, default, eager wall", []).append(other.wall_us / first.wall_us)
        yield f"{text}   {best.who}"
    for kind, values in ratios.items():
        known = [value for value in values if not math.isnan(value)]
        if known:
            aim = f" (the aim is {AIM}, and 1 in every cell)" if kind == "fla / ours, best, graph" else ""
            yield f"{kind}: geometric mean {statistics.geometric_mean(known):.2f}, least {min(known):.2f}, of {len(known)} cells{aim}"
    yield f"\nerrors, relative L2 against float64 on the first and the last head; * over {NEAR} times the best peer's"
    for (_, what), found in cells.items():
        _, best, others = of_cell(found)
        if best is None:
            continue
        gated = [line for name, line in others.items() if name != "fla_ungated" and line.errors]
        yield f"{what} ({best.checked_tokens} tokens)"
        for line in (best, *others.values()):
            told = []
            for name, error in line.errors.items():
                least = min((other.errors.get(name, math.inf) for other in gated), default=math.inf)
                told.append(f"{name} {error:.2e}{'*' if line is best and error > NEAR * least else ' '}")
            yield f"    {line.who if line is not best else 'ours':12s} {'  '.join(told)}"


def memory_table(lines: Sequence[Line]) -> Iterator[str]:
    """The peaks above the inputs: each class's first pair and its least, and the peers."""
    for (_, what), found in by_problem(lines).items():
        yield f"\npeak memory of a training call, MiB above the inputs ({found[0].inputs_mib:.0f} MiB): {what}"
        for kind in (AGAIN, STORED):
            mine = [line for line in found if line.who.startswith(kind) and not math.isnan(line.peak_mib)]
            for name, line in (("first", mine[0]), ("least", min(mine, key=lambda line: line.peak_mib))) if mine else ():
                yield f"    ours, states {kind}, {name:6s} {line.peak_mib:9.1f}   {line.pair}"
        for line in found:
            if not line.ours:
                yield f"    {line.who:34s} {line.peak_mib:9.1f}"

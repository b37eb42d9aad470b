"""What layer_times.py measured, for people: tables in the terminal or in Markdown, and the picture. Nothing is measured here.

    python benchmarks/layer_report.py [FILE]

FILE is benchmarks/results/layer_times.json. The documentation's page is written by benchmarks/seeds_page.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

__all__ = ["Report", "Row", "machine_facts", "markdown", "picture", "show"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/layer_times.json"
MODES, PRECISIONS = ("flat", "loop", "dual", "recurrent"), ("highest", "high", "bfloat16")


@dataclass(slots=True)
class Row:
    """One way to compute one cell: `who` "plain" or "ours"; milliseconds, MiB above the parameters and x, error relative to float64; NaN: not measured."""

    part: str
    mode: str
    tokens: int
    precision: str
    who: str
    eager_ms: float = math.nan
    graph_ms: float = math.nan
    peak_mib: float = math.nan
    error: float = math.nan
    failed: str = ""
    step: int = -1
    note: str = ""

    def __str__(self) -> str:
        numbers = {"eager": self.eager_ms, "graph": self.graph_ms}
        said = "".join(f" {name} {value:.3f} ms" for name, value in numbers.items() if not math.isnan(value))
        peak = "" if math.isnan(self.peak_mib) else f" peak {self.peak_mib:.1f} MiB"
        failed = f" FAILED {self.failed}" if self.failed else f" ({self.note})" if self.note else ""
        return f"{self.mode} {self.tokens} {self.precision} {self.who}:{said}{peak} error {self.error:.1e}{failed}"


@dataclass(slots=True)
class Report:
    """All rows of a run, the facts of its machine, and the cells that the time did not reach."""

    facts: dict[str, object]
    rows: list[Row] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """As JSON, NaN as null; through a second file, so that a reader never sees half of one."""
        told = {"facts": self.facts, "not_measured": self.not_measured, "rows": [asdict(row) for row in self.rows]}
        for row in told["rows"]:
            assert isinstance(row, dict)
            row.update({name: None for name, value in row.items() if isinstance(value, float) and math.isnan(value)})
        beside = path.with_name(path.name + ".part")
        beside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)

    @staticmethod
    def read(path: Path) -> Report:
        """What `write` wrote."""
        told = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**{name: math.nan if value is None else value for name, value in row.items()}) for row in told["rows"]]
        return Report(told["facts"], rows, told["not_measured"])

    def found(self, mode: str, tokens: int, precision: str, who: str, part: str = "table") -> Row:
        """That row; one of NaN where it was not measured."""
        for row in self.rows:
            if (row.part, row.mode, row.tokens, row.precision, row.who) == (part, mode, tokens, precision, who):
                return row
        return Row(part, mode, tokens, precision, who, failed="not measured")

    def lengths(self, part: str = "table") -> list[int]:
        """What was measured of a part, ascending."""
        return sorted({row.tokens for row in self.rows if row.part == part})

    def have(self, name: str) -> list[str]:
        """The modes or precisions of the table, in their order."""
        known = MODES if name == "mode" else PRECISIONS
        present = {getattr(row, name) for row in self.rows if row.part == "table"}
        return [one for one in known if one in present]


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table: a title, the columns' names, the rows' texts, and what is to be said below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    below: str = ""


def machine_facts(device: str) -> dict[str, object]:
    """What the figures hang on."""
    import titans_backends as tb

    facts: dict[str, object] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "titans_backends": tb.__version__,
    }
    for package in ("triton", "cupy", "numba"):
        try:
            facts[package] = __import__(package).__version__
        except ImportError:
            continue  # its absence is the fact
    return facts


def number(value: float, digits: int = 3) -> str:
    """With so many significant digits, a dash for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def scientific(value: float) -> str:
    """Its order of magnitude, a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.0e}"


def times(value: float) -> str:
    """A ratio."""
    return "–" if math.isnan(value) else f"{value:.1f}×" if value < 100 else f"{value:.0f}×"


def sheets(report: Report) -> Iterator[Sheet]:
    """Every table of a report."""
    for mode in report.have("mode"):
        yield of_mode(report, mode)
    if report.have("mode"):
        yield growth(report)
    for tokens in report.lengths("ladder"):
        yield ladder(report, tokens)
    if report.have("mode"):
        yield aims(report)


def of_mode(report: Report, mode: str) -> Sheet:
    """A mode's times: for each precision plain, ours eager, ours in a graph."""
    precisions = report.have("precision")
    columns = ["tokens", *(f"{precision}: plain / eager / graph, ms" for precision in precisions)]
    columns += ["plain over eager, graph", "tokens/s", "MiB, plain", "ours", "of it", "error"]
    rows, said = [], []
    for tokens in report.lengths():
        texts = [str(tokens)]
        for precision in precisions:
            plain, ours = (report.found(mode, tokens, precision, who) for who in ("plain", "ours"))
            texts.append(" / ".join(map(number, (plain.eager_ms, ours.eager_ms, ours.graph_ms))))
            said += [f"{row.tokens} {row.precision} {row.who}: {row.failed or row.note}" for row in (plain, ours) if row.failed or row.note]
        plain, ours = (report.found(mode, tokens, precisions[0], who) for who in ("plain", "ours"))
        best = min((report.found(mode, tokens, precision, "ours") for precision in precisions), key=lambda row: fastest(row, math.inf))
        share = ours.peak_mib / plain.peak_mib
        texts += [
            f"{times(plain.eager_ms / ours.eager_ms)}, {times(plain.eager_ms / ours.graph_ms)}",
            number(1e3 * tokens / fastest(best)), number(plain.peak_mib), number(ours.peak_mib), "–" if math.isnan(share) else f"{share:.0%}",
            " / ".join(scientific(report.found(mode, tokens, precision, 'ours').error) for precision in precisions),
        ]  # fmt: skip
        rows.append(texts)
    below = f"Ratios and memory: {precisions[0]}. tokens/s: the fastest of ours. " + "; ".join(said)
    return Sheet(f"{mode}: the stack, batch 1", columns, rows, below.strip())


def fastest(row: Row, otherwise: float = math.nan) -> float:
    """The graph's time, or the eager one."""
    known = [value for value in (row.graph_ms, row.eager_ms) if not math.isnan(value)]
    return min(known, default=otherwise)


def growth(report: Report) -> Sheet:
    """How the time grows from 128 to 512 tokens, and at worst from one length to the next from 4096 on."""
    rows = []
    for mode in report.have("mode"):
        for precision in report.have("precision"):
            short = [report.found(mode, tokens, precision, who) for who in ("plain", "ours") for tokens in (128, 512)]
            measured = [(tokens, report.found(mode, tokens, precision, "ours").graph_ms) for tokens in report.lengths() if tokens >= 4096]
            known = [(more / less) / (longer / shorter) for (shorter, less), (longer, more) in pairwise(measured) if not math.isnan(more / less)]
            rows.append([
                mode, precision, times(short[1].eager_ms / short[0].eager_ms), times(short[3].eager_ms / short[2].eager_ms),
                times(short[3].graph_ms / short[2].graph_ms), f"{max(known):.2f}×" if known else "–",
            ])  # fmt: skip
    columns = [
        "mode",
        "precision",
        "128 to 512, plain",
        "ours, eager",
        "ours, graph",
        "graph, from 4096 on: growth of the time over that of the length, at worst",
    ]
    return Sheet("Growth", columns, rows, "From 128 to 512 the length grows 4×.")


def ladder(report: Report, tokens: int) -> Sheet:
    """The second document's steps at a length, each against the row above it."""
    steps = sorted({(row.step, row.mode, row.note) for row in report.rows if row.part == "ladder" and row.tokens == tokens})
    rows: list[list[str]] = []
    before: tuple[float, ...] = ()
    notes, said = [], []
    for _, name, note in steps:
        plain, ours = (report.found(name, tokens, "highest", who, "ladder") for who in ("plain", "ours"))
        now = (plain.eager_ms, ours.eager_ms, ours.graph_ms)
        gains = [f" ({was / value:.2f}×)" if not math.isnan(was / value) else "" for was, value in zip(before, now, strict=False)] or ["", "", ""]
        rows.append([name, *(f"{number(value)}{gain}" for value, gain in zip(now, gains, strict=True))])
        before = now
        notes += [f"{name}: {note}"] if note else []
        said += [f"{name}, {row.who}: {row.failed}" for row in (plain, ours) if row.failed]
    columns = ["step, cumulative", "plain torch, eager, ms", "memory by ops, eager", "memory by ops, graph"]
    return Sheet(f"The second document's steps at {tokens} tokens, float32 highest", columns, rows, "; ".join([*notes, *said]))


def aims(report: Report) -> Sheet:
    """What was asked of these figures, in milliseconds unless it is a ratio, and what they are."""
    rows: list[list[str]] = []

    def add(what: str, most: float, got: float) -> None:
        rows.append([what, f"{most:g}", number(got), "–" if math.isnan(got) else "yes" if got <= most else "no"])

    def ours(mode: str, tokens: int, precision: str) -> Row:
        return report.found(mode, tokens, precision, "ours")

    short = [tokens for tokens in report.lengths() if 128 <= tokens <= 2048]
    eager = [ours("flat", tokens, "highest").eager_ms for tokens in short]
    shares = [value / report.found("flat", tokens, "highest", "plain").eager_ms for tokens, value in zip(short, eager, strict=True)]
    add("flat, 128 to 2048, highest, eager, at worst", 3.2, largest(eager))
    add("the same over the plain stack's, asked as 3.2 of the original's 9.75", 0.33, largest(shares))
    for tokens, most in ((128, 0.6), (256, 0.6), (512, 0.6), (2048, 1.6), (65536, 50.0)):
        add(f"flat, {tokens}, highest, graph", most, ours("flat", tokens, "highest").graph_ms)
    for tokens, most in ((2048, 0.8), (65536, 15.0)):
        add(f"flat, {tokens}, high, graph", most, ours("flat", tokens, "high").graph_ms)
    add("flat, 65536, bfloat16, graph", 10.0, ours("flat", 65536, "bfloat16").graph_ms)
    flat = report.found("flat", 65536, "highest", "plain")
    add("flat, 65536, highest, memory over the plain stack's", 0.4, ours("flat", 65536, "highest").peak_mib / flat.peak_mib)
    loop = report.found("loop", 8192, "highest", "plain").eager_ms
    add("loop, 8192, highest, eager over the plain stack's", 0.05, ours("loop", 8192, "highest").eager_ms / loop)
    for precision in report.have("precision"):
        ratios = [ours("recurrent", tokens, precision).graph_ms / ours("flat", tokens, precision).graph_ms for tokens in report.lengths()]
        add(f"recurrent over flat, {precision}, graph, at worst of all lengths", 1.5, largest(ratios))
    return Sheet("Asked, and found", ["what", "at most", "found", "met"], rows)


def largest(values: Iterable[float]) -> float:
    """Of those that were measured; NaN where none was."""
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def show(report: Report) -> None:
    """The tables in the terminal."""
    console = Console(width=None if sys.stdout.isatty() else 190)
    console.print(facts_told(report))
    for sheet in sheets(report):
        table = Table(title=sheet.title, title_justify="left", caption=sheet.below or None, caption_justify="left")
        for index, name in enumerate(sheet.columns):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    if report.not_measured:
        console.print(
            f"[bold]Not measured, out of time:[/bold] {', '.join(report.not_measured)}. Type: --seconds with more, or fewer --modes and --lengths."
        )


def facts_told(report: Report) -> str:
    """In one line; `add_us` is what an eager torch.add costs this host, which every eager figure hangs on."""
    facts = {name: value for name, value in report.facts.items() if not isinstance(value, Mapping)}
    return ", ".join(f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items())


def markdown(report: Report) -> str:
    """The tables for a page."""
    lines = [f"Measured on: {facts_told(report)}.", ""]
    for sheet in sheets(report):
        lines += [f"### {sheet.title}", "", f"| {' | '.join(sheet.columns)} |", f"|{'---|' * len(sheet.columns)}"]
        lines += [f"| {' | '.join(row)} |" for row in sheet.rows]
        lines += ["", *([sheet.below, ""] if sheet.below else [])]
    if report.not_measured:
        lines += [f"Not measured, out of time: {', '.join(report.not_measured)}.", ""]
    return "\n".join(lines)


def picture(report: Report) -> str:
    """Milliseconds over tokens, a panel for each mode."""
    sys.path.insert(0, str(ROOT / "docs" / "pictures"))
    from line_chart import Axis, Panel, Series, draw

    def series(name: str, mode: str, precision: str, who: str, field: str, colour: int, dash: int) -> Series:
        rows = [report.found(mode, tokens, precision, who) for tokens in report.lengths()]
        return Series(name, [(float(row.tokens), getattr(row, field)) for row in rows], colour, dash)

    panels = [
        Panel(mode, [
            series("plain torch, eager, float32", mode, "highest", "plain", "eager_ms", 5, 1),
            series("ours, eager, float32", mode, "highest", "ours", "eager_ms", 1, 2),
            series("ours, graph, float32", mode, "highest", "ours", "graph_ms", 0, 0),
            series("ours, graph, float32 high", mode, "high", "ours", "graph_ms", 2, 0),
            series("ours, graph, bfloat16", mode, "bfloat16", "ours", "graph_ms", 3, 0),
        ])
        for mode in report.have("mode")
    ]  # fmt: skip
    title = f"The encoder stack, batch 1, {report.facts.get('device', '')}"
    return draw(title, panels, Axis("tokens", log=True, base=2), Axis("ms", log=True))


def main() -> int:
    """Shows what a file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=RESULTS, metavar="FILE")
    asked = parser.parse_args()
    if not asked.file.exists():
        print(f"error: {asked.file} is not there; type: python benchmarks/layer_times.py --json {asked.file}", file=sys.stderr)
        return 1
    show(Report.read(asked.file))
    return 0


if __name__ == "__main__":
    sys.exit(main())

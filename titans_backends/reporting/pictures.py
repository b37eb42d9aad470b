"""The report's charts as files of their own, SVG and PNG, for a README and for documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from titans_backends.reporting import overviews, svg
from titans_backends.reporting.canvas import Chart
from titans_backends.reporting.facts import Facts
from titans_backends.reporting.palette import INKS
from titans_backends.reporting.rows import Row, rows_of
from titans_backends.reporting.summary import by_op, curves_of
from titans_backends.reporting.times import panels

__all__ = ["write_pictures"]

_SCALE = 2
"""Pixels of a PNG for one of the page's."""


def write_pictures(facts: Facts, folder: Path) -> list[Path]:
    """Writes every chart of every machine as `<slug>-<what>.svg` and `.png`, and says which; the folder is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for machine in facts.machines:
        for name, chart in _charts(rows_of(machine)):
            path = folder / f"{machine.device.slug}-{name}.svg"
            title = f"{chart.title}. {machine.device.name}"
            path.write_text(svg.standalone(chart.figure, title), encoding="utf-8")
            chart.figure.savefig(path.with_suffix(".png"), dpi=72 * _SCALE, facecolor=INKS["paper"].light, metadata={"Software": None})
            written += [path, path.with_suffix(".png")]
    return written


def _charts(rows: list[Row]) -> Iterator[tuple[str, Chart]]:
    if any(row.winner is not None for row in rows):
        yield "winners", overviews.winners(rows)
    if any(row.over_default and not row.kept_default for row in rows):
        yield "gains", overviews.gains(rows)
    if any(row.share for row in rows):
        yield "floor", overviews.shares(rows)
    for op, found in by_op(rows).items():
        curves = [line for line in curves_of(found) if len(line) > 1 and line[0].best]
        if curves:
            yield op, panels(curves)

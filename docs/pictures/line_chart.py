"""A line chart as an SVG file, for the pictures of this documentation: panels, linear or logarithmic axes, colours for a light and a dark page.

No dependency, the same bytes for the same numbers. Imported by benchmarks/layer_report.py and examples/train_bytes.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

__all__ = ["Axis", "Panel", "Series", "draw"]

WIDTH, HEIGHT, LEFT, TOP, GAP_X, GAP_Y = 360, 230, 62, 52, 74, 66
"""Of a panel, the first one's corner, and between panels, in pixels."""
LEGEND = 212
"""Pixels for a line's name."""
LIGHT = ("#2563a8", "#b3401f", "#2c7a4b", "#7a4ba3", "#8a6d00", "#5b6470")
DARK = ("#7db3f0", "#f09a7d", "#7fd3a0", "#c3a2ea", "#e0c560", "#aab4c0")
DASHES = ("", "5 4", "1.5 3")


@dataclass(frozen=True, slots=True)
class Axis:
    """What it shows, and whether it is logarithmic. `base` 2: ticks at powers of two, for lengths."""

    label: str
    log: bool = False
    base: int = 10


@dataclass(frozen=True, slots=True)
class Series:
    """A line: points (x, y), those that are not finite left out. `colour` 0 to 5; `dash` 0 to 2."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dash: int = 0


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes."""

    title: str
    series: Sequence[Series]


@dataclass(frozen=True, slots=True)
class _Scale:
    """Numbers to pixels along one axis."""

    axis: Axis
    low: float
    high: float
    start: float
    stop: float
    ticks: Sequence[float] = field(default=())

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(x) if self.axis.log else x for x in (self.low, self.high, value))
        return self.start + (self.stop - self.start) * (value - low) / (high - low)


def draw(title: str, panels: Sequence[Panel], x: Axis, y: Axis, *, columns: int = 2) -> str:
    """The panels in rows of `columns`, all on one pair of scales, a legend below; the SVG's text."""
    points = [point for panel in panels for series in panel.series for point in _finite(series)]
    if not points:
        raise ValueError(f"draw: {title!r} has no finite point; measure something first")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    legend = {(series.name, series.colour, series.dash): None for panel in panels for series in panel.series}
    width = LEFT + columns * WIDTH + (columns - 1) * GAP_X + 18
    bottom = TOP + rows * HEIGHT + (rows - 1) * GAP_Y + 58
    per_line = max(1, (width - LEFT) // LEGEND)
    height = bottom + 18 * -(-len(legend) // per_line) + 8
    parts = [_opening(title, width, height)]
    for index, panel in enumerate(panels):
        left, top = LEFT + (index % columns) * (WIDTH + GAP_X), TOP + (index // columns) * (HEIGHT + GAP_Y)
        across = _scale(x, [point[0] for point in points], left, left + WIDTH)
        up = _scale(y, [point[1] for point in points], top + HEIGHT, top)
        parts += _frame(panel.title, across, up, left, top)
        parts += [_line(series, across, up) for series in panel.series if _finite(series)]
    for index, (name, colour, dash) in enumerate(legend):
        at, down = LEFT + LEGEND * (index % per_line), bottom + 18 * (index // per_line)
        parts.append(f'<path class="c{colour}" d="M{at} {down}h26"{_dashed(dash)}/><text x="{at + 32}" y="{down + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _finite(series: Series) -> list[tuple[float, float]]:
    return [(x, y) for x, y in series.points if math.isfinite(x) and math.isfinite(y)]


def _opening(title: str, width: int, height: int) -> str:
    colours = "".join(f".c{index}{{stroke:{colour}}}" for index, colour in enumerate(LIGHT))
    dark = "".join(f".c{index}{{stroke:{colour}}}" for index, colour in enumerate(DARK))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
        f"<title>{escape(title)}</title><style>"
        "text{font:12px system-ui,sans-serif;fill:#24292f}.b{font-weight:600}.m{text-anchor:middle}.e{text-anchor:end}"
        "path{fill:none;stroke-width:1.8;stroke-linejoin:round}.g{stroke:#d0d7de;stroke-width:1}.p{fill:#ffffff}"
        f"{colours}@media(prefers-color-scheme:dark){{text{{fill:#d6dce3}}.g{{stroke:#3a424c}}.p{{fill:#0d1117}}{dark}}}"
        f'</style><rect class="p" width="{width}" height="{height}"/><text class="b" x="{LEFT - 44}" y="22">{escape(title)}</text>'
    )


def _scale(axis: Axis, values: Sequence[float], start: float, stop: float) -> _Scale:
    """Room for every value, from tick to tick."""
    low, high = min(values), max(values)
    if axis.log:
        if low <= 0:
            raise ValueError(f"draw: {axis.label} has {low}, which a logarithmic axis cannot show")
        first, last = math.floor(math.log(low, axis.base) + 1e-9), math.ceil(math.log(high, axis.base) - 1e-9)
        last = max(last, first + 1)
        every = max(1, -(-(last - first) // 6))
        ticks = [float(axis.base) ** power for power in range(first, last + 1)]
        return _Scale(axis, ticks[0], ticks[-1], start, stop, ticks[::every])
    high = high if high > low else low + 1.0
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    low, count = step * math.floor(low / step), math.ceil(high / step) - math.floor(low / step)
    return _Scale(axis, low, low + count * step, start, stop, [low + step * index for index in range(count + 1)])


def _frame(title: str, x: _Scale, y: _Scale, left: float, top: float) -> list[str]:
    """Grid, numbers and labels of a panel."""
    parts = [f'<text class="b" x="{left}" y="{top - 8}">{escape(title)}</text>']
    for tick in x.ticks:
        at = x(tick)
        parts.append(f'<path class="g" d="M{at:.1f} {top}v{HEIGHT}"/><text class="m" x="{at:.1f}" y="{top + HEIGHT + 16}">{_number(tick)}</text>')
    for tick in y.ticks:
        at = y(tick)
        parts.append(f'<path class="g" d="M{left} {at:.1f}h{WIDTH}"/><text class="e" x="{left - 6}" y="{at + 4:.1f}">{_number(tick)}</text>')
    parts.append(f'<text class="m" x="{left + WIDTH / 2}" y="{top + HEIGHT + 34}">{escape(x.axis.label)}</text>')
    parts.append(f'<text class="e" x="{left + WIDTH}" y="{top - 8}">{escape(y.axis.label)}</text>')
    return parts


def _line(series: Series, x: _Scale, y: _Scale) -> str:
    points = " ".join(f"{'L' if index else 'M'}{x(a):.1f} {y(b):.1f}" for index, (a, b) in enumerate(_finite(series)))
    return f'<path class="c{series.colour}" d="{points}"{_dashed(series.dash)}><title>{escape(series.name)}</title></path>'


def _dashed(dash: int) -> str:
    return f' stroke-dasharray="{DASHES[dash]}"' if dash else ""


def _number(value: float) -> str:
    """At most four characters where it can be."""
    if abs(value) >= 1024 and math.log2(abs(value)).is_integer():
        return f"{int(value) // 1024}k"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.4g}"

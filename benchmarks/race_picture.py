"""The race in one picture: a row for each case, a mark for each backend at its time over the fastest one's, on a logarithmic axis. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from race_page import MODES, TITLES, Line, columns, number

from titans_backends.reporting import svg
from titans_backends.reporting.canvas import GRID, INK, MUTED, SMALL, TEXT
from titans_backends.reporting.palette import INKS, style_of

__all__ = ["drawn", "written"]

ROW, LEFT, WIDE, RIGHT, TOP, BOTTOM = 17.0, 128.0, 250.0, 62.0, 52.0, 64.0
"""Pixels: a row, what stands left of a panel, a panel, what stands right of it, above and below."""
MOST = 6.0
"""Over the fastest; what is slower stands at the edge, and plain torch, which is far off, not at all."""
SHOWN = tuple(who for who in TITLES if who in ("triton", "cupy", "two", "fla", "flash_qla", "flashinfer"))
TITLE = "gated_delta_rule, bfloat16, one H100: time over the fastest, in a CUDA graph from a cold cache (left is better)"


def written(lines: Sequence[Line], path: Path, png: Path | None = None) -> list[Path]:
    """Draws it into an SVG file, and where a name is given into a PNG as well."""
    figure = drawn(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg.standalone(figure, TITLE), encoding="utf-8")
    if png is not None:
        figure.savefig(png, dpi=144, facecolor=INKS["paper"].light, metadata={"Software": None})
    return [path] if png is None else [path, png]


def drawn(lines: Sequence[Line]) -> Figure:
    """A panel for each direction beside the other, rows in groups of heads."""
    panels = [(title, [line for line in lines if line.case.mode == mode]) for mode, title in MODES.items()]
    panels = [(title, _ordered(some)) for title, some in panels if some]
    if not panels:
        raise ValueError("there is no case with a time; run benchmarks/race.py first")
    rows = max(len(some) for _, some in panels)
    width, height = len(panels) * (LEFT + WIDE + RIGHT) + 10, TOP + rows * ROW + BOTTOM
    figure = Figure(figsize=(width / 72, height / 72))
    figure.text(14 / width, 1 - 18 / height, TITLE, color=INK, fontsize=TEXT + 1, fontweight="bold")
    for index, (title, some) in enumerate(panels):
        left = index * (LEFT + WIDE + RIGHT) + LEFT
        tall = len(some) * ROW
        axes = figure.add_axes((left / width, 1 - (TOP + tall) / height, WIDE / width, tall / height))
        _panel(axes, title, some)
    _legend(figure, lines, width, height)
    return figure


def _ordered(lines: Sequence[Line]) -> list[Line]:
    return sorted(lines, key=lambda line: (-line.case.cell.D, line.case.cell.B > 1, line.case.cell.H, line.case.cell.T))


def _panel(axes: Axes, title: str, lines: Sequence[Line]) -> None:
    axes.patch.set_visible(False)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=SMALL, labelcolor=MUTED, pad=4)
    axes.set_xscale("log")
    axes.set_xlim(0.93, MOST * 1.06)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    ticks = [1, 1.5, 2, 3, 4, 6]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_xticks([], minor=True)
    for tick in ticks:
        axes.axvline(tick, color=GRID, lw=0.8, zorder=0)
    cells = [line.case.cell for line in lines]
    axes.set_yticks(range(len(lines)), [f"{cell.G}/{cell.H} of {cell.D}, {cell.B}×{cell.T}" for cell in cells])
    for index, (one, other) in enumerate(pairwise(cells)):
        if (one.G, one.H, one.D, one.B) != (other.G, other.H, other.D, other.B):
            axes.axhline(index + 0.5, color=GRID, lw=0.8, zorder=0)
    axes.text(0.0, 1.0, title, transform=axes.transAxes, color=INK, fontsize=TEXT, fontweight="bold", va="bottom", ha="left")
    axes.text(1.02, 1.0, "fastest", transform=axes.transAxes, color=MUTED, fontsize=SMALL, va="bottom", ha="left")
    for row, line in enumerate(lines):
        least = line.winner.us(line.way) or 1.0
        axes.text(MOST * 1.12, row, _time(least), color=INK, fontsize=SMALL, va="center", ha="left", clip_on=False)
        _marks(axes, row, line, least)


def _marks(axes: Axes, row: int, line: Line, least: float) -> None:
    ratios = {who: ratio for who in SHOWN if (ratio := _ratio(line, who, least)) is not None}
    if ratios:
        axes.plot([1, min(MOST, max(ratios.values()))], [row, row], color=GRID, lw=2.0, zorder=1, solid_capstyle="butt")
    for who, ratio in sorted(ratios.items(), key=lambda item: -item[1]):
        style = style_of("cupy" if who == "two" else who)
        size = 8.0 if style.mark in "*Xp" else 6.0
        fill = "none" if who == "two" else style.light
        axes.plot([min(MOST, ratio)], [row], style.mark, color=style.light, markerfacecolor=fill, markersize=size, markeredgewidth=0.8, zorder=3)
    for what, size, width in (("dispatch", 11.5, 0.9), ("here", 11.5, 1.9)):
        _, regret = line.choices.get(what, ("", None))
        if regret is not None:
            style = {"marker": "s" if what == "dispatch" else "o", "markersize": size, "markeredgewidth": width}
            axes.plot([min(MOST, 1 + max(0.0, regret))], [row], color=INK, markerfacecolor="none", zorder=4, linestyle="none", **style)


def _ratio(line: Line, who: str, least: float) -> float | None:
    """A backend's time over the fastest one's; a peer that is no backend here stands by its own function."""
    found = line.best(who) or (line.own(who) if who in ("fla", "flash_qla", "flashinfer") else None)
    us = None if found is None else found.us(line.way)
    return None if us is None else us / least


def _time(us: float) -> str:
    return f"{number(us)} µs" if us < 1000 else f"{us / 1000:.3g} ms"


def _legend(figure: Figure, lines: Sequence[Line], width: float, height: float) -> None:
    who = [one for one in SHOWN if one in columns(lines) or any(line.own(one) for line in lines)]
    handles = []
    for one in who:
        style = style_of("cupy" if one == "two" else one)
        fill = "none" if one == "two" else style.light
        title = "forward of one, backward of another" if one == "two" else TITLES[one]
        handles.append(Line2D([], [], marker=style.mark, color=style.light, markerfacecolor=fill, linestyle="none", markersize=6.5, label=title))
    handles.append(
        Line2D(
            [],
            [],
            marker="o",
            color=INK,
            markerfacecolor="none",
            linestyle="none",
            markersize=9,
            markeredgewidth=1.9,
            label="tuned here, peers installed",
        )
    )
    handles.append(
        Line2D([], [], marker="s", color=INK, markerfacecolor="none", linestyle="none", markersize=9, markeredgewidth=0.9, label="get_op as shipped")
    )
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(8 / width, 2 / height), ncols=4, frameon=False, fontsize=SMALL, labelcolor=INK, handletextpad=0.3,
        columnspacing=1.4,
    )  # fmt: skip

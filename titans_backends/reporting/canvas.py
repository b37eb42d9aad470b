"""What every chart stands on: a figure in CSS pixels, axes without a frame, ticks at lengths and at times, rules behind the marks.

A figure is as wide as a column of the page, so that its text is legible on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from titans_backends.reporting.numbers import length
from titans_backends.reporting.palette import INKS

__all__ = ["GRID", "INK", "MUTED", "PAPER", "SMALL", "TALL", "TEXT", "WIDTH", "Chart", "canvas", "length_axis", "pixels", "time_axis"]

WIDTH, TALL = 344.0, 232.0
"""Of a chart on a page."""
TEXT, SMALL = 10.5, 9.5
"""Sizes of letters."""
INK, MUTED, GRID, PAPER = (INKS[name].light for name in ("ink", "muted", "grid", "paper"))


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure, what it shows in a sentence, and what its marks say when they are pointed at, by the gid of their line."""

    figure: Figure
    title: str
    notes: dict[str, list[str]] = field(default_factory=dict)


def canvas(
    height: float, *, left: float = 48.0, right: float = 86.0, top: float = 8.0, bottom: float = 34.0, width: float = WIDTH,
    corners: Sequence[tuple[float, float]] | None = None,
) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """A figure in pixels with one pair of axes, or with some `TALL` ones, given by their upper left corners from the lower left one."""
    figure = Figure(figsize=(width / 72, height / 72))
    boxes = [(left, bottom, width - left - right, height - top - bottom)]
    if corners is not None:
        boxes = [(x + left, y - TALL + bottom, WIDTH - left - right, TALL - top - bottom) for x, y in corners]
    found = []
    for x, y, wide, tall in boxes:
        axes = figure.add_axes((x / width, y / height, wide / width, tall / height))
        axes.patch.set_visible(False)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(MUTED)
        axes.tick_params(which="both", length=0, labelsize=SMALL, labelcolor=MUTED, pad=4)
        found.append(axes)
    return figure, found


def pixels(axes: Axes) -> tuple[float, float]:
    """Width and height of a pair of axes."""
    box, scale = axes.get_window_extent(), 72 / axes.figure.dpi
    return box.width * scale, box.height * scale


def length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    """A tick per length that was measured, without those that would touch their neighbour."""
    span = max(1.0, math.log2(lengths[-1] / lengths[0]))
    kept = [lengths[0]]
    for seq_len in lengths[1:]:
        if math.log2(seq_len / kept[-1]) / span > 0.09:
            kept.append(seq_len)
    axes.set_xticks(kept, [length(seq_len) for seq_len in kept])
    axes.set_xticks([], minor=True)
    for seq_len in lengths:
        axes.axvline(seq_len, color=GRID, lw=0.8, zorder=0)


def time_axis(axes: Axes, *, vertical: bool = True) -> None:
    """Ticks in µs and ms at 1, or at 1, 2 and 5, as there is room."""
    low, high = axes.get_ylim() if vertical else axes.get_xlim()
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 1.6 else (1, 3) if decades < 2.2 else (1,)
    ticks = [step * 10.0**power for power in range(-1, 9) for step in steps if low <= step * 10.0**power <= high]
    names = [f"{tick:g} µs" if tick < 1e3 else f"{tick / 1e3:g} ms" if tick < 1e6 else f"{tick / 1e6:g} s" for tick in ticks]
    axis, rule = (axes.yaxis, axes.axhline) if vertical else (axes.xaxis, axes.axvline)
    axis.set_ticks(ticks, names)
    axis.set_ticks([], minor=True)
    for tick in ticks:
        rule(tick, color=GRID, lw=0.8, zorder=0)

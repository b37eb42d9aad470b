"""Charts of a whole machine: what tuning bought, share of the floor, who wins where. From rows; they draw and decide nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from titans_backends.reporting.canvas import GRID, INK, MUTED, PAPER, SMALL, TEXT, WIDTH, Chart, canvas
from titans_backends.reporting.numbers import factor, length, percent, time_us
from titans_backends.reporting.palette import style_of
from titans_backends.reporting.rows import Row
from titans_backends.reporting.summary import by_op, summarize

__all__ = ["gains", "shares", "winners"]


Groups = Callable[[Sequence[Row]], Mapping[str, Sequence[Row]]]
"""Rows in lines of a chart, by the line's name."""


def gains(rows: Sequence[Row], groups: Groups = by_op) -> Chart:
    """What tuning bought: per op, or other group, a mark for each bucket whose default was replaced, at its default's time over its winner's."""
    shown = [row for row in rows if row.over_default is not None]
    replaced = [row for row in shown if not row.kept_default]
    limits = (min([1.0, *(row.over_default or 1.0 for row in replaced)]) / 1.05, max([2.0, *(row.over_default or 1.0 for row in replaced)]) * 1.1)

    def told(of: Sequence[Row]) -> tuple[str, ...]:
        found = summarize(of)
        return factor(found.over_default), f"{found.kept} of {found.compared}"

    figure, axes = _swarm(
        groups(shown), lambda row: None if row.kept_default else row.over_default, told, ("mean", "kept"),
        "untuned default’s time over the tuned choice’s", limits, log=True,
    )  # fmt: skip
    span, ticks = math.log(limits[1] / limits[0]), [1.0]
    for tick in (1.1, 1.2, 1.3, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100, 200, 500):
        if tick <= limits[1] and math.log(tick / ticks[-1]) > 0.2 * span:
            ticks.append(tick)
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.axvline(1, color=MUTED, lw=1, zorder=0)
    return Chart(figure, "What tuning bought: the untuned default's time over the tuned choice's, by op")


def shares(rows: Sequence[Row], groups: Groups = by_op, hollow: Callable[[Row], bool] | None = None) -> Chart:
    """Share of the floor per op, or other group. Hollow marks, unless said: eager calls where there are graph launches, else training."""
    shown = [row for row in rows if row.share is not None]
    graphs = any(row.place.launch == "graph" for row in rows)

    def told(of: Sequence[Row]) -> tuple[str, ...]:
        return (percent(max((row.share or 0.0 for row in of), default=None)),)

    figure, axes = _swarm(
        groups(shown),
        lambda row: 100 * (row.share or 0.0),
        told,
        ("largest",),
        "floor over the winner’s time",
        (-3, 102),
        hollow=hollow or (lambda row: row.place.launch != "graph" if graphs else row.place.regime == "training"),
    )
    axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    return Chart(figure, "Share of the floor: the least time that the machine's ceilings allow over the winner's, by op")


def winners(rows: Sequence[Row]) -> Chart:
    """A map of winners: a line per setting and size, a column per sequence length, each field with its backend and time."""
    lines = list(dict.fromkeys(row.place.line for row in rows))
    lengths = sorted({row.place.seq_len for row in rows})
    across, down, left = 62.0, 24.0, 300.0
    tops, y = [], 34.0
    for index, line in enumerate(lines):
        y += 26.0 if index == 0 or line[0] != lines[index - 1][0] else 0.0
        tops.append(y)
        y += down
    width = left + across * len(lengths) + 10.0
    figure, (axes,) = canvas(y + 10.0, left=0.0, right=0.0, top=0.0, bottom=0.0, width=width)
    axes.set_xlim(0, width)
    axes.set_ylim(y + 10.0, 0)
    axes.axis("off")
    for column, seq_len in enumerate(lengths):
        axes.text(left + across * (column + 0.5), 44, length(seq_len), ha="center", fontsize=SMALL, color=MUTED)
    for index, backend in enumerate(dict.fromkeys(name for row in rows if row.winner is not None for name in row.winner.backends)):
        axes.add_patch(Rectangle((8 + 100 * index, 8), 14, 14, color=style_of(backend).light, lw=0))
        axes.text(28 + 100 * index, 19, backend, fontsize=TEXT, color=INK)
    for index, (op, setting, size) in enumerate(lines):
        if index == 0 or op != lines[index - 1][0]:
            axes.text(8, tops[index] - 7, op, fontsize=TEXT, color=INK, weight="bold")
        axes.text(8, tops[index] + 15, size, fontsize=8.5, color=INK)
        axes.text(104, tops[index] + 15, setting, fontsize=8.5, color=MUTED)
    for row in rows:
        if row.winner is not None:
            x, top = left + across * lengths.index(row.place.seq_len), tops[lines.index(row.place.line)]
            for part, backend in enumerate(row.winner.backends):
                wide = (across - 3) / len(row.winner.backends)
                axes.add_patch(Rectangle((x + part * wide, top), wide, down - 3, color=style_of(backend).light, lw=0))
            axes.text(x + (across - 3) / 2, top + 14, time_us(row.winner.us), ha="center", fontsize=8.5, color=PAPER)
    return Chart(figure, "Who wins: the tuned choice's backend and median time, by op, size and sequence length")


def _swarm(
    groups: Mapping[str, Sequence[Row]],
    value: Callable[[Row], float | None],
    told: Callable[[Sequence[Row]], tuple[str, ...]],
    titles: tuple[str, ...],
    label: str,
    limits: tuple[float, float],
    *,
    log: bool = False,
    hollow: Callable[[Row], bool] = lambda row: False,
) -> tuple[Figure, Axes]:
    """A line per op, a mark per bucket in its winner's colour, those that would overlap side by side; columns of numbers at the right."""
    step, column = 26.0, 45.0
    right = 10.0 + column * len(titles)
    figure, (axes,) = canvas(step * max(1, len(groups)) + 62.0, left=108.0, right=right, top=20.0, bottom=42.0)
    axes.set_xscale("log" if log else "linear")
    axes.set_xticks([], minor=True)
    axes.set_xlim(*limits)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    scale = (math.log(limits[1] / limits[0]) if log else limits[1] - limits[0]) / (WIDTH - 108.0 - right)
    for at, title in enumerate(titles):
        axes.annotate(
            title, (1, 1), (column * (at + 1), 5), xycoords="axes fraction", textcoords="offset points", fontsize=SMALL, color=MUTED, ha="right"
        )
    for index, found in enumerate(groups.values()):
        axes.axhline(index, color=GRID, lw=0.8, zorder=0)
        taken: list[tuple[float, float]] = []
        for x_value, row in sorted(((x, row) for row in found if (x := value(row)) is not None), key=lambda pair: pair[0]):
            x = (math.log(x_value) if log else x_value) / scale
            offset = next((o for o in (0.0, -5.5, 5.5, -10.0, 10.0) if all(math.hypot(x - a, o - b) > 6.0 for a, b in taken)), 0.0)
            taken.append((x, offset))
            style = style_of(row.winner.backends[0] if row.winner is not None else "")
            face = PAPER if hollow(row) else style.light
            axes.plot([x_value], [index + offset / step], ls="", marker=style.mark, ms=5.6, mfc=face, mec=style.light, mew=1.0, clip_on=False)
        for at, words in enumerate(told(found)):
            axes.annotate(
                words, (1, index), (column * (at + 1), 0), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=SMALL, color=INK,
                va="center", ha="right",
            )  # fmt: skip
    axes.set_yticks(range(len(groups)), list(groups), color=INK, fontsize=SMALL)
    axes.set_xlabel(label, fontsize=SMALL, color=MUTED, labelpad=5)
    return figure, axes

"""Charts of times: over sequence length, or at a single one. From rows; they draw and decide nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from titans_backends.reporting.canvas import GRID, INK, MUTED, PAPER, SMALL, TALL, TEXT, WIDTH, Chart, canvas, length_axis, pixels, time_axis
from titans_backends.reporting.numbers import amount, time_us
from titans_backends.reporting.palette import style_of
from titans_backends.reporting.rows import EAGER, Row, Timed

__all__ = ["panels", "strips", "times"]

_FAR = 8.0
"""A backend that takes so many times the fastest's time at every length may leave the chart."""


def times(rows: Sequence[Row]) -> Chart:
    """Time over sequence length, both logarithmic: a line per backend through its fastest, every candidate a faint dot, a ring where a row decides."""
    figure, (axes,) = canvas(TALL)
    notes = _draw(axes, rows)
    place = rows[0].place
    return Chart(figure, f"{place.op}, {place.setting}, {place.size}: median time over sequence length by backend", notes)


def panels(curves: Sequence[Sequence[Row]], columns: int = 3) -> Chart:
    """Several `times` in one figure, a title over each."""
    columns = min(columns, len(curves))
    head, lines = 40.0, -(-len(curves) // columns)
    height = lines * (TALL + head)
    boxes = [(index % columns * WIDTH, height - (index // columns) * (TALL + head) - head) for index in range(len(curves))]
    figure, found = canvas(height, width=columns * WIDTH, corners=boxes)
    for axes, rows in zip(found, curves, strict=True):
        _draw(axes, rows)
        for words, above, colour, weight in ((rows[0].place.size, 26, INK, "bold"), (rows[0].place.setting, 12, MUTED, "normal")):
            axes.annotate(
                words, (0, 1), (-40, above), xycoords="axes fraction", textcoords="offset points", fontsize=TEXT, color=colour, weight=weight
            )
    return Chart(figure, f"{curves[0][0].place.op}: median time over sequence length by backend")


def strips(rows: Sequence[Row]) -> Chart:
    """Times at a single length: a line per bucket, a mark per backend's fastest, every candidate a faint dot, a ring where a row decides."""
    step = 58.0
    figure, (axes,) = canvas(step * len(rows) + 40.0, left=6.0, right=8.0, top=4.0, bottom=26.0)
    notes: dict[str, list[str]] = {}
    axes.set_xscale("log")
    known = [one.us for row in rows for one in (*row.best, *([row.winner] if row.winner else []))]
    floors = [row.floor.us for row in rows if row.floor is not None]
    low, high = min([*known, *floors]) / 1.35, max(known) * 1.7
    axes.set_xlim(low, high)
    axes.set_ylim(len(rows) - 0.55, -0.68)
    for index, row in enumerate(rows):
        axes.axhline(index, color=GRID, lw=1, zorder=0)
        for words, above, colour in ((f"{row.place.size}  ·  {amount(row.place.seq_len, 'token')}", 24, INK), (row.place.setting, 12, MUTED)):
            axes.annotate(words, (0, index), (0, above), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=SMALL, color=colour)
        for tried in row.tried if row.place.regime == "inference" else ():
            if tried.us is not None and tried.us < high:
                axes.plot([tried.us], [index], ls="", marker="o", ms=3.4, mew=0, color=style_of(tried.backend).light, alpha=0.3)
        if row.floor is not None:
            axes.plot([row.floor.us] * 2, [index - 0.16, index + 0.16], color=MUTED, lw=1.4, ls=(0, (3, 1.5)))
        for one in reversed(row.best):
            style, gid = style_of(one.backends[0]), f"mark-{index}-{one.backends[0]}"
            axes.plot([one.us], [index], ls="", marker=style.mark, ms=7, color=style.light, mec=PAPER, mew=0.7, gid=gid)
            notes[gid] = [f"{one.who}: {time_us(one.us)}{_spread(one)}, {one.label}"]
        if row.winner is not None and row.decided:
            axes.plot([row.winner.us], [index], ls="", marker="o", ms=12, mfc="none", mec=INK, mew=1.2)
        _name_marks(axes, row, index)
    axes.set_yticks([])
    time_axis(axes, vertical=False)
    return Chart(figure, f"{rows[0].place.op}: median times at one length by backend", notes)


def _draw(axes: Axes, rows: Sequence[Row]) -> dict[str, list[str]]:
    """What `times` shows; gives the notes of its marks."""
    notes: dict[str, list[str]] = {}
    lengths = sorted({row.place.seq_len for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    chosen = [(row.place.seq_len, row.winner.us) for row in rows if row.winner is not None and row.decided]
    highest, choice_at = _highest(rows), dict(chosen)
    ends: list[tuple[float, str, str]] = []
    for backend in _backends(rows):
        style = style_of(backend)
        for row in rows:
            dots = [one.us for one in row.tried if one.backend == backend and one.us is not None and row.place.regime == "inference"]
            axes.plot([row.place.seq_len] * len(dots), dots, ls="", marker="o", ms=3.4, mew=0, color=style.light, alpha=0.3)
        points = [(row.place.seq_len, one) for row in rows for one in row.best if one.backends == (backend,)]
        gid = f"line-{backend}"
        axes.plot(
            [x for x, _ in points], [one.us for _, one in points], marker=style.mark, ms=5.5, lw=1.8, color=style.light, mec=PAPER, mew=0.7, gid=gid
        )
        notes[gid] = [f"{backend}, {x} tokens: {time_us(one.us)}{_spread(one)}, {one.label}" for x, one in points]
        x, last = points[-1]
        above = last.us > highest * 1.5 and x in choice_at
        ends.append((last.us, f"{backend} ↑ {last.us / choice_at[x]:.0f}×" if above else backend, style.light))
    floors = [(row.place.seq_len, row.floor.us) for row in rows if row.floor is not None]
    if floors:
        axes.plot([x for x, _ in floors], [us for _, us in floors], ls=(0, (4, 3)), lw=1.2, color=MUTED)
        ends.append((floors[-1][1], "floor", MUTED))
    axes.plot([x for x, _ in chosen], [us for _, us in chosen], ls="", marker="o", ms=11, mfc="none", mec=INK, mew=1.2)
    axes.set_xlim(lengths[0] / 1.25, lengths[-1] * 1.25)
    lowest = min([us for _, us in floors] + [us for _, us in chosen] + [one.us for row in rows for one in row.best])
    axes.set_ylim(lowest / 1.4, highest * 1.5)
    length_axis(axes, lengths)
    time_axis(axes)
    _label_ends(axes, ends)
    axes.set_xlabel("sequence length, tokens", fontsize=SMALL, color=MUTED, labelpad=3)
    return notes


def _highest(rows: Sequence[Row]) -> float:
    """The slowest fastest of a backend. Plain torch is left out where there is another, and who is far behind everywhere: it may be a hundred times the others."""
    near = {one.backends for row in rows for one in row.best if one.backends != (EAGER,) and one.us <= _FAR * row.best[0].us}
    found = [one.us for row in rows for one in row.best if one.backends in near] or [one.us for row in rows for one in row.best]
    return max([*found, *(row.winner.us for row in rows if row.winner is not None)])


def _backends(rows: Sequence[Row]) -> list[str]:
    """The backends with a time somewhere, the slowest first, so that the fastest lies on top."""
    found = {one.backends[0]: one.us for row in rows for one in row.best}
    return sorted(found, key=lambda name: -found[name])


def _spread(one: Timed) -> str:
    return "" if one.spread is None else f" ± {100 * one.spread:.0f} %"


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Each line's name at its right end, pushed apart where two would touch."""
    low, high = axes.get_ylim()
    tall = pixels(axes)[1]
    at = sorted((min(tall, tall * math.log(us / low) / math.log(high / low)), name, colour) for us, name, colour in ends)
    places: list[float] = []
    for wanted, _, _ in at:
        places.append(max(wanted, places[-1] + 12.0) if places else max(wanted, 3.0))
    over = max(0.0, places[-1] - (tall - 2.0)) if places else 0.0
    for index in reversed(range(len(places))):
        ceiling = places[index + 1] - 12.0 if index + 1 < len(places) else tall
        places[index] = min(places[index] - (over if index + 1 == len(places) else 0.0), ceiling)
    for place, (_, name, colour) in zip(places, at, strict=True):
        axes.annotate(
            name,
            (1, place / tall),
            (7, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=TEXT,
            color=colour,
            va="center",
            weight="bold",
        )


def _name_marks(axes: Axes, row: Row, index: int) -> None:
    """Backends below their marks, where there is room; the winner's with its time."""
    low, high = (math.log(x) for x in axes.get_xlim())
    wide = pixels(axes)[0]
    taken: list[tuple[float, float]] = []
    named = [(row.winner, f"{row.winner.who} {time_us(row.winner.us)}")] if row.winner is not None else []
    named += [(one, one.who) for one in row.best if row.winner is None or one.backends != row.winner.backends]
    for one, words in named:
        half = 2.7 * len(words)
        x = min(max(wide * (math.log(one.us) - low) / (high - low), half), wide - half)
        if all(x + half < start or x - half > end for start, end in taken):
            taken.append((x - half - 4, x + half + 4))
            colour = style_of(one.backends[0]).light
            axes.annotate(
                words, (x / wide, index), (0, -9), xycoords=("axes fraction", "data"), textcoords="offset points", ha="center", va="top",
                fontsize=SMALL, color=colour,
            )  # fmt: skip

"""The race in one picture: a row for each case, a mark for each backend at its time over the fastest one's, on a logarithmic axis. Measures nothing.

Beside each row stand who is fastest, in what time, and what `get_op` costs over that. `narrow` puts forward above training, for a phone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from race_cells import CASES
from race_lines import BAND, MODES, PEERS, TITLES, Line, cost, in_order, number

from titans_backends.reporting import svg
from titans_backends.reporting.canvas import GRID, INK, MUTED, PAPER, SMALL, TEXT
from titans_backends.reporting.palette import INKS, style_of

__all__ = ["drawn", "written"]

ROW, LEFT, TOP, HEAD, BOTTOM = 17.0, 102.0, 62.0, 38.0, 30.0
"""Pixels: a row, what stands left of a panel, above the first one, above each, below each for its axis."""
COLUMNS = (12.0, 134.0, 184.0, 234.0)
"""Right of a panel: where the fastest one's name begins, and where its time and two costs end."""
GAP, LEGEND = 16.0, 17.0
"""Between panels side by side, and a line of the legend."""
APART = 0.03
"""From this difference on a peer's own function has a mark of its own."""
MOST = 6.0
"""Over the fastest; what is slower stands at the edge with its factor, and plain torch, which is far off, not at all."""
SHOWN = tuple(who for who in TITLES if who in ("triton", "cupy", "two", "fla", "flash_qla", "flashinfer"))
TITLE = "gated_delta_rule in bfloat16: time over the fastest"
ABOUT = (
    "{device}, in a CUDA graph from a cold cache. Left is better.",
    "Tuned: by these times, peers installed. Shipped: by the table here, which names no peer.",
)
COSTS = {"here": "tuned", "dispatch": "shipped"}


def written(lines: Sequence[Line], path: Path, device: str, png: Path | None = None) -> list[Path]:
    """Draws it into two SVG files, the narrow one as `NAME-narrow.svg`; where a name is given, into a PNG as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = []
    for narrow in (False, True):
        figure = drawn(lines, device, narrow=narrow)
        file = path.with_name(f"{path.stem}-narrow{path.suffix}") if narrow else path
        file.write_text(svg.standalone(figure, f"{TITLE}. {ABOUT[0].format(device=device)}"), encoding="utf-8")
        files.append(file)
        if png is not None and not narrow:
            figure.savefig(png, dpi=144, facecolor=INKS["paper"].light, metadata={"Software": None})
            files.append(png)
    return files


def drawn(lines: Sequence[Line], device: str, *, narrow: bool = False) -> Figure:
    """A panel for each direction, rows in groups of heads."""
    panels = [(title, in_order(line for line in lines if line.case.mode == mode)) for mode, title in MODES.items()]
    panels = [(title, some) for title, some in panels if some]
    if not panels:
        raise ValueError("there is no case with a time; run benchmarks/race.py first")
    wide = 100.0 if narrow else 130.0
    across = LEFT + wide + COLUMNS[-1]
    tall = [HEAD + len(some) * ROW + BOTTOM for _, some in panels]
    handles = _handles(lines)
    per_line = 3 if narrow else 8
    width = across + 4 if narrow else len(panels) * across + (len(panels) - 1) * GAP + 4
    height = TOP + (sum(tall) if narrow else max(tall)) + LEGEND * -(-len(handles) // per_line) + 10
    figure = Figure(figsize=(width / 72, height / 72))
    figure.text(2 / width, 1 - 17 / height, TITLE, color=INK, fontsize=TEXT + 2, fontweight="bold")
    some = "" if len(lines) >= len(CASES) else f" {len(lines)} of {len(CASES)} cases."
    for row, words in enumerate((ABOUT[0].format(device=device) + some, ABOUT[1])):
        figure.text(2 / width, 1 - (34 + 14 * row) / height, words, color=MUTED, fontsize=SMALL)
    for index, (title, some) in enumerate(panels):
        left = LEFT + (0.0 if narrow else index * (across + GAP))
        top = TOP + HEAD + (sum(tall[:index]) if narrow else 0.0)
        rows = len(some) * ROW
        axes = figure.add_axes((left / width, 1 - (top + rows) / height, wide / width, rows / height))
        _panel(axes, title, some, wide)
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(2 / width, 2 / height), ncols=per_line, frameon=False, fontsize=SMALL, labelcolor=INK,
        handletextpad=0.2, columnspacing=1.1, borderpad=0.2,
    )  # fmt: skip
    return figure


def _panel(axes: Axes, title: str, lines: Sequence[Line], wide: float) -> None:
    axes.patch.set_visible(False)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=SMALL, labelcolor=MUTED, pad=4)
    axes.set_xscale("log")
    axes.set_xlim(0.9, MOST * 1.1)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    ticks = [1, 2, 3, 4, 6]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_xticks([], minor=True)
    for tick in ticks:
        axes.axvline(tick, color=MUTED if tick == 1 else GRID, lw=0.8, zorder=0)
    cells = [line.case.cell for line in lines]
    axes.set_yticks(range(len(lines)), [f"{cell.B}×{cell.T}" if cell.B > 1 else f"{cell.T}" for cell in cells])
    right = 1 + COLUMNS[-1] / wide
    for index, (one, other) in enumerate(pairwise(cells)):
        if (one.G, one.H, one.D) != (other.G, other.H, other.D):
            axes.plot([-LEFT / wide, right], [index + 0.5] * 2, color=GRID, lw=0.8, zorder=0, transform=axes.get_yaxis_transform(), clip_on=False)
    for row, cell in enumerate(cells):
        if row == 0 or (cells[row - 1].G, cells[row - 1].H, cells[row - 1].D) != (cell.G, cell.H, cell.D):
            _said(axes, row, -LEFT + 2, f"{cell.G}/{cell.H} of {cell.D}", wide, ha="left", fontweight="bold")
    for words, x, align in (
        ("heads", -LEFT + 2, "left"), ("tokens", -5.0, "right"), ("fastest", wide + COLUMNS[0], "left"), ("time", wide + COLUMNS[1], "right"),
        *((words, wide + x, "right") for words, x in zip(COSTS.values(), COLUMNS[2:], strict=True)),
    ):  # fmt: skip
        axes.annotate(words, (0, 1), (x, 1), xycoords="axes fraction", textcoords="offset points", fontsize=SMALL, color=MUTED, ha=align, va="bottom")
    axes.annotate(
        "get_op costs",
        (0, 1),
        (wide + COLUMNS[-1], 14),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=SMALL,
        color=MUTED,
        ha="right",
    )
    axes.annotate(title, (0, 1), (-LEFT + 2, 18), xycoords="axes fraction", textcoords="offset points", fontsize=TEXT, color=INK, fontweight="bold")
    for row, line in enumerate(lines):
        _marks(axes, row, line)
        _beside(axes, row, line, wide)


def _said(axes: Axes, row: int, x: float, words: str, wide: float, *, ha: str, color: str = INK, fontweight: str = "normal") -> None:
    axes.text(x / wide, row, words, transform=axes.get_yaxis_transform(), color=color, fontsize=SMALL, fontweight=fontweight, va="center", ha=ha)


def _beside(axes: Axes, row: int, line: Line, wide: float) -> None:
    """Who is fastest, its time, and what the choices cost; what is over the band is bold."""
    who = "two" if "+" in line.winner.who else line.winner.who
    own = line.winner.kind == "own" and any(one == who for _, one, hollow in _times(line) if hollow)
    _mark(axes, (wide + COLUMNS[0] + 4) / wide, row, who, line, axes.get_yaxis_transform(), hollow=own)
    words = " + ".join(TITLES.get(one, one) for one in line.winner.who.split("+"))
    _said(axes, row, wide + COLUMNS[0] + 13, words, wide, ha="left")
    _said(axes, row, wide + COLUMNS[1], _time(line.winner.us(line.way) or 0.0), wide, ha="right")
    for what, x in zip(COSTS, COLUMNS[2:], strict=True):
        if what in line.choices:
            regret = line.choices[what][1]
            over = regret is None or regret > BAND
            words = cost(regret) if regret is None or regret < 1 else f"{1 + regret:.1f}×"
            _said(axes, row, wide + x, words, wide, ha="right", color=INK if over else MUTED, fontweight="bold" if over else "normal")


def _marks(axes: Axes, row: int, line: Line) -> None:
    least = line.winner.us(line.way) or 1.0
    ratios = sorted(((us / least, who, own) for us, who, own in _times(line)), reverse=True)
    axes.plot([1, min(MOST, max([1.0, *(ratio for ratio, _, _ in ratios)]))], [row, row], color=GRID, lw=2.0, zorder=1, solid_capstyle="butt")
    for ratio, who, own in ratios:
        _mark(axes, min(MOST, ratio), row, who, line, axes.transData, hollow=own)
    far = max((ratio for ratio, _, _ in ratios if ratio > MOST), default=None)
    if far is not None:
        axes.annotate(f"{far:.0f}×", (MOST, row), (-6, 0), textcoords="offset points", color=MUTED, fontsize=SMALL - 1, va="center", ha="right")
    _, regret = line.choices.get("here", ("", None))
    if regret is not None:
        axes.plot([min(MOST, 1 + max(0.0, regret))], [row], "o", color=INK, markerfacecolor="none", markersize=11.5, markeredgewidth=1.3, zorder=4)


def _times(line: Line) -> Iterator[tuple[float, str, bool]]:
    """A time of each backend, and that of a peer's own function where it is another one."""
    for who in SHOWN:
        best, own = line.best(who), line.own(who) if who in PEERS else None
        us, own_us = (None if one is None else one.us(line.way) for one in (best, own))
        if us is not None:
            yield us, who, False
        if own_us is not None and (us is None or abs(own_us / us - 1) > APART):
            yield own_us, who, True


def _mark(axes: Axes, x: float, row: int, who: str, line: Line, transform: object, *, hollow: bool = False) -> None:
    pair = line.best("two") if who == "two" else None
    look = _look(pair.who if pair is not None else who, hollow=hollow)
    axes.plot([x], [row], zorder=3, linestyle="none", transform=transform, clip_on=False, **look)


def _look(who: str, *, hollow: bool = False) -> dict[str, object]:
    """A marker's: a pair of two backends is a diamond in both colours, a peer's own function hollow."""
    one, other = (style_of(name) for name in (who.split("+") * 2)[:2])
    if "+" in who:
        return {
            "marker": "D", "fillstyle": "left", "color": one.light, "markerfacecolor": one.light, "markerfacecoloralt": other.light, "markersize": 6.0,
            "markeredgewidth": 0.0,
        }  # fmt: skip
    size = 8.5 if one.mark in "*Xp" else 6.5
    if hollow:
        return {"marker": one.mark, "color": one.light, "markerfacecolor": PAPER, "markersize": size, "markeredgewidth": 1.1}
    return {"marker": one.mark, "color": one.light, "markersize": size, "markeredgewidth": 0.0}


def _time(us: float) -> str:
    return f"{number(us)} µs" if us < 1000 else f"{us / 1000:.3g} ms"


def _handles(lines: Sequence[Line]) -> list[Line2D]:
    return [Line2D([], [], linestyle="none", label=label, **look) for label, look in _legend(lines)]  # type: ignore[arg-type]


def _legend(lines: Sequence[Line]) -> Iterator[tuple[str, dict[str, object]]]:
    for who in SHOWN:
        if who == "two":
            pairs = [found.who for line in lines if (found := line.best("two")) is not None]
            if pairs:
                yield "two, a direction each", _look(pairs[0])
        elif any(line.best(who) or (who in PEERS and line.own(who)) for line in lines):
            yield TITLES[who], _look(who)
    apart = next((who for line in lines for _, who, own in _times(line) if own), None)
    if apart is not None:
        yield "hollow: a peer’s own function, where it differs", _look(apart, hollow=True)
    peers = any(line.best(who) for line in lines for who in PEERS)
    ring: dict[str, object] = {"marker": "o", "color": INK, "markerfacecolor": "none", "markersize": 10.0, "markeredgewidth": 1.3}
    yield f"get_op, tuned here{', peers installed' if peers else ''}", ring

"""What race.py measured, for people: tables in the terminal and on docs/race.md, and the README's picture. Measures nothing.

    python benchmarks/race_page.py [--json FILE]            prints the tables
    python benchmarks/race_page.py --draw [--json FILE]     writes docs/race.md between its marks, docs/pictures/race.svg and race-narrow.svg (--png FILE: to look at)
    python benchmarks/race_page.py --check                  writes nothing; status 1 where the page's tables are not what the file says

FILE is benchmarks/results/race.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from race_cells import GROUPS
from race_lines import (
    BAND,
    CHOICES,
    MODES,
    PEERS,
    TITLES,
    WAYS,
    Line,
    columns,
    cost,
    device_of,
    in_order,
    kept,
    lines_of,
    missing,
    number,
    partial,
    said,
    whose,
    won,
)  # fmt: skip
from race_results import Entrant, Results, Way, standings

__all__ = ["compact", "page_of"]

ROOT = Path(__file__).resolve().parent.parent
FILE, PAGE, PICTURE = ROOT / "benchmarks/results/race.json", ROOT / "docs/race.md", ROOT / "docs/pictures/race.svg"
ENOUGH = 12
"""Cases from which on there is a picture."""
_PICTURE = """<picture>
<source media="(max-width: 640px)" srcset="pictures/race-narrow.svg">
<img src="pictures/race.svg" alt="A row for each case: the time of each backend over the fastest, who that is, and what get_op costs over it">
</picture>"""
BEGIN, END = "<!-- race: written by benchmarks/race_page.py -->", "<!-- race: end -->"
COMMAND = "python benchmarks/race.py --warm --with fla=SITE1 --with flashinfer=SITE2 --json benchmarks/results/race.json"


def compact(results: Results, names: Sequence[str] | None = None) -> str:
    """For a terminal: a line a case, graph times, own calls, and both choices, in a graph and called eagerly."""
    graph, wall = lines_of(results, "graph", names), {str(line.case): line for line in lines_of(results, "wall", names)}
    if not graph:
        return "nothing was measured"
    shorts = {"triton": "tri", "cupy": "cu", "two": "2", "flash_qla": "qla", "flashinfer": "fi", "inductor": "ind", "numba": "nu", "numba_cpu": "nc"}
    who = columns(graph)
    listed = [
        "us in a graph by backend (o: a peer's own call) | winner | dispatch, tuned here, tuned here without peers: cost over the best | eagerly"
    ]
    for line in graph:
        times = " ".join(f"{shorts.get(one, one)} {number(best.us('graph'))}" for one in who if (best := line.best(one)))
        own = " ".join(f"o.{shorts.get(one, one)} {number(mine.us('graph'))}" for one in (*PEERS, "fla_ungated") if (mine := line.own(one)))
        eager = wall.get(str(line.case))
        told = " ".join(f"{what[:4]} {whose(line.found, label)[:13]} {cost(r)}" for what, (label, r) in line.choices.items())
        more = "" if eager is None else f"{whose(eager.found, eager.winner.label)[:13]} {number(eager.winner.us('wall'))} " + " ".join(
            f"{what[:4]} {cost(regret)}" for what, (_, regret) in eager.choices.items()
        )  # fmt: skip
        name = str(line.case).replace(" forward", " f").replace(" training", " fb")
        listed.append(f"{name} [{number(line.found.floor_us)}] {times} {own} | {whose(line.found, line.winner.label)[:13]} | {told} | {more}")
    return "\n".join([*partial(results), *listed, *summary(graph), *summary(list(wall.values())), *list(missing(results))[:12]])


def summary(lines: Sequence[Line]) -> Iterator[str]:
    """How good each choice was over the cases, for a terminal."""
    way = lines[0].way if lines else "graph"
    for what, one in kept(lines).items():
        yield (
            f"{CHOICES[what]}, {WAYS[way]}: at most 5 % over the best in {len(one.costs) - len(one.over)} of {len(one.costs)} cases; "
            f"mean {cost(statistics.mean(one.costs.values()))}, worst {cost(one.costs[one.worst])} ({one.worst}); "
            f"over the best backend, without the peers' own functions: {sum(cost <= BAND for cost in one.beside)} of {len(one.beside)}, "
            f"worst {cost(max(one.beside))}"
        )


def _kept_table(lines: Sequence[Line]) -> str:
    """The same for the page; below it the cases where the choice of this machine's tuner costs too much."""
    found = kept(lines)
    head = ["choice", "at most 5 % over the fastest", "mean", "worst", "in", "at most 5 % over the fastest backend, peers' own calls left out"]
    rows = [_row(head), _row(["---"] * len(head))]
    for what, one in found.items():
        within, beside = len(one.costs) - len(one.over), sum(regret <= BAND for regret in one.beside)
        mean, most = cost(statistics.mean(one.costs.values())), cost(one.costs[one.worst])
        rows.append(_row([CHOICES[what], f"{within} of {len(one.costs)}", mean, most, said(one.worst), f"{beside} of {len(one.beside)}"]))
    text = "\n".join(rows)
    over = found["here"].over if "here" in found else []
    listed = ", ".join(f"{said(name)} {cost(found['here'].costs[name])}" for name in over)
    return f"{text}\n\nTuned here, more than 5 % over the fastest: {listed}." if over else text


def markdown(results: Results) -> str:
    """The page's tables."""
    if not results.cases:
        return f"Not measured yet: `{COMMAND}`, then `python benchmarks/race_page.py --draw`."
    measured = lines_of(results, "graph")
    parts = [*partial(results), *([_PICTURE] if len(measured) >= ENOUGH else []), _facts(results)]
    for way, title in WAYS.items():
        lines = lines_of(results, way)
        if not lines:
            continue
        parts.append(f"## {title[0].upper()}{title[1:]}")
        parts.append(f"Fastest of all: {won(lines)}, of {len(lines)} cases.")
        parts.append(_kept_table(lines))
        parts.append(
            "Times in microseconds. Bold: the fastest of its row, which may be a peer's own function; the peers' columns have their backends here."
        )
        for mode, heading in MODES.items():
            some = in_order(line for line in lines if line.case.mode == mode)
            if some:
                parts.append(f"### {heading}, {'graph' if way == 'graph' else 'eager'}\n\n{_table(some)}")
        if way == "graph":
            own = in_order(line for line in lines if any(line.own(who) for who in (*PEERS, "fla_ungated")))
            if own:
                parts.append(f"### The peers by their own functions, in a graph\n\n{_through(own)}{_own_table(own)}")
    left = list(missing(results))
    if left:
        parts.append("## What failed, and what was not reached\n\n" + "\n".join(f"- {one}" for one in left[:40]))
    return "\n\n".join(parts)


def _facts(results: Results) -> str:
    """Who ran on what."""
    runs = []
    for name in (name for name in GROUPS if name in results.runs):
        run = results.runs[name]
        versions = run.get("versions")
        told = (
            ", ".join(f"{TITLES.get(one, one)} {number}" for one, number in versions.items() if one != "fla_ungated")
            if isinstance(versions, dict)
            else ""
        )
        runs.append(f"run `{name}` on {run['date']}: {run['device']}, torch {run['torch']}, {told}, candidates: {run.get('candidates', 'all')}")
    scales = [
        scale["graph"]
        for parts in results.cases.values()
        if (found := standings(parts)) is not None
        for scale in found.scales.values()
        if "graph" in scale
    ]
    more = f" Later runs' times were multiplied by {min(scales):.3f} to {max(scales):.3f} to stand on the first one's scale." if scales else ""
    return f"{'; '.join(runs)}.{more} Every time: [race.json](../benchmarks/results/race.json)."


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(lines: Sequence[Line]) -> str:
    who = columns(lines)
    ways = {"dispatch": "`get_op`", "here": "tuned here", "ours": "without peers"}
    there = [what for what in ways if any(what in line.choices for line in lines)]
    floor = any(line.found.floor_us for line in lines)
    head = ["case", *(["floor"] if floor else []), *(TITLES[one] for one in who), "fastest", *(f"{ways[what]}: cost" for what in there)]
    rows = [_row(head), _row(["---"] * len(head))]
    for line in lines:
        times = []
        for one in who:
            best = line.best(one)
            text = number(None if best is None else best.us(line.way))
            times.append(f"**{text}**" if best is line.winner and text else text)
        chosen = []
        for what in there:
            label, regret = line.choices.get(what, ("", None))
            chosen.append(f"{whose(line.found, label)}: {cost(regret)}" if label else "")
        cell = line.case.cell
        name = f"{cell.B}×{cell.T} {cell.G}/{cell.H} D{cell.D}"
        own = f" **{number(line.winner.us(line.way))}**" if line.winner.kind == "own" else ""
        rows.append(_row([name, *([number(line.found.floor_us)] if floor else []), *times, f"{whose(line.found, line.winner.label)}{own}", *chosen]))
    return "\n".join(rows)


def _through(lines: Sequence[Line]) -> str:
    """What the way through this library costs a peer, where both were timed."""
    told = []
    for who in PEERS:
        pairs = [(mine, own) for line in lines if (mine := _us(line.best(who), line.way)) and (own := _us(line.own(who), line.way))]
        ratios = [mine / own for mine, own in pairs]
        if ratios:
            mean = statistics.geometric_mean(ratios)
            told.append(f"{TITLES[who]} {mean:.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} cases)")
    return f"A peer's time as a backend here over that of its own function, geometric mean: {'; '.join(told)}.\n\n" if told else ""


def _us(one: Entrant | None, way: Way) -> float | None:
    return None if one is None else one.us(way)


def _own_table(lines: Sequence[Line]) -> str:
    who = [one for one in (*PEERS, "fla_ungated") if any(line.own(one) for line in lines)]
    titles = {**TITLES, "fla_ungated": "FLA's rule without a decay"}
    head = ["case", *(f"{titles[one]}{'' if one == 'fla_ungated' else ': its backend here / own call'}" for one in who)]
    rows = [_row(head), _row(["---"] * len(head))]
    for line in lines:
        cells = []
        for one in who:
            mine, behind = line.own(one), line.best(one)
            own = number(None if mine is None else mine.us("graph"))
            cells.append(
                own
                if one == "fla_ungated"
                else f"{number(None if behind is None else behind.us('graph')) or '–'} / {own or '–'}"
                if mine or behind
                else ""
            )
        rows.append(_row([said(str(line.case)), *cells]))
    return "\n".join(rows)


def page_of(page: str, results: Results) -> str:
    """The page with the tables between its marks; ValueError where these are missing."""
    head, found, rest = page.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"the page lacks the marks {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n\n{markdown(results)}\n\n{END}{tail}"


def main(given: list[str] | None = None) -> int:
    """Prints, writes or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=FILE, metavar="FILE")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument("--picture", type=Path, default=PICTURE, metavar="FILE")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--png", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args(given)
    results = Results.read(asked.json)
    if not results.cases and not asked.check:
        print(f"error: {asked.json} holds no race; type: {COMMAND}", file=sys.stderr)
        return 2
    if asked.check or asked.draw:
        before = asked.page.read_text(encoding="utf-8")
        after = page_of(before, results)
        if asked.check:
            print(
                "as the results say"
                if after == before
                else f"{asked.page.name} is not what the results say; type: python benchmarks/race_page.py --draw"
            )
            return int(after != before)
        from race_picture import written

        asked.page.write_text(after, encoding="utf-8")
        lines = lines_of(results, "graph")
        print(asked.page, *(written(lines, asked.picture, device_of(results), asked.png) if len(lines) >= ENOUGH else []), sep="\n")
        return 0
    print(compact(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

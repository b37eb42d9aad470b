"""What the race's pages and its picture show: a case for a line, who won it, what each choice costs there, and what is missing. Measures nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from race_cells import CASES, GROUPS, Case
from race_results import Entrant, Results, Standings, Way, chosen_of, standings

__all__ = [
    "BAND", "CHOICES", "MODES", "PEERS", "TITLES", "WAYS", "Kept", "Line", "columns", "cost", "device_of", "in_order", "kept", "lines_of", "missing", "number",
    "partial", "said", "whose", "won",
]  # fmt: skip

PEERS = ("fla", "flash_qla", "flashinfer")
TITLES = {
    "triton": "Triton", "cupy": "CuPy", "two": "two of them", "fla": "FLA", "flash_qla": "FlashQLA", "flashinfer": "FlashInfer",
    "eager": "eager", "inductor": "Inductor", "numba": "Numba", "numba_cpu": "Numba",
}  # fmt: skip
BAND = 0.05
"""What a choice may cost over the best."""
MODES = {"forward": "Forward", "training": "Forward and backward"}
WAYS: Mapping[Way, str] = {"graph": "in a CUDA graph, from a cold cache", "wall": "called eagerly, back to back"}


@dataclass(frozen=True, slots=True)
class Line:
    """One case for a table. `choices`: by what is chosen from, the choice's label and its regret: dispatch's, tuned here, and that without the peers."""

    case: Case
    way: Way
    found: Standings
    winner: Entrant
    choices: Mapping[str, tuple[str, float | None]]

    def best(self, who: str) -> Entrant | None:
        """A backend's fastest; a pair of two backends stands under `two`."""
        timed = [one for one in self.found.timed(self.way) if one.kind == "backend"]
        return next((one for one in timed if (one.who == who or (who == "two" and "+" in one.who))), None)

    def own(self, who: str) -> Entrant | None:
        """A peer's own function."""
        return next((one for one in self.found.entrants if one.who == who and one.kind != "backend" and one.us(self.way) is not None), None)


def lines_of(results: Results, way: Way, names: Sequence[str] | None = None) -> list[Line]:
    """The cases that were measured, in the order of the race."""
    known = {str(case): case for case in CASES}
    found = []
    for name in names if names is not None else [*known, *(name for name in results.cases if name not in known)]:
        if name not in results.cases:
            continue
        stands = standings(results.cases[name])
        winner = None if stands is None else stands.winner(way)
        if stands is None or winner is None:
            continue
        labels = {"here": chosen_of(stands, way), "ours": chosen_of(stands, way, PEERS)}
        if way in stands.dispatch:
            labels["dispatch"] = stands.dispatch[way].label
        choices = {what: (label, stands.regret(label, way)) for what, label in labels.items() if label}
        found.append(Line(known.get(name) or _case(name), way, stands, winner, choices))
    return found


def _case(name: str) -> Case:
    """A case that is not in the table, from its name."""
    from against_fla import Cell

    sizes, heads, dim, mode = name.split()
    return Case(Cell(*map(int, sizes.split("x")), *map(int, heads.split("/")), int(dim[1:])), mode)  # type: ignore[arg-type]


def in_order(lines: Iterable[Line]) -> list[Line]:
    """For people: large heads first, few of them first, short sequences first, batches behind single sequences."""
    return sorted(lines, key=lambda line: (-line.case.cell.D, line.case.cell.H, line.case.cell.G, line.case.cell.B, line.case.cell.T))


def device_of(results: Results) -> str:
    """The card of the first run."""
    return next((str(results.runs[name]["device"]) for name in GROUPS if name in results.runs), "a GPU")


def columns(lines: Sequence[Line]) -> list[str]:
    """The backends that have a time anywhere."""
    return [who for who in TITLES if any(line.best(who) for line in lines)]


def whose(found: Standings, label: str) -> str:
    """Whose a choice is, in a word or two."""
    entrant = next((one for one in (*found.entrants, *found.contenders) if one.label == label), None)
    who = label.split("/")[0] if entrant is None else entrant.who
    said = " + ".join(TITLES.get(one, one) for one in who.split("+"))
    return f"{said}, own call" if isinstance(entrant, Entrant) and entrant.kind == "own" else said


def number(us: float | None) -> str:
    """Microseconds, three digits."""
    return "" if us is None else f"{us:.3g}" if us < 1000 else f"{us:.0f}"


def cost(regret: float | None) -> str:
    """A choice's cost over the best."""
    return "?" if regret is None else f"+{100 * regret:.1f} %" if regret > 0 else "0"


CHOICES = {"dispatch": "`get_op` with what is shipped", "here": "tuned here, with the peers installed", "ours": "tuned here, without them"}


@dataclass(frozen=True, slots=True)
class Kept:
    """How good a choice was over the cases: `costs` over the fastest of all by case, `beside` over the fastest backend."""

    costs: Mapping[str, float]
    beside: Sequence[float]

    @property
    def over(self) -> list[str]:
        """The cases where it costs too much, the worst first."""
        return sorted((name for name, one in self.costs.items() if one > BAND), key=lambda name: -self.costs[name])

    @property
    def worst(self) -> str:
        """The case where it costs most."""
        return max(self.costs, key=lambda name: self.costs[name])


def kept(lines: Sequence[Line]) -> dict[str, Kept]:
    """By choice; one that has no time anywhere is left out."""
    found = {}
    for what in CHOICES:
        costs = {str(line.case): regret for line in lines if (regret := line.choices.get(what, ("", None))[1]) is not None}
        beside = [line.found.regret(line.choices[what][0], line.way, backends=True) for line in lines if what in line.choices]
        if costs:
            found[what] = Kept(costs, [one for one in beside if one is not None])
    return found


def won(lines: Sequence[Line]) -> str:
    """Who is fastest in how many cases; a peer's own function counts for the peer, and is told."""
    counts = Counter(" + ".join(TITLES.get(one, one) for one in line.winner.who.split("+")) for line in lines)
    own = Counter(TITLES.get(line.winner.who, line.winner.who) for line in lines if line.winner.kind == "own")
    return ", ".join(f"{who} in {count}{f' ({own[who]} by its own function)' if own[who] else ''}" for who, count in counts.most_common())


def said(name: str) -> str:
    """A case as the tables have it."""
    sizes, *rest = name.split()
    return " ".join([sizes.replace("x", "×"), *rest])


def missing(results: Results) -> Iterator[str]:
    """Cases that have no time, what was wrong, and runs that could not be put on the first one's scale."""
    absent = [str(case) for case in CASES if not any(part.entrants for part in results.cases.get(str(case), {}).values())]
    if absent and len(absent) < len(CASES):
        yield f"not measured: {', '.join(map(said, absent))}"
    for name, parts in results.cases.items():
        for group, part in parts.items():
            for one in part.entrants:
                if one.failed:
                    yield f"{name}: {one.label[:80]}: {one.failed[:200]}"
            if part.failed:
                yield f"{name}, {group}: {part.failed[:300]}"
        stands = standings(parts)
        if stands is not None and stands.adrift:
            yield f"{name}: nothing in common with the first run, left out: {', '.join(stands.adrift)}"


def partial(results: Results) -> Iterator[str]:
    """A sentence where the race is not over: how many cases were reached, and which peers have no time at all."""
    measured = {str(line.case) for line in lines_of(results, "graph")}
    there = {one.who for parts in results.cases.values() for part in parts.values() for one in part.entrants if one.graph_us is not None}
    absent = [TITLES[who] for who in PEERS if who not in there]
    reached = sum(str(case) in measured for case in CASES)
    if reached < len(CASES) or absent:
        without = f", and {' and '.join(absent)} in none" if absent else ""
        whole = f"All {reached} cases have been measured" if reached == len(CASES) else f"Partial: {reached} of {len(CASES)} cases have been measured"
        others = " What stands here says nothing about the others, and" if reached < len(CASES) else ""
        yield (f"**{whole}{without}.**{others} `fastest` is the fastest of who was there; the same command with the same file goes on.")

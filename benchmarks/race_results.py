"""What `race.py` measured, as its file: read, merged and written. The records, and what follows from them, are the report's (`titans_backends.reporting`)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

from race_cells import CASES, GROUPS

from titans_backends.reporting import race_standings
from titans_backends.reporting.race_file import Chosen, Entrant, Part, Picked, Race, Way, read_race
from titans_backends.reporting.race_standings import Standings, chosen_of, rule_of

__all__ = ["Chosen", "Entrant", "Part", "Picked", "Results", "Standings", "Way", "chosen_of", "merged", "rule_of", "standings"]


def standings(parts: Mapping[str, Part]) -> Standings | None:
    """One table of a case's parts; None where nothing has a time."""
    return race_standings.standings(parts, {name: group.backends for name, group in GROUPS.items()})


@dataclass(slots=True)
class Results(Race):
    """A race whose groups are those of `race_cells`."""

    @staticmethod
    def read(path: Path) -> Results:
        """From a file; empty where there is none."""
        if not path.exists():
            return Results()
        found = read_race(path)
        return Results(found.runs, found.cases, found.begun)

    def write(self, path: Path) -> None:
        """Whole or not at all; cases and runs in the order of the race, numbers with five digits."""
        order = {str(case): index for index, case in enumerate(CASES)}
        names = sorted(self.cases, key=lambda name: (order.get(name, len(order)), name))
        told = {
            "runs": {name: self.runs[name] for name in sorted(self.runs, key=_place)},
            "begun": self.begun,
            "cases": {name: {group: _plain(part) for group, part in self.cases[name].items()} for name in names},
        }
        text = json.dumps(_short(told), indent=None, separators=(", ", ": ")).replace('{"label"', '\n{"label"').replace('"1x', '\n"1x')
        beside = path.with_name(path.name + ".part")
        beside.write_text(text.replace('"8x', '\n"8x') + "\n", encoding="utf-8")
        os.replace(beside, path)


def _place(name: str) -> tuple[int, str]:
    """The first run is the yardstick, for whoever reads the file."""
    return list(GROUPS).index(name) if name in GROUPS else len(GROUPS), name


def _plain(part: Part) -> dict[str, object]:
    """As JSON has it, without what is at its default."""
    return cast("dict[str, object]", _without(part))


def _without(value: object) -> object:
    if hasattr(value, "__dataclass_fields__"):
        kept = {f.name: getattr(value, f.name) for f in fields(value)}  # type: ignore[arg-type]
        return {name: _without(one) for name, one in kept.items() if one not in (None, "", (), {}) and not (name == "kind" and one == "backend")}
    if isinstance(value, Mapping):
        return {name: _without(one) for name, one in value.items()}
    return [_without(one) for one in value] if isinstance(value, tuple) else value


def _short(value: object) -> object:
    """Five significant digits; what is not finite is text that JSON has."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _short(one) for name, one in value.items()}
    return [_short(one) for one in value] if isinstance(value, list | tuple) else value


def merged(one: Results, other: Results) -> Results:
    """Both; where both have a case of a group the later one's stands, unless it has no time and the earlier has."""
    cases = {name: dict(parts) for name, parts in one.cases.items()}
    for name, parts in other.cases.items():
        mine = cases.setdefault(name, {})
        mine.update({group: part for group, part in parts.items() if group not in mine or part.timed or not mine[group].timed})
    return Results({**one.runs, **other.runs}, cases, {**one.begun, **other.begun})

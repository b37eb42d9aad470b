"""Writes what was measured of the tuner into docs/assess.md and docs/record.md, between their marks, from what lies in benchmarks/results. Measures nothing.

    python benchmarks/tuner_page.py [--results FOLDER] [--docs FOLDER] [--check]

assess.json comes from `titans-backends tune --assess`, recorded.json from benchmarks/recorded.py; where one is missing the page says what to type. --check
writes nothing, and its exit status is 1 where a page is not what it would write.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache.schema import canonical_when
from titans_backends.cli.keys import key_text

__all__ = ["assessed", "page_of", "recorded"]

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- measured: written by benchmarks/tuner_page.py -->", "<!-- measured: end -->"
COMMANDS = {
    "assess": "titans-backends tune --assess --from benchmarks/assess_shapes.yaml --backend triton,cupy --budget 375 --output benchmarks/results/assess.json",
    "recorded": "python benchmarks/recorded.py --budget 75 --json benchmarks/results/recorded.json",
}
Told = Mapping[str, Any]


def page_of(page: str, text: str) -> str:
    """The page with the text between its marks; ValueError where these are missing."""
    head, found, rest = page.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"the page lacks the marks {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n\n{text.strip()}\n\n{END}{tail}"


def percent(share: float | None) -> str:
    """0.0123 as 1.2 %."""
    return "unknown" if share is None else f"{100 * share:.1f} %"


def machine(told: Told) -> str:
    """On what it was measured."""
    versions = {name: value for name, value in told["environment"].items() if name not in ("date", "titans_backends")}
    return f"On {told['device']['name']}, {told['environment']['date']}: {', '.join(f'{name} {value}' for name, value in versions.items())}."


def assessed(told: Told) -> str:
    """The figures against what is wanted of them, then every pair."""
    summary, counts = told["summary"], told["tuned_buckets"]
    raced = f", racing: {', '.join(told['racing'])} and the default" if "racing" in told else ""
    lines = [
        machine(told),
        f"Measured in {told['seconds']:.0f} s by `{told.get('command', COMMANDS['assess'])}`{raced}.",
        "",
        "| figure | wanted | measured |",
        "|---|---|---|",
    ]
    choices = sum(len(one["choices"]) for one in told["tuned"])
    beyond = max((choice["regret"] for one in told["tuned"] for choice in one["choices"] if choice["beyond_noise"]), default=0.0)
    regret = f"{percent(summary['worst_regret'])}; of those beyond the noise {percent(beyond)}"
    cost = f"{percent(summary['worst_flip_cost'])}" if summary["flips"] else "no flip"
    within = f"{percent(summary['midpoints_within'])} of {summary['midpoints']}, worst {percent(summary['worst_midpoint_regret'])}"
    lines += [
        f"| mean regret | at most 1 % | {percent(summary['mean_regret'])} over {summary['buckets']} buckets, {choices} choices of two tunes |",
        f"| worst regret | at most 5 % | {regret} |",
        f"| flips outside ties and the default's margin | 0 | {summary['flips_outside']} of {summary['flips']} |",
        f"| worst cost of a flip | at most 3 % | {cost} |",
        f"| midpoints with at most 5 % regret | at least 95 % | {within} |",
    ]
    if summary.get("refined"):
        lines.append(f"| rows where two neighbours' choices met | | {summary['refined']}, worst regret {percent(summary['worst_refined_regret'])} |")
    ahead = told["compiled_ahead"]
    if ahead is not None:
        lines.append(f"| compiled ahead | | {ahead['candidates']} candidates in {ahead['processes']} processes, {ahead['seconds']:.0f} s |")
    tunes = ", then ".join(f"{seconds:.0f} s for {count} buckets" for seconds, count in zip(told["tune_s"], counts, strict=True))
    batches = told.get("batches", 1)  # older files lack it: they had one
    lines.append(f"| time to tune | | {tunes}{f', in {batches} batches' if batches > 1 else ''} |")
    for use in told["first_uses"]:
        which, chosen = "the shipped table" if use["shipped"] else "the first tune's table", f"{use['op']}, choice: {use['origin']}"
        lines.append(
            f"| first call of a fresh process with {which} | no tuning | {use['first_s']:.2f} s, the second {1e3 * use['second_s']:.2f} ms ({chosen}) |"
        )
    lines += _rows("Tuned buckets", told["tuned"]) + _rows("Midpoints, chosen by lookup", told["midpoints"])
    lines += _rows("Rows where two neighbours' choices met", told.get("refined", []))
    left = Counter(one["reason"] for one in told["left"])
    lines += ["", "Not assessed: " + "; ".join(f"{count} because {reason}" for reason, count in left.items()) + "."] if left else []
    return "\n".join(lines)


def _rows(title: str, rows: Sequence[Told]) -> list[str]:
    if not rows:
        return []
    lines = [
        "",
        f"**{title}**",
        "",
        "| op and key | length | chosen | regret | flip | best | µs | ± | of |",
        "|---|---:|---|---:|---|---|---:|---:|---:|",
    ]
    for key, group in groupby(rows, _key):
        for one in sorted(group, key=lambda row: row["seq_len"]):
            labels = list(dict.fromkeys(choice["label"] for choice in one["choices"]))
            worst = max(one["choices"], key=lambda choice: choice["regret"])
            regret = percent(worst["regret"]) + ("" if worst["beyond_noise"] or not worst["regret"] else " (noise)")
            flip = "" if one["flip"] is None or one["flip"]["within"] == "same" else f"{one['flip']['within']}, {percent(one['flip']['cost'])}"
            best = "the same" if one["best"] in labels else f"`{one['best']}`"
            chosen = ", then ".join(f"`{label}`" for label in labels)
            numbers = f"{one['best_us']:.4g} | {percent(one['best_spread'])} | {one['candidates']}"
            lines.append(f"| {key} | {one['seq_len']} | {chosen} | {regret} | {flip} | {best} | {numbers} |")
    return lines


def _key(row: Told) -> str:
    when = {name: tuple(value) if isinstance(value, list) else value for name, value in row["when"].items()}
    return f"`{row['op']}` {key_text(Bucket(row['op'], canonical_when(when, defaults_of(row['op'])), row['seq_len']))}"


def recorded(told: Told) -> str:
    """A line for each model and regime, then what won."""
    left = f", {told['buckets_left']} left when the budget ended" if told["buckets_left"] else ""
    # a file may be put together from a run for each model
    each = ", ".join(f"{seconds:.0f} s for {name}" for name, seconds in told.get("tunes", {}).items())
    tuned = f"a tune of {each}" if each else f"one tune of {told['tune_s']:.0f} s for all of them"
    lines = [machine(told), f"By `{told.get('command', COMMANDS['recorded'])}`: {tuned}{left}.", ""]
    lines += [
        "| model | regime | tokens | untuned ms | before ms | after ms | untuned / after | before / after | rows of problems | covered | outputs differ by |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    for one in told["lines"]:
        untuned, before, after = (one["ms"][way] for way in ("untuned", "before", "after"))
        lines.append(
            f"| {one['model']} | {one['regime']} | {one['tokens']} | {untuned:.2f} | {before:.2f} | {after:.2f} | {untuned / after:.2f} | {before / after:.2f} "
            f"| {one['rows']} of {one['problems']} | {percent(one['covered'])} | {one['difference']:.0e}{' WRONG' if one['wrong'] else ''} |"
        )
    lines += [
        "",
        "untuned: no table is asked. before: the shipped table. after: the rows of the tune. Medians of whole passes, the three in turns.",
        "",
    ]
    for one in told["lines"]:
        won = ", ".join(f"{bucket} `{label}`" for bucket, label in one["winners"].items())
        lines.append(f"- {one['model']} {one['regime']}: {won or 'nothing was tuned'}")
    lines += ["", *(f"Not measured: {reason}." for reason in told["left"])] if told["left"] else []
    return "\n".join(lines)


PARTS: Mapping[str, Callable[[Told], str]] = {"assess": assessed, "recorded": recorded}
PAGES = {"assess": "assess.md", "recorded": "record.md"}


def written(name: str, page: str, results: Path) -> str:
    """A page with its part written anew."""
    path = results / f"{name}.json"
    if not path.exists():
        return page_of(page, f"Not measured yet: `{COMMANDS[name]}`, then `python benchmarks/tuner_page.py`.")
    return page_of(page, PARTS[name](json.loads(path.read_text(encoding="utf-8"))))


def main() -> int:
    """Writes, or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", metavar="FOLDER")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    stale = []
    for name, page in PAGES.items():
        path = asked.docs / page
        before = path.read_text(encoding="utf-8")
        after = written(name, before, asked.results)
        if after == before:
            continue
        stale.append(page)
        if not asked.check:
            path.write_text(after, encoding="utf-8")
    if asked.check:
        print(f"not what the results say: {', '.join(stale)}; type: python benchmarks/tuner_page.py" if stale else "as the results say")
    return 1 if asked.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes the figures into docs/seeds.md, between its marks, and draws its two pictures, from what lies in benchmarks/results. Measures nothing.

    python benchmarks/seeds_page.py [--results FOLDER] [--page FILE] [--check]

layer_times.json, scores*.json (one for each machine) and train_bytes.json each fill one part; where one is missing the part says what to type. --check
writes nothing, and its exit status is 1 where the page is not what it would write.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from layer_report import ROOT, Report, markdown, picture

sys.path.insert(0, str(ROOT / "examples"))

import train_bytes

__all__ = ["filled", "page_of"]

COMMANDS = {
    "times": "python benchmarks/layer_times.py --json benchmarks/results/layer_times.json",
    "scores": "python benchmarks/scores.py --json benchmarks/results/scores.json",
    "training": "python examples/train_bytes.py --compare --merge scalar --json benchmarks/results/train_bytes.json",
}
Pictures = dict[str, str]
"""By the name of the file in docs/pictures."""


def marks(part: str) -> tuple[str, str]:
    """What stands before and behind a part of the page."""
    return f"<!-- {part}: written by benchmarks/seeds_page.py -->", f"<!-- {part}: end -->"


def filled(page: str, part: str, text: str) -> str:
    """The page with a part's text between its marks; ValueError where these are missing."""
    begin, end = marks(part)
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page lacks the marks {begin!r} and {end!r}")
    return f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}"


def times(folder: Path, pictures: Pictures) -> str:
    """The layer's tables."""
    path = folder / "layer_times.json"
    if not path.exists():
        return ""
    report = Report.read(path)
    pictures["layer_times.svg"] = picture(report)
    return f"![ms over tokens, a panel for each mode](pictures/layer_times.svg)\n\n{markdown(report)}"


def scores(folder: Path, pictures: Pictures) -> str:
    """Rank correlations of every machine."""
    return "\n".join(scores_of(path) for path in sorted(folder.glob("scores*.json")))


def scores_of(path: Path) -> str:
    """Those of one, and who does not run there."""
    told = json.loads(path.read_text(encoding="utf-8"))
    lines = [facts(told["facts"]), "", "| mode | backend | dtype | Spearman | at least | Pearson | largest difference |", "|" + "---|" * 7]
    for one in told["scores"]:
        if one["failed"]:
            lines.append(f"| {one['mode']} | {one['backend']} | {one['dtype']} | failed: {one['failed']} | | | |")
        elif not one["refused"]:
            numbers = f"{one['spearman']:.6f} | {one['least']} | {one['pearson']:.6f} | {one['largest']:.1e}"
            lines.append(f"| {one['mode']} | {one['backend']} | {one['dtype']} | {numbers} |")
    refused: dict[str, list[str]] = {}
    for one in told["scores"]:
        if one["refused"]:
            refused.setdefault(one["backend"], []).append(f"{one['mode']} {one['dtype']}")
    modes = ", ".join(f"{pair} {value:.4f}" for pair, value in told["between_modes"].items())
    lines += ["", f"Between modes, in float64, with the same parameters (Spearman): {modes}."] if modes else []
    return "\n".join([*lines, "", *(f"`{backend}` does not run here: {', '.join(where)}.\n" for backend, where in refused.items())])


def training(folder: Path, pictures: Pictures) -> str:
    """The loss curves' ends."""
    path = folder / "train_bytes.json"
    if not path.exists():
        return ""
    told = json.loads(path.read_text(encoding="utf-8"))
    curves = [train_bytes.Curve.read(curve) for curve in told["curves"]]
    pictures["train_bytes.svg"] = train_bytes.picture(curves, f"A byte-level model on {told['device']}, {told['recipe']['dtype']}")
    recipe = ", ".join(f"{name} {value}" for name, value in told["recipe"].items())
    lines = ["![loss over steps](pictures/train_bytes.svg)", "", f"On {told['device']}, torch {told['torch']}: {recipe}.", ""]
    lines += [
        "| backend | steps | loss, last 20 | validation | furthest from the first, a step | mean distance, last 100 | tokens/s | seconds | of it 10 steps |",
        "|" + "---|" * 9,
    ]
    for curve in curves:
        if curve.failed:
            lines.append(f"| {curve.backend} | failed: {curve.failed} |" + " |" * 7)
            continue
        gaps = [abs(a - b) for a, b in zip(curve.losses, curves[0].losses, strict=False)]
        lines.append(
            f"| {curve.backend} | {len(curve.losses)} | {curve.last:.4f} | {curve.validation:.4f} | {max(gaps):.4f} | {sum(gaps[-100:]) / len(gaps[-100:]):.4f} "
            f"| {curve.tokens_per_s:,.0f} | {curve.seconds:.1f} | {curve.first_steps_s:.1f} |"
        )
    return "\n".join(lines)


def facts(told: Mapping[str, object]) -> str:
    """On what it was measured."""
    return f"Measured on: {', '.join(f'{name} {value}' for name, value in told.items())}."


PARTS: Mapping[str, Callable[[Path, Pictures], str]] = {"times": times, "scores": scores, "training": training}


def page_of(page: str, results: Path) -> tuple[str, Pictures]:
    """The page with every part written anew, and the pictures that it shows."""
    pictures = Pictures()
    for part, write in PARTS.items():
        page = filled(page, part, write(results, pictures) or f"Not measured yet: `{COMMANDS[part]}`, then `python benchmarks/seeds_page.py`.")
    return page, pictures


def main() -> int:
    """Writes, or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "seeds.md", metavar="FILE")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    before = asked.page.read_text(encoding="utf-8")
    page, pictures = page_of(before, asked.results)
    if asked.check:
        stale = [name for name, text in pictures.items() if _text(asked.page.parent / "pictures" / name) != text]
        stale += [asked.page.name] * (page != before)
        print(f"not what the results say: {', '.join(stale)}; type: python benchmarks/seeds_page.py" if stale else "as the results say")
        return 1 if stale else 0
    for name, text in pictures.items():
        (asked.page.parent / "pictures" / name).write_text(text, encoding="utf-8")
    asked.page.write_text(page, encoding="utf-8")
    print(asked.page, *pictures)
    return 0


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())

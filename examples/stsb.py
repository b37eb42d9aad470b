"""Pearson and Spearman of an encoder's cosine similarities with the scores of people, for every mode and backend, on your own copy of a sentence-pair file.

    python examples/stsb.py --tsv sts-test.tsv [--weights encoder.safetensors] [--modes recurrent] [--backends eager,triton] [--device cuda]

The file has a pair and a score on each line, tabs between: --columns S1,S2,SCORE says where they stand, counted from 1; without it a header with sentence1,
sentence2 and score does; without either the STS benchmark's own columns are taken (score, sentence, sentence: the 5th to 7th), or the last three of a
shorter line. Such a header is never a pair. A sentence is its UTF-8 bytes, and without --weights (a TitansEncoder's state dict of 256 embeddings) the
encoder is a fresh one, whose scores are as good as its random features: what can be compared then is one backend with another. The file stays where it is;
nothing is downloaded.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from one_backend import known_backends, lacking, only, refusal, starved, unusable
from rich.console import Console
from rich.table import Table
from sentence_pairs import Pair, pearson, similarities, spearman
from torch import Tensor, nn

from titans_backends.nn import TitansEncoder, TitansEncoderConfig
from titans_backends.nn.forms import Mode

MODES = ("flat", "loop", "dual", "recurrent")


NAMES = ("sentence1", "sentence2", "score")
STACK = "384,12,6,1536"


def read(path: Path, columns: str) -> tuple[list[Pair], Tensor]:
    """The pairs and the scores `[N]` of a file; ValueError names the first line that does not fit."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"--tsv {path}: {error.strerror}; name your own copy of a sentence-pair file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--tsv {path} is not UTF-8 ({error.reason} at byte {error.start}); convert it first, with iconv -t utf-8") from error
    lines = [(number, line.rstrip("\r").split("\t")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"--tsv {path} is empty; name a file with a pair and a score on each line")
    names = [name.strip().lower() for name in lines[0][1]]
    headed = set(NAMES) <= set(names)
    places = placed(columns) if columns else [names.index(name) for name in NAMES] if headed else [5, 6, 4]
    if not columns and not headed and len(names) < 7:
        places = [max(0, len(names) - 3) + place for place in range(3)]
    pairs, scores = list[Pair](), list[float]()
    for number, line in lines[headed:]:
        wanted = f"sentences in columns {places[0] + 1} and {places[1] + 1} and the score in column {places[2] + 1}"
        where = f"{path}, line {number}: wanted {wanted}"
        if len(line) <= max(places):
            raise ValueError(
                f"{where}, found {len(line)} column{'s' * (len(line) > 1)} with tabs between; say where they are with --columns S1,S2,SCORE"
            )
        try:
            score = float(line[places[2]])
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            hint = ", or name a header's columns sentence1, sentence2 and score" if number == lines[0][0] else ""
            raise ValueError(f"{where}, found {line[places[2]][:60]!r}, no finite number; mend the line, say where with --columns S1,S2,SCORE{hint}")
        pairs.append((line[places[0]], line[places[1]]))
        scores.append(score)
    if len(set(scores)) < 2:
        found = "a header and no pair" if not pairs else f"{len(pairs)} pair{'s' * (len(pairs) > 1)} of one score, {scores[0]:g}"
        raise ValueError(
            f"{path} has {found}; a correlation wants two scores or more that differ: name a file that has them, or another column with --columns"
        )
    return pairs, torch.tensor(scores, dtype=torch.float64)


def numbers(text: str, count: int) -> list[int]:
    """So many whole numbers from 1 on, commas between; else none."""
    parts = text.split(",")
    fits = len(parts) == count and all(part.strip().isascii() and part.strip().isdigit() and 0 < len(part.strip()) < 10 for part in parts)
    return [int(part) for part in parts] if fits and all(map(int, parts)) else []


def placed(columns: str) -> list[int]:
    """Where --columns says that the sentences and the score stand, from 0."""
    places = [number - 1 for number in numbers(columns, 3)]
    if len(set(places)) < 3:
        raise ValueError(f"--columns {columns}: wanted three different whole numbers from 1 on, S1,S2,SCORE; the STS benchmark's are --columns 6,7,5")
    return places


def stacked(stack: str) -> list[int]:
    """Width, heads, layers and feed-forward of --stack."""
    sizes = numbers(stack, 4)
    if not sizes or sizes[0] % sizes[1]:
        raise ValueError(f"--stack {stack}: wanted four whole numbers from 1 on, D,H,L,F, where H divides D; the default is --stack {STACK}")
    return sizes


def config_of(mode: str, stack: Sequence[int]) -> TitansEncoderConfig:
    """Bytes in, the sizes of --stack."""
    width, heads, layers, d_ff = stack
    return TitansEncoderConfig(256, width, layers, heads, d_ff, mode=cast(Mode, mode))


def check_weights(path: Path, modes: Sequence[str], stack: Sequence[int]) -> None:
    """ValueError where the file is not there, is no safetensors, or does not fit a mode's encoder exactly."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            held = {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118  no mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"--weights {path} cannot be read ({error}); make it with safetensors.torch.save_file(encoder.state_dict(), FILE)"
        ) from error
    for mode in modes:
        wanted = {name: list(value.shape) for name, value in TitansEncoder(config_of(mode, stack), device="meta").state_dict().items()}
        wrong = [f"it lacks {name}" for name in wanted if name not in held] + [f"{name} is not the encoder's" for name in held if name not in wanted]
        wrong += [f"{name} is {held[name]} and must be {shape}" for name, shape in wanted.items() if held.get(name, shape) != shape]
        if wrong:
            more = f", and {len(wrong) - 1} more such" if len(wrong) > 1 else ""
            sizes = ",".join(map(str, stack))
            raise ValueError(
                f"--weights {path} do not fit --modes {mode} --stack {sizes}: {wrong[0]}{more}; give the mode and the stack that they were made with"
            )


def encoder_of(mode: str, stack: Sequence[int], weights: Path | None) -> nn.Module:
    """A TitansEncoder over bytes; the weights of a file, which must fit exactly, or those of seed 0."""
    torch.manual_seed(0)
    encoder: nn.Module = TitansEncoder(config_of(mode, stack))
    if weights is not None:
        from safetensors.torch import load_file

        encoder.load_state_dict(load_file(weights), strict=True)
    return encoder.eval().requires_grad_(False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 2 where what is asked cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tsv", type=Path, required=True, metavar="FILE")
    parser.add_argument("--columns", default="", metavar="S1,S2,SCORE", help="where they stand, counted from 1")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a state dict in safetensors; without it a fresh encoder")
    parser.add_argument("--modes", default=",".join(MODES), help=f"of {', '.join(MODES)} (default: all)")
    parser.add_argument("--backends", default="chosen", help=f"of chosen, {', '.join(known_backends())}; all for every one (default: chosen)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stack", default=STACK, metavar="D,H,L,F", help=f"width, heads, layers, feed-forward (default {STACK})")
    asked = parser.parse_args(arguments)
    modes, backends = asked.modes.split(","), list(known_backends()) if asked.backends == "all" else asked.backends.split(",")
    try:
        for option, given, known in (("--modes", modes, MODES), ("--backends", backends, ("chosen", *known_backends()))):
            if set(given) - set(known):
                raise ValueError(f"{option} {','.join(given)}: known are {','.join(known)}")
        stack, told = stacked(asked.stack), unusable(asked.device)
        if told:
            raise ValueError(told)
        if asked.weights is not None:
            check_weights(asked.weights, modes, stack)
        pairs, wanted = read(asked.tsv, asked.columns)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    dtype = getattr(torch, asked.dtype)
    console = Console()
    origin = f"weights of {asked.weights}" if asked.weights else "a fresh encoder: its scores are those of random features"
    table = Table(title=f"{len(pairs)} pairs of {asked.tsv.name}, {asked.dtype}, {origin}", title_justify="left")
    for name in ("mode", "backend", "Pearson", "Spearman", "seconds"):
        table.add_column(name, justify="left" if name in ("mode", "backend") else "right")
    for mode in modes:
        for backend in backends:
            refused = refusal(backend, mode, asked.device, dtype, stack[0] // stack[1], packed=True)
            if refused:
                console.print(f"{mode}: {refused}", markup=False, highlight=False)
                continue
            told = lacking(backend, mode)
            if told:
                console.print(f"{mode}: {told}", markup=False, highlight=False)
            start = time.perf_counter()
            try:
                with only(backend), console.status(f"{mode}, {backend}"):
                    found = similarities(encoder_of(mode, stack, asked.weights).to(asked.device, dtype), pairs)
            except (RuntimeError, MemoryError) as error:
                if not starved(error):
                    raise
                print(
                    f"error: {mode} on {backend} has too little memory on {asked.device}; type a smaller --stack than {asked.stack}", file=sys.stderr
                )
                return 2
            spent = time.perf_counter() - start
            table.add_row(mode, backend, f"{pearson(found, wanted):.4f}", f"{spearman(found, wanted):.4f}", f"{spent:.1f}")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

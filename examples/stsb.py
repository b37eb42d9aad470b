"""Pearson and Spearman of an encoder's cosine similarities with the scores of people, for every mode and backend, on your own copy of a sentence-pair file.

    python examples/stsb.py --tsv sts-test.tsv [--weights encoder.safetensors] [--modes recurrent] [--backends eager,triton] [--device cuda]

The file has a pair and a score on each line, tabs between: a header with sentence1, sentence2 and score says where; without one the STS benchmark's own
columns are taken (score, sentence, sentence: the 5th to 7th), or the last three of a shorter line; --columns S1,S2,SCORE counts from 1. A sentence is its
UTF-8 bytes, and without --weights (a TitansEncoder's state dict of 256 embeddings) the encoder is a fresh one, whose scores are as good as its random
features: what can be compared then is one backend with another. The file stays where it is; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from one_backend import known_backends, lacking, only, refusal
from rich.console import Console
from rich.table import Table
from sentence_pairs import Pair, pearson, similarities, spearman
from torch import Tensor, nn

from titans_backends.nn import TitansEncoder, TitansEncoderConfig
from titans_backends.nn.forms import Mode

MODES = ("flat", "loop", "dual", "recurrent")


def read(path: Path, columns: str) -> tuple[list[Pair], Tensor]:
    """The pairs and the scores `[N]` of a file; ValueError names the first line that does not fit."""
    lines = [line.rstrip("\r\n").split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty")
    names = [name.strip().lower() for name in lines[0]]
    if {"sentence1", "sentence2", "score"} <= set(names):
        places = [names.index(name) for name in ("sentence1", "sentence2", "score")]
        lines = lines[1:]
    elif columns:
        places = [int(part) - 1 for part in columns.split(",")]
    elif len(lines[0]) >= 7:
        places = [5, 6, 4]
    else:
        places = [len(lines[0]) - 3, len(lines[0]) - 2, len(lines[0]) - 1]
    pairs, scores = list[Pair](), list[float]()
    for number, line in enumerate(lines, 1):
        try:
            pairs.append((line[places[0]], line[places[1]]))
            scores.append(float(line[places[2]]))
        except (IndexError, ValueError) as error:
            raise ValueError(
                f"{path}, pair {number}: wanted sentences in columns {places[0] + 1} and {places[1] + 1} and a number in column {places[2] + 1}, "
                f"found {line[:8]}; say where they are with --columns S1,S2,SCORE"
            ) from error
    return pairs, torch.tensor(scores, dtype=torch.float64)


def encoder_of(mode: str, stack: Sequence[int], weights: Path | None) -> nn.Module:
    """A TitansEncoder over bytes; the weights of a file, which must fit exactly, or those of seed 0."""
    torch.manual_seed(0)
    width, heads, layers, d_ff = stack
    encoder: nn.Module = TitansEncoder(TitansEncoderConfig(256, width, layers, heads, d_ff, mode=cast(Mode, mode)))
    if weights is not None:
        from safetensors.torch import load_file

        encoder.load_state_dict(load_file(weights), strict=True)
    return encoder.eval().requires_grad_(False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 2 where the file cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tsv", type=Path, required=True, metavar="FILE")
    parser.add_argument("--columns", default="", metavar="S1,S2,SCORE", help="where they stand, counted from 1")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a state dict in safetensors; without it a fresh encoder")
    parser.add_argument("--modes", default=",".join(MODES), help=f"of {', '.join(MODES)} (default: all)")
    parser.add_argument("--backends", default="chosen", help=f"of chosen, {', '.join(known_backends())}; all for every one (default: chosen)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stack", default="384,12,6,1536", metavar="D,H,L,F", help="width, heads, layers, feed-forward (default 384,12,6,1536)")
    asked = parser.parse_args(arguments)
    modes, backends = asked.modes.split(","), list(known_backends()) if asked.backends == "all" else asked.backends.split(",")
    for given, known in ((modes, MODES), (backends, ("chosen", *known_backends()))):
        if set(given) - set(known):
            parser.error(f"{','.join(given)}: known are {', '.join(known)}")
    try:
        pairs, wanted = read(asked.tsv, asked.columns)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stack, dtype = [int(part) for part in asked.stack.split(",")], getattr(torch, asked.dtype)
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
            with only(backend), console.status(f"{mode}, {backend}"):
                start = time.perf_counter()
                found = similarities(encoder_of(mode, stack, asked.weights).to(asked.device, dtype), pairs)
                spent = time.perf_counter() - start
            table.add_row(mode, backend, f"{pearson(found, wanted):.4f}", f"{spearman(found, wanted):.4f}", f"{spent:.1f}")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Scores preserved: cosine similarities of sentence pairs through the encoder, every mode on every backend, against the model in plain torch in float64.

    python benchmarks/scores.py [--pairs 500] [--modes flat,loop] [--backends eager,triton] [--device cuda] [--json FILE]

The pairs are documentation strings of Python's standard library (examples/sentence_pairs.py), the encoder is six layers of width 384 with seed 0 and 256
embeddings, one for each byte. Spearman's correlation must be at least 0.9999 in float32 and 0.999 in bfloat16; the exit status is 1 where it is less. It is
one function computed twice: nothing is said about how good the scores are. On a CPU the encoder is smaller unless --stack says otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import cast

import torch
from layer_report import machine_facts
from plain_layer import PLANS, PlainEncoder
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from titans_backends.nn import TitansEncoder, TitansEncoderConfig
from titans_backends.nn.forms import Mode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from one_backend import known_backends, lacking, only, refusal
from sentence_pairs import Pair, docstring_pairs, pearson, similarities, spearman

LEAST = {torch.float32: 0.9999, torch.bfloat16: 0.999}
NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Score:
    """How one backend's similarities agree with float64's; `largest`: the largest difference of a cosine. `refused`: why it does not run here."""

    mode: str
    backend: str
    dtype: str
    spearman: float = float("nan")
    pearson: float = float("nan")
    largest: float = float("nan")
    least: float = float("nan")
    seconds: float = float("nan")
    refused: str = ""
    failed: str = ""

    @property
    def wrong(self) -> bool:
        """Whether the ranks are not preserved."""
        return bool(self.failed) or (not self.refused and not self.spearman >= self.least)


@dataclass(frozen=True, slots=True)
class Pooled:
    """What `similarities` wants of an encoder's result."""

    pooled: Tensor


class Truth(nn.Module):
    """The plain stack in float64 with the parameters of an encoder, sentence by sentence: no mask, no packing, no registry."""

    def __init__(self, encoder: nn.Module, mode: str, stack: Sequence[int]) -> None:
        super().__init__()
        state_dict = encoder.state_dict()
        self.embeddings = state_dict.pop("embeddings.weight").double()
        width, heads, layers, d_ff = stack
        plan = replace(PLANS[mode], coupling="head") if mode == "loop" else PLANS[mode]
        self.layers = PlainEncoder(width, heads, layers, d_ff, plan)
        self.layers.load_state_dict(state_dict, strict=True)
        self.layers.double().to(self.embeddings.device)

    def forward(self, ids: Tensor, mask: Tensor) -> Pooled:
        """The mean over each sentence's tokens; rows of one length go together."""
        lengths = mask.sum(1).tolist()
        pooled = self.embeddings.new_empty(len(lengths), self.embeddings.shape[1])
        for length in set(lengths):
            rows = [row for row, one in enumerate(lengths) if one == length]
            pooled[rows] = self.layers(self.embeddings[ids[rows, :length]]).mean(1)
        return Pooled(pooled)


def encoder_of(mode: str, stack: Sequence[int], device: str) -> nn.Module:
    """TitansEncoder over bytes, float32, seed 0."""
    torch.manual_seed(0)
    width, heads, layers, d_ff = stack
    encoder: nn.Module = TitansEncoder(
        TitansEncoderConfig(256, width, layers, heads, d_ff, mode=cast(Mode, mode))
    )  # each head couples its states alone
    return encoder.to(device).eval().requires_grad_(False)


def scores(
    pairs: Sequence[Pair],
    modes: Sequence[str],
    backends: Sequence[str],
    dtypes: Sequence[torch.dtype],
    stack: Sequence[int],
    device: str,
    truths: dict[str, Tensor] | None = None,
) -> Iterator[Score]:
    """Each as it is known; the float64 similarities of a mode that something runs go into `truths`."""
    truths = {} if truths is None else truths
    for mode in modes:
        encoder = encoder_of(mode, stack, device)
        for backend in backends:
            for dtype in dtypes:
                name = str(dtype).removeprefix("torch.")
                refused = refusal(backend, mode, device, dtype, stack[0] // stack[1], packed=True)
                if refused:
                    yield Score(mode, backend, name, refused=refused)
                    continue
                if mode not in truths:
                    truths[mode] = similarities(Truth(encoder, mode, stack), pairs)
                want = truths[mode]
                try:
                    with only(backend):
                        start = time.perf_counter()
                        got = similarities(encoder_of(mode, stack, device).to(dtype), pairs)
                        spent = time.perf_counter() - start
                except Exception as error:  # the other backends are told all the same; the exit status says it
                    yield Score(mode, backend, name, failed=f"{type(error).__name__}: {str(error)[:300]}")
                    continue
                yield Score(mode, backend, name, spearman(got, want), pearson(got, want), float((got - want).abs().max()), LEAST[dtype], spent)


def between(truths: Mapping[str, Tensor]) -> dict[str, float]:
    """Spearman between the modes, which are different functions: what a change of mode does to the ranks."""
    return {f"{one} and {other}": spearman(truths[one], truths[other]) for one, other in combinations(truths, 2)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; 1 where a rank correlation is too low."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=500, metavar="N")
    parser.add_argument("--modes", default=",".join(PLANS), help=f"of {', '.join(PLANS)} (default: all)")
    parser.add_argument("--backends", default=",".join(known_backends()), help="default: all that there are")
    parser.add_argument("--dtypes", default=",".join(NAMES), help=f"of {', '.join(NAMES)} (default: both)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--stack", default="384,12,6,1536" if cuda else "64,2,2,128", metavar="D,H,L,F", help="width, heads, layers, feed-forward")
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args(arguments)
    modes, backends, dtypes = (getattr(asked, name).split(",") for name in ("modes", "backends", "dtypes"))
    for given, known in ((modes, tuple(PLANS)), (backends, ("chosen", *known_backends())), (dtypes, tuple(NAMES))):
        if set(given) - set(known):
            parser.error(f"{','.join(given)}: known are {', '.join(known)}")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    found, stack = list[Score](), [int(part) for part in asked.stack.split(",")]
    facts = {**machine_facts(asked.device), "pairs": asked.pairs, "stack": stack}
    truths: dict[str, Tensor] = {}
    for score in scores(docstring_pairs(asked.pairs), modes, backends, [NAMES[name] for name in dtypes], stack, asked.device, truths):
        found.append(score)
        print(score.mode, score.backend, score.dtype, score.failed or score.refused or f"{score.spearman:.6f}", file=sys.stderr, flush=True)
        if asked.json is not None:
            told = [{name: None if value != value else value for name, value in asdict(one).items()} for one in found]
            asked.json.write_text(json.dumps({"facts": facts, "scores": told, "between_modes": between(truths)}, indent=1) + "\n", encoding="utf-8")
    show(found, facts)
    for pair, value in between(truths).items():
        print(f"{pair}, float64, the same parameters: Spearman {value:.4f}")
    return 1 if any(score.wrong for score in found) else 0


def show(found: Sequence[Score], facts: dict[str, object]) -> None:
    """The table, and below it why a backend does not run."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
    table = Table(title="Similarities against the plain model in float64", title_justify="left")
    for name in ("mode", "backend", "dtype", "Spearman", "Pearson", "largest difference", "seconds"):
        table.add_column(name, justify="left" if name in ("mode", "backend", "dtype") else "right")
    for one in found:
        if not one.refused and not one.failed:
            mark = " [red]too low[/red]" if one.wrong else ""
            table.add_row(
                one.mode, one.backend, one.dtype, f"{one.spearman:.6f}{mark}", f"{one.pearson:.6f}", f"{one.largest:.1e}", f"{one.seconds:.1f}"
            )
    console.print(table)
    for told in dict.fromkeys(f"{one.mode}: {told}" for one in found if not one.refused and (told := lacking(one.backend, one.mode))):
        console.print(told, markup=False, highlight=False)
    refused: dict[str, list[str]] = {}
    for one in found:
        if one.refused:
            refused.setdefault(one.refused, []).append(f"{one.mode} {one.dtype}")
    for one in found:
        if one.failed:
            console.print(f"FAILED {one.mode}, {one.backend}, {one.dtype}: {one.failed}", markup=False, highlight=False)
    for reason, where in refused.items():
        console.print(f"Not run: {', '.join(where)}. {reason}", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())

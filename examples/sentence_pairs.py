"""Pairs of sentences, their cosine similarities through an encoder, and how two lists of scores agree. Imported by stsb.py and benchmarks/scores.py.

A sentence is its UTF-8 bytes: no tokenizer to download, and many are longer than a chunk of the memory.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module

import torch
from torch import Tensor, nn

__all__ = ["Pair", "docstring_pairs", "pearson", "similarities", "spearman"]

Pair = tuple[str, str]
MODULES = (
    "argparse", "array", "ast", "base64", "bisect", "calendar", "codecs", "collections", "configparser", "contextlib", "copy", "csv", "datetime", "decimal",
    "difflib", "dis", "enum", "fractions", "functools", "gettext", "glob", "gzip", "heapq", "html", "inspect", "io", "ipaddress", "itertools", "json",
    "locale", "logging", "math", "mimetypes", "operator", "os", "pathlib", "pickle", "pprint", "queue", "random", "re", "shutil", "socket", "statistics",
    "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "time", "tokenize", "types", "uuid", "weakref", "zipfile",
)  # fmt: skip
"""Of the standard library, where sentences come from; one that a machine lacks is passed over."""
LEAST_BYTES, MOST_BYTES = 60, 600


def docstring_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Pairs from the standard library's documentation strings, in thirds: two of one module, two of different modules, and one with words left out.

    The same on every run of one Python version. ValueError where the library has too few sentences.
    """
    source = random.Random(seed)
    by_module = {name: found for name in MODULES if len(found := sorted(set(_sentences(name)))) > 1}
    every = [(name, sentence) for name, found in by_module.items() for sentence in found]
    if len(every) < 2 * count:
        raise ValueError(f"docstring_pairs: {count} pairs want {2 * count} sentences, and the standard library here has {len(every)}; ask for fewer")
    pairs = set[Pair]()
    while len(pairs) < count:
        name, first = source.choice(every)
        kind = len(pairs) % 3
        second = (
            source.choice(by_module[name]) if kind == 0 else source.choice(every)[1] if kind == 1 else _thinned(first, 0.6 * source.random(), source)
        )
        if first != second:  # the cosine of one sentence with itself is 1 and rounding, and has no rank
            pairs.add((first, second))
    return sorted(pairs)


def _sentences(module: str) -> Iterator[str]:
    """A module's documentation strings of 60 to 600 bytes, on one line each."""
    try:
        found = import_module(module)
    except ImportError:
        return
    holders = [
        found,
        *(value for _, value in sorted(vars(found).items(), key=lambda item: item[0]) if inspect.isclass(value) or inspect.isroutine(value)),
    ]
    holders += [value for holder in holders[1:] if inspect.isclass(holder) for _, value in sorted(vars(holder).items()) if inspect.isroutine(value)]
    for holder in holders:
        told = getattr(holder, "__doc__", None)
        text = " ".join(told.split()) if isinstance(told, str) else ""
        if LEAST_BYTES <= len(text.encode()) <= MOST_BYTES:
            yield text


def _thinned(text: str, share: float, source: random.Random) -> str:
    """The sentence with a share of its words left out, never all."""
    words = text.split()
    kept = [word for word in words if source.random() >= share]
    return " ".join(kept or words[:1])


def batches(texts: Sequence[str], most_tokens: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Indices, bytes `[B, T]` and mask `[B, T]`: sentences of like lengths together, at most so many bytes a batch."""
    encoded = [list(text.encode()) or [32] for text in texts]
    order, batch = sorted(range(len(texts)), key=lambda index: (len(encoded[index]), index)), list[int]()

    def made(batch: list[int]) -> tuple[list[int], Tensor, Tensor]:
        longest = max(len(encoded[index]) for index in batch)
        ids, mask = torch.zeros(len(batch), longest, dtype=torch.int64), torch.zeros(len(batch), longest, dtype=torch.bool)
        for row, index in enumerate(batch):
            ids[row, : len(encoded[index])] = torch.tensor(encoded[index])
            mask[row, : len(encoded[index])] = True
        return batch, ids, mask

    for index in order:
        if batch and (len(batch) + 1) * len(encoded[index]) > most_tokens:
            yield made(batch)
            batch = []
        batch.append(index)
    if batch:
        yield made(batch)


def similarities(encoder: nn.Module, pairs: Sequence[Pair], most_tokens: int = 16384) -> Tensor:
    """Cosines `[N]`, float64 on the CPU, of the pooled embeddings that a TitansEncoder with 256 embeddings makes of each sentence's bytes."""
    texts = [text for pair in pairs for text in pair]
    device = next(encoder.parameters()).device
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    with torch.no_grad():
        for indices, ids, mask in batches(texts, most_tokens):
            pooled = encoder(ids.to(device), mask.to(device)).pooled.double().cpu()
            for index, embedding in zip(indices, pooled, strict=True):
                found[index] = embedding
    embeddings = nn.functional.normalize(torch.stack(found), dim=-1).view(len(pairs), 2, -1)
    return (embeddings[:, 0] * embeddings[:, 1]).sum(-1)


def pearson(a: Tensor, b: Tensor) -> float:
    """The correlation of two lists `[N]`."""
    a, b = (x.double() - x.double().mean() for x in (a, b))
    return float((a * b).sum() / (a.norm() * b.norm()))


def spearman(a: Tensor, b: Tensor) -> float:
    """The correlation of the ranks; equal numbers share the mean of their ranks."""
    return pearson(_ranks(a), _ranks(b))


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(x.double(), sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


if __name__ == "__main__":
    for one in docstring_pairs(int(sys.argv[1]) if len(sys.argv) > 1 else 9):
        print(*one, sep="\n    ")

"""What the letters in a contract's layouts stand for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from titans_backends.contracts.contract import Contract

__all__ = ["LETTERS", "letters_of"]

LETTERS: Mapping[str, str] = MappingProxyType(
    {
        "*": "any leading dimensions",
        "B": "sequences of one length; 1 where cu_seqlens packs them",
        "T": "tokens of a sequence; packed: of all of them",
        "N": "sequences: B, or packed E - 1",
        "E": "N + 1: where each packed sequence begins, and the end",
        "M": "chunks, ceil(T / chunk_size); packed: summed over the sequences",
        "Z": "chunks, ceil(T / chunk_size); packed: T // chunk_size + N, the most that there can be",
        "C": "tokens of a chunk",
        "P": "rows of a pool of states; without state_indices B",
        "G": "heads of q and k; G divides H",
        "H": "heads of v",
        "K": "head_dim of q and k",
        "V": "head_dim of v",
        "W": "4, the taps of the convolution",
        "F": "hidden units of the small network",
        "J": "K + V, what the network reads of a token",
        "X": "K + V + 1, what the network reads of a chunk",
        "Y": "1, what the network gives",
    }
)


def letters_of(made: Contract) -> dict[str, str]:
    """Those of a contract's arguments and outputs, with their meaning, in the order of the table."""
    layouts = [layout for argument in made.arguments for layout in argument.dims] + [output.dims for output in made.outputs]
    used = {letter for layout in layouts for letter in layout.split()}
    return {letter: LETTERS[letter] for letter in sorted(used, key=list(LETTERS).index)}

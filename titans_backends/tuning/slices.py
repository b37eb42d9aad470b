"""A small part of a big call that can be computed on its own: one sequence, a few heads, the first tokens of a causal op.

So the outputs of the timed shape itself are checked at a fraction of the reference's cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_backends.contracts.chunks import chunk_count
from titans_backends.contracts.contract import Argument, Call, Contract

__all__ = ["Part", "group_part", "heads_part"]

Taken = Mapping[str, Sequence[int] | int]
"""By letter: which indices, or how many of the first."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a call: `call` is it alone, `output` and `gradient` cut what the whole call gives to it. `shortened`: tokens were left out."""

    contract: Contract
    call: Call
    taken: Taken
    shortened: bool

    def output(self, index: int, whole: Tensor) -> Tensor | None:
        """The part of one output of the whole call; None for a state where tokens were left out."""
        spec = self.contract.outputs[index]
        if self.shortened and "T" not in spec.dims.split():
            return None
        return _cut(whole, spec.dims, self.taken)

    def gradient(self, name: str, whole: Tensor) -> Tensor | None:
        """The part of one input's gradient; None for an input that all sequences share."""
        layout = _layout(self.contract.argument_by_name[name], whole)
        return _cut(whole, layout, self.taken) if {"B", "N", "P", "*"} & set(layout.split()) else None


def heads_part(contract: Contract, call: Call, dims: Mapping[str, int], max_tokens: int) -> Part:
    """The first and the last head of the first sequence (packed: of the first ones), at most `max_tokens` tokens of it."""
    if "*" in dims:
        return _part(contract, call, {"*": sorted({0, dims["*"] - 1})}, shortened=False)
    groups, heads = dims.get("G", dims["H"]), dims["H"]
    chosen = {"G": sorted({0, groups - 1}), "H": sorted({0, heads - 1})}
    whole = bool(getattr(call, "lookahead", 0)) or "Z" in dims  # the last outputs of a first part, or its last chunk, would read what it lacks
    taken, shortened = _tokens(contract, call, dims, dims["T"] if whole else max_tokens)
    return _part(contract, call, {**chosen, **taken}, shortened)


def group_part(contract: Contract, call: Call, dims: Mapping[str, int]) -> Part:
    """The first head of q and k with all its v heads, all tokens of the first sequence (packed: of all): its gradients are complete."""
    if "*" in dims:
        return _part(contract, call, {"*": [0]}, shortened=False)
    group = dims["H"] // dims.get("G", dims["H"])
    taken, _ = _tokens(contract, call, dims, dims["T"])
    return _part(contract, call, {"G": 1, "H": group, **taken}, shortened=False)


def _tokens(contract: Contract, call: Call, dims: Mapping[str, int], max_tokens: int) -> tuple[Taken, bool]:
    given = contract.tensors(call)
    packed = given.get("cu_seqlens")
    if packed is None:
        length = min(dims["T"], max_tokens)
        pool = "state_indices" in given
        rows: dict[str, Sequence[int] | int] = {"B": 1, "N": 1, "T": length} if pool else {"B": 1, "N": 1, "P": 1, "T": length}
        return {**rows, **_chunks(call, length, None)}, length < dims["T"]
    ends = packed.tolist()
    count = max(1, sum(end <= max_tokens for end in ends[1:]))
    length = min(ends[count], max_tokens)
    kept = packed[: count + 1].clamp(max=length)
    return {"B": 1, "N": count, "E": count + 1, "T": length, **_chunks(call, length, kept)}, length < ends[count]


def _chunks(call: Call, length: int, packed: Tensor | None) -> dict[str, int]:
    chunk = getattr(call, "chunk_size", None)
    return {"M": chunk_count(length, chunk, packed)} if isinstance(chunk, int) else {}


def _part(contract: Contract, call: Call, taken: Taken, shortened: bool) -> Part:
    changed: dict[str, object] = {}
    for name, tensor in contract.tensors(call).items():
        cut = _cut(tensor, _layout(contract.argument_by_name[name], tensor), taken)
        limit = taken.get("T")
        changed[name] = cut.clamp(max=limit) if name == "cu_seqlens" and isinstance(limit, int) else cut
    if shortened and "output_final_state" in contract.option_by_name:
        changed["output_final_state"] = False
    given = {name: getattr(call, name) for name in contract.parameters}
    return Part(contract, contract.make_call(**{**given, **changed}), taken, shortened)


def _layout(argument: Argument, tensor: Tensor) -> str:
    return next(layout for layout in argument.dims if layout.startswith("*") or len(layout.split()) == tensor.dim())


def _cut(tensor: Tensor, layout: str, taken: Taken) -> Tensor:
    letters = layout.split()
    if letters and letters[0] == "*":
        tensor = tensor.flatten(0, -len(letters)) if tensor.dim() >= len(letters) else tensor.unsqueeze(0)
    for position, letter in enumerate(letters):
        wanted = taken.get(letter)
        if isinstance(wanted, int):
            tensor = tensor.narrow(position, 0, min(wanted, tensor.shape[position]))
        elif wanted is not None:
            tensor = tensor.index_select(position, torch.tensor(wanted, device=tensor.device))
    return tensor

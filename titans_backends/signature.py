"""Everything about one call that a choice may depend on, frozen: made at the edge, read by pure functions.

A signature holds facts only. `contracts` makes it from a validated call, `buckets` turns it into a cache key.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from titans_backends.contracts import contract

__all__ = ["Launch", "Regime", "Signature", "TensorFacts"]

Regime = Literal["inference", "training"]
Launch = Literal["eager", "graph"]
Option = int | float | str | bool | None


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """Shape, strides, dtype, and whether the data starts on a 16-byte boundary."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool


@dataclass(frozen=True, slots=True)
class Signature:
    """One call's facts.

    `dims` binds the contract's letters (B T H G K V N, C M P where an op has them; G: heads of q and k), `options` are the
    arguments that are no tensors, `tensors` the given ones. `needs` names the inputs that want a gradient. `may_save`: the
    forward may return chunk-start states for its backward (a traced graph may not).
    """

    op: str
    device: str
    dtype: torch.dtype
    dims: tuple[tuple[str, int], ...]
    options: tuple[tuple[str, Option], ...]
    tensors: tuple[tuple[str, TensorFacts], ...]
    regime: Regime = "inference"
    needs: frozenset[str] = frozenset()
    launch: Launch = "eager"
    float32: str = "highest"
    deterministic: bool = False
    batch_invariant: bool = False
    may_save: bool = True

    def dim(self, letter: str) -> int:
        """The size bound to one of the contract's letters."""
        return dict(self.dims)[letter]

    def option(self, name: str) -> Option:
        """One argument that is not a tensor."""
        return dict(self.options)[name]

    def tensor(self, name: str) -> TensorFacts | None:
        """The facts of one tensor argument; None where it was not given."""
        return dict(self.tensors).get(name)

    def has(self, name: str) -> bool:
        """Whether an optional tensor was given."""
        return any(key == name for key, _ in self.tensors)

    @property
    def packed(self) -> bool:
        """Whether `cu_seqlens` was given."""
        return self.has("cu_seqlens")

    @property
    def aligned(self) -> bool:
        """Whether every operand and state starts on a 16-byte boundary: what kernels copy by whole rows. Gates, read number by number, do not count."""
        copied = _copied_by_rows(self.op)
        return all(facts.aligned for name, facts in self.tensors if name in copied)


@functools.cache
def _copied_by_rows(op: str) -> frozenset[str]:
    return frozenset(argument.name for argument in contract(op).arguments if argument.role in ("operand", "state"))

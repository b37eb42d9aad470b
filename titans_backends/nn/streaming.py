"""What a layer remembers between two calls: a sequence fed in pieces is the sequence fed at once.

Everything is fixed in size. Without gradients the tensors are written in place; with them the cache takes the new ones, which lead back to the earlier
pieces until `detach_` cuts them off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DualCoreCache", "stored"]


@dataclass(slots=True, eq=False)
class DualCoreCache:
    """One layer's memory of B sequences that advance together. Made by `layer.new_cache(batch_size)`.

    `position`: tokens fed so far, the same for every row, and `positions` `[B]`, int64, the same on the device; a CUDA graph of a step advances the second
    alone: after a replay add its tokens to the first. `chunk_size`: the layer's. Tensors, in float32 (float64 in a float64 layer): `slow`, `fast`
    `[B, H, K, V]`; `q`, `k`, `v`: the last four inputs of the convolutions `[B, H, K, 4]`, `[B, H, V, 4]`; `decay_sum` `[B, H]`: what the open chunk's decays,
    or the last one's, sum up to, where the decay is the chunk before's; `levels`: for each level its carry of `deep_core`, whose blocks are of `periods` chunks.
    """

    position: int
    positions: Tensor
    chunk_size: int
    slow: Tensor
    fast: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    decay_sum: Tensor | None
    levels: list[tuple[Tensor, ...]]
    periods: tuple[int, ...] = ()

    @property
    def chunk_offset(self) -> int:
        """Tokens in the chunk that is open."""
        return self.position % self.chunk_size

    @property
    def batch_size(self) -> int:
        """B."""
        return self.slow.shape[0]

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        held = [self.positions, self.slow, self.fast, self.q, self.k, self.v] + ([] if self.decay_sum is None else [self.decay_sum])
        return held + [x for level in self.levels for x in level]

    def advance(self, tokens: int) -> None:
        """So many tokens further."""
        self.position += tokens
        self.positions += tokens

    def store(self, **new: Tensor) -> None:
        """These tensors under their names: written into what is there, all by one launch, or where gradients run through one, in its place."""
        names = list(new)
        for name, tensor in zip(names, stored([getattr(self, name) for name in names], list(new.values())), strict=True):
            setattr(self, name, tensor)

    def reset(self) -> None:
        """As new, in place."""
        self.detach_()
        self.position = 0
        for x in self.tensors():
            x.zero_()

    def detach_(self) -> None:
        """Cuts the gradient's way into earlier pieces."""
        for name in ("slow", "fast", "q", "k", "v", "decay_sum"):
            x = getattr(self, name)
            setattr(self, name, None if x is None else x.detach())
        self.levels = [tuple(x.detach() for x in level) for level in self.levels]


def stored(old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """`new` in old's place: the same memory, or the new tensors where a gradient may run through one of either, an earlier piece's among them."""
    if any(tensor.requires_grad for tensor in old) or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in new)):
        return new
    torch._foreach_copy_(old, new)
    return old

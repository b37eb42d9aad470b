"""FLA's cache as its layers use it: a state dictionary for each layer, by `layer_idx`. Nothing of FLA is imported: the cache object does it all.

The recurrent state has the layout of FLA's own layer, the convolutions' states are `[N, D, 4]`, the newest input last, in float32: so either layer goes
on from what the other left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

__all__ = ["LayerCache", "keep", "state_of"]


class LayerCache(Protocol):
    """What the layers ask of `past_key_values`."""

    def __len__(self) -> int: ...

    def __getitem__(self, layer_idx: int, /) -> Mapping[str, object] | None: ...

    def update(self, **changes: object) -> object: ...


def state_of(layer: str, index: int | None, cache: LayerCache | None) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
    """The recurrent state and the convolutions' states that a cache holds for a layer, None for what it has not."""
    if cache is None:
        return None, None
    if index is None:
        raise ValueError(f"{layer}: past_key_values is given, but the layer has no layer_idx, by which a cache knows it; set layer.layer_idx")
    held = cache[index] if len(cache) > index else None
    if held is None:
        return None, None
    recurrent, convs = held["recurrent_state"], held["conv_state"]
    assert recurrent is None or isinstance(recurrent, Tensor)
    if not isinstance(convs, (tuple, list)) or any(state is None for state in convs):
        convs = None
    return recurrent, None if convs is None else tuple(convs)


def keep(index: int | None, cache: LayerCache | None, recurrent: Tensor | None, convs: tuple[Tensor, ...] | None, tokens: int) -> None:
    """Hands a cache what a call left; None leaves what it holds."""
    if cache is not None:
        cache.update(recurrent_state=recurrent, conv_state=convs, layer_idx=index, offset=tokens)

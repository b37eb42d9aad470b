"""What a swapped layer asks of transformers' cache: the states before this call, and where they may be written.

The convolution's state is the last inputs of all channels, `[B, D, taps]`, in the activations' dtype; the memory's `[B, H, K, V]`, float32.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Cache", "held_by", "previous_states", "records_past"]


class LayerStates(Protocol):
    """One linear-attention layer of a cache."""

    conv_states: dict[int, Tensor | None]
    recurrent_states: dict[int, Tensor | None]
    has_previous_state: dict[int, bool]
    record_past: bool


class Cache(Protocol):
    """The part of `transformers.Cache` that gated delta layers call."""

    layers: list[LayerStates]

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *, conv_kernel_size: int) -> Tensor:
        """Appends to the state `[B, D, T]` more inputs; returns the state before and them."""
        ...

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int) -> Tensor:
        """Copies a state into the cache."""
        ...


def previous_states(cache: Cache, layer_idx: int) -> tuple[Tensor | None, Tensor | None]:
    """The convolution's and the memory's state; None and None before the first call and after a reset."""
    asked = getattr(cache, "get_conv_state", None)
    if asked is not None:
        return asked(layer_idx, state_idx=0), cache.get_recurrent_state(layer_idx, state_idx=0)  # type: ignore[attr-defined]  # they come together
    layer = cache.layers[layer_idx]  # before transformers 5.2x the original read the layer itself
    return (layer.conv_states[0], layer.recurrent_states[0]) if layer.has_previous_state[0] else (None, None)


def records_past(cache: Cache, layer_idx: int) -> bool:
    """Whether the cache keeps every input of the convolution until it is cropped."""
    return bool(getattr(cache.layers[layer_idx], "record_past", False))


def held_by(cache: Cache, layer_idx: int, state: Tensor) -> bool:
    """Whether this tensor is the cache's own, so that writing into it is an update."""
    held = getattr(cache.layers[layer_idx], "recurrent_states", None)
    return held is not None and held[0] is state

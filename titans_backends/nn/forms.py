"""Which function a layer computes: the mode and its options, resolved to one frozen value, or refused with a sentence.

Pure: knows no tensors. Every default that depends on the mode is decided here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from titans_backends.errors import UnknownNameError

__all__ = ["Form", "resolve"]

Mode = Literal["flat", "dual", "recurrent"]
Chunking = Literal["regular", "original"]
Convolution = Literal["original", "causal"]
Transform = Literal["lam", "exact"]
Decay = Literal["token", "chunk", "previous_chunk"]
Merge = Literal["fixed", "scalar", "head", "flux"]

_MODES = ("flat", "dual", "recurrent")
_NOT_YET = {"loop": "the op coupled_core, which its two coupled states need, is not there yet; mode='dual' is the nearest form"}
_CONVOLUTION = {"flat": "original", "dual": "original", "recurrent": "causal"}
_TRANSFORM = {"flat": "lam", "dual": "exact", "recurrent": "exact"}
"""Not lam in the dual mode: without a normalisation in every chunk its delta correction amplifies the state from chunk to chunk."""
_DECAYS = {"flat": ("chunk",), "dual": ("chunk",), "recurrent": ("token", "previous_chunk")}
"""What each mode can make of the decay projection; the first is its default. "chunk" is the mean over the chunk itself, which looks ahead."""


@dataclass(frozen=True, slots=True)
class Form:
    """A layer's function, with every default filled in. `resonance`: psi scales the decay of S_slow."""

    mode: str
    chunking: str
    chunk_size: int
    convolution: str
    transform: str
    decay: str
    resonance: bool
    merge: str
    alpha: float

    @property
    def look_ahead(self) -> int:
        """How many tokens ahead the convolution sees."""
        return 1 if self.convolution == "original" else 0


def resolve(
    mode: str,
    chunking: str,
    chunk_size: int,
    convolution: str | None,
    transform: str | None,
    decay: str | None,
    resonance: bool | None,
    merge: str,
    alpha: float,
) -> Form:
    """The form of these arguments; None takes the mode's own. Raises UnknownNameError or ValueError, saying what would be accepted."""
    if mode in _NOT_YET:
        raise NotImplementedError(f"TitansDualCore: mode={mode!r} is not implemented: {_NOT_YET[mode]}. Modes: {', '.join(_MODES)}")
    _known("mode", mode, _MODES)
    _known("chunking", chunking, ("regular", "original"))
    _known("convolution", convolution, ("original", "causal", None))
    _known("transform", transform, ("lam", "exact", None))
    _known("decay", decay, ("token", "chunk", "previous_chunk", None))
    _known("merge", merge, ("fixed", "scalar", "head", "flux"))
    form = Form(
        mode,
        chunking,
        chunk_size,
        convolution or _CONVOLUTION[mode],
        transform or _TRANSFORM[mode],
        decay or _DECAYS[mode][0],
        mode == "flat" if resonance is None else resonance,
        merge,
        alpha,
    )
    _check(form)
    return form


def _known(option: str, value: str | None, known: Iterable[str | None]) -> None:
    if value not in known:
        raise UnknownNameError(f"TitansDualCore: unknown {option} {value!r}; known: {', '.join(map(repr, known))}")


def _check(form: Form) -> None:
    """The combinations that have no meaning."""
    if isinstance(form.chunk_size, bool) or not isinstance(form.chunk_size, int) or form.chunk_size < 1:
        raise ValueError(f"TitansDualCore: chunk_size must be an int of at least 1, got {form.chunk_size!r}")
    if form.decay not in _DECAYS[form.mode]:
        able = [mode for mode in _MODES if form.decay in _DECAYS[mode]]
        raise ValueError(
            f"TitansDualCore: decay={form.decay!r} is not what mode={form.mode!r} does; it takes {' or '.join(map(repr, _DECAYS[form.mode]))}, "
            f"and mode={' or '.join(map(repr, able))} takes {form.decay!r}"
        )
    if form.mode == "recurrent" and form.transform != "exact":
        raise ValueError(f"TitansDualCore: mode='recurrent' is the exact delta rule; transform={form.transform!r} belongs to mode='dual' or 'flat'")
    if form.mode == "recurrent" and form.resonance:
        raise ValueError("TitansDualCore: resonance=True scales the decay of a whole chunk by what the chunk holds; it belongs to mode='dual'")
    if form.mode == "recurrent" and form.chunking == "original":
        raise ValueError(
            "TitansDualCore: chunking='original' looks ahead (a chunk's size depends on the sequence's length), and mode='recurrent' must not; "
            "pass chunking='regular', or mode='flat' or 'dual'"
        )
    if form.mode == "flat" and not form.resonance:
        raise ValueError("TitansDualCore: resonance=False would change nothing but the returned state in mode='flat'; leave it out")
    learned = form.merge in ("scalar", "head")
    if not 0.0 <= form.alpha <= 1.0 or (learned and form.alpha in (0.0, 1.0)):
        raise ValueError(
            f"TitansDualCore: alpha, the share of S_fast, must lie between 0 and 1{', both excluded' if learned else ''}, got {form.alpha}"
        )

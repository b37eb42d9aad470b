"""Which function a layer computes: the mode and its options, resolved to one frozen value, or refused with a sentence.

Pure: knows no tensors. Every default that depends on the mode is decided here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from titans_backends.errors import UnknownNameError
from titans_backends.nn.level import Level

__all__ = ["Chunking", "Convolution", "Coupling", "Decay", "Form", "Merge", "Mode", "Transform", "resolve"]

Mode = Literal["flat", "loop", "dual", "recurrent"]
Chunking = Literal["regular", "original"]
Convolution = Literal["original", "causal"]
Transform = Literal["lam", "exact"]
Decay = Literal["token", "chunk", "previous_chunk"]
Merge = Literal["fixed", "scalar", "head", "flux"]
Coupling = Literal["head", "batch"]

_MODES = ("flat", "loop", "dual", "recurrent")
_CHUNK_SIZE = {"flat": 128, "loop": 64, "dual": 128, "recurrent": 128}
_CONVOLUTION = {"flat": "original", "loop": "original", "dual": "original", "recurrent": "causal"}
_TRANSFORM = {"flat": "lam", "loop": "lam", "dual": "exact", "recurrent": "exact"}
"""Not lam in the dual mode: without a normalisation in every chunk its delta correction amplifies the state from chunk to chunk."""
_DECAYS = {"flat": ("chunk",), "loop": ("chunk",), "dual": ("chunk",), "recurrent": ("token", "previous_chunk")}
"""What each mode can make of the decay projection; the first is its default. "chunk" is the mean over the chunk itself, which looks ahead."""
_MERGE = {"flat": "fixed", "loop": "flux", "dual": "fixed", "recurrent": "fixed"}
_ALPHA = 0.1
"""The original's share of S_fast."""


@dataclass(frozen=True, slots=True)
class Form:
    """A layer's function, with every default filled in. `resonance`: psi scales the decays; `coupling`: what psi is averaged over there, loop only."""

    mode: str
    chunking: str
    chunk_size: int
    convolution: str
    transform: str
    decay: str
    resonance: bool
    coupling: str | None
    merge: str
    alpha: float
    levels: tuple[Level, ...]

    @property
    def look_ahead(self) -> int:
        """How many tokens ahead the convolution sees."""
        return 1 if self.convolution == "original" else 0

    @property
    def not_streamed_because(self) -> str | None:
        """Why a sequence cannot be fed in pieces, and what can be; None where it can."""
        if self.mode != "recurrent":
            held = {
                "flat": "carries nothing across a chunk",
                "loop": "decays by the mean over the whole chunk",
                "dual": "decays by the mean over the whole chunk",
            }
            return f"mode={self.mode!r} {held[self.mode]}, so that its outputs wait for tokens that have not come. Use mode='recurrent'"
        if self.look_ahead:
            return "convolution='original' reads the token that follows. Use convolution='causal'"
        return None


def resolve(
    mode: str,
    chunking: str,
    chunk_size: int | None,
    convolution: str | None,
    transform: str | None,
    decay: str | None,
    resonance: bool | None,
    coupling: str | None,
    merge: str | None,
    alpha: float | None,
    levels: Sequence[Level] | None,
) -> Form:
    """The form of these arguments; None takes the mode's own. Raises UnknownNameError or ValueError, saying what would be accepted."""
    _known("mode", mode, _MODES)
    _known("chunking", chunking, ("regular", "original"))
    _known("convolution", convolution, ("original", "causal", None))
    _known("transform", transform, ("lam", "exact", None))
    _known("decay", decay, ("token", "chunk", "previous_chunk", None))
    _known("merge", merge, ("fixed", "scalar", "head", "flux", None))
    _known("coupling", coupling, ("head", "batch", None))
    if coupling is None and mode == "loop":
        coupling = "batch" if chunking == "original" else "head"
    form = Form(
        mode,
        chunking,
        _CHUNK_SIZE[mode] if chunk_size is None else chunk_size,
        convolution or _CONVOLUTION[mode],
        transform or _TRANSFORM[mode],
        decay or _DECAYS[mode][0],
        mode in ("flat", "loop") if resonance is None else resonance,
        coupling,
        merge or _MERGE[mode],
        _ALPHA if alpha is None else alpha,
        tuple(levels or ()),
    )
    _check(form)
    if alpha is not None and form.merge == "flux":
        raise ValueError(
            f"TitansDualCore: alpha={alpha} would do nothing: merge='flux' takes it from the token flux; leave it out, or pass merge='fixed'"
        )
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
    if form.mode == "loop" and not form.resonance:
        raise ValueError("TitansDualCore: mode='loop' couples its two states by the resonance; leave resonance out, or pass mode='dual'")
    if form.coupling is not None and form.mode != "loop":
        raise ValueError(f"TitansDualCore: coupling={form.coupling!r} belongs to mode='loop'; mode={form.mode!r} couples nothing")
    if form.levels and form.chunking == "original":
        raise ValueError(
            "TitansDualCore: levels with chunking='original', which is there to reproduce a model that has none; pass chunking='regular'"
        )
    if sum(level.weight for level in form.levels) >= 1:
        raise ValueError("TitansDualCore: the levels' weights must leave something to the two cores: their sum must be below 1")
    learned = form.merge in ("scalar", "head")
    if not 0.0 <= form.alpha <= 1.0 or (learned and form.alpha in (0.0, 1.0)):
        raise ValueError(
            f"TitansDualCore: alpha, the share of S_fast, must lie between 0 and 1{', both excluded' if learned else ''}, got {form.alpha}"
        )

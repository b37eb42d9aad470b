"""What gated_delta_rule's walk hands to its backward: the factors of every block, the state at its start and its updates, so that nothing is computed again.

At heads of 128 in 16 bits it is 65 KB for a block of 64 tokens and a head, half of it states; `--objective memory` and `--max-memory` know it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.signature import Signature

from .delta_cut import room, segments_of
from .delta_prepare import Factors, Rule, factors_of, rule_of

__all__ = ["Kept", "keeping", "kept_of", "residual"]

_NARROWEST = 65
"""Head_dims from which a walk is what a forward runs."""


class Kept(NamedTuple):
    """The tensors of the residual: those of `Factors`, then `states` `[places, V, wide keys]` and `updates` `[B, T, H, V]`."""

    inverses: Tensor
    scores: Tensor
    lines: Tensor
    states: Tensor
    updates: Tensor

    @property
    def factors(self) -> Factors:
        """Of every block."""
        return Factors(self.inverses, self.scores, self.lines)


def kept_of(x: Rule) -> Kept:
    """Room for what a call hands on."""
    made = factors_of(x)
    states = torch.empty((x.places, x.values, x.wide_keys), dtype=x.v.dtype, device=x.v.device)
    return Kept(made.inverses, made.scores, made.lines, states, torch.empty(x.v.shape, dtype=x.v.dtype, device=x.v.device))


def residual(call: GatedDeltaRule, candidate: Candidate) -> tuple[Tensor, ...]:
    """Tensors of the sizes that a backward is handed; of a sequence in segments their maps, too."""
    x, processors = rule_of(call, int(candidate.param("side"))), int(dict(candidate.params).get("cut_for", 0))
    return (*kept_of(x), *((room(x, segments_of(x, processors)),) if processors else ()))


def keeping(candidates: list[Candidate], signature: Signature, most: int) -> list[Candidate]:
    """The first `most` of these as one direction of pairs that hand on; none where nothing may be, and for narrow heads."""
    wide = max(signature.dim("K"), signature.dim("V")) >= _NARROWEST
    if signature.op != "gated_delta_rule" or signature.regime != "training" or not signature.may_save or not wide:
        return []
    return [replace(one, variant="kept", saves_states=True, residual=_name(one)) for one in candidates[:most]]


def _name(one: Candidate) -> str:
    """Of what a candidate hands on."""
    processors = dict(one.params).get("cut_for")
    return f"cupy/blocks of {one.param('side')}" + (f", cut for {processors}" if processors else "")

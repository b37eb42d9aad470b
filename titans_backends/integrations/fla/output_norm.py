"""The norm between the memory and the output projection of FLA's layers: gated by `gated_rms_norm`, plain by torch."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from titans_backends.integrations.bypassed import is_plain
from titans_backends.integrations.origin import forward_owner, strangers
from titans_backends.op import get_op
from titans_backends.verdict import ACCEPTED, Verdict, refused

__all__ = ["Norm", "gated", "norm_verdict", "plain"]

_ACTIVATIONS = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"}


class Norm(Protocol):
    """FLA's `RMSNorm` and `FusedRMSNormGated`: `weight` `[V]`, `eps`; the gated one has an `activation`."""

    weight: Tensor
    eps: float
    activation: str


def norm_verdict(norm: nn.Module | None, is_gated: bool) -> Verdict:
    """Whether a layer's norm is one that is computed here."""
    expected = "FusedRMSNormGated" if is_gated else "RMSNorm"
    if norm is None or not hasattr(norm, "eps") or not isinstance(getattr(norm, "weight", None), Tensor):
        return refused(f"o_norm is a {type(norm).__name__} without eps and weight; it must be FLA's {expected}")
    if forward_owner(type(norm)).__name__ != expected or strangers(type(norm), "fla"):
        return refused(
            f"o_norm is a {type(norm).__module__}.{type(norm).__qualname__}; it must be FLA's {expected}, with the forward that FLA gave it"
        )
    verdict = ACCEPTED
    if getattr(norm, "bias", None) is not None:
        verdict &= refused("o_norm has a bias; gated_rms_norm has none")
    if is_gated and getattr(norm, "activation", None) not in _ACTIVATIONS:
        verdict &= refused(f"o_norm has activation {getattr(norm, 'activation', None)!r}; it must be one of {', '.join(map(repr, _ACTIVATIONS))}")
    return verdict


def gated(o: Tensor, gate: Tensor, norm: nn.Module, known: type, backend: str | None) -> Tensor:
    """o, gate `[B, T, H, V]`: o over its root mean square, weighted, times the activation of the gate. A norm that is no longer `known`'s is called."""
    if not is_plain(norm, known):
        return cast(Tensor, norm(o, gate))
    return _gated(o, gate, cast(Norm, norm), backend)


def plain(o: Tensor, norm: nn.Module, known: type) -> Tensor:
    """o `[B, T, H, V]` over its root mean square, weighted; computed in float32 at least. A norm that is no longer `known`'s is called."""
    return _plain(o, cast(Norm, norm)) if is_plain(norm, known) else cast(Tensor, norm(o))


def _gated(o: Tensor, gate: Tensor, norm: Norm, backend: str | None) -> Tensor:
    weight = norm.weight if norm.weight.dtype in (o.dtype, torch.float32) else norm.weight.to(o.dtype)
    (y,) = get_op("gated_rms_norm")(o, gate.to(o.dtype), weight, eps=norm.eps, activation=_ACTIVATIONS[norm.activation], backend=backend)
    assert y is not None
    return y


def _plain(o: Tensor, norm: Norm) -> Tensor:
    dtype = torch.float64 if o.dtype == torch.float64 else torch.float32
    return torch.nn.functional.rms_norm(o.to(dtype), o.shape[-1:], norm.weight.to(dtype), norm.eps).to(o.dtype)

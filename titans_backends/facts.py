"""The signature of a call: the edge where tensors and torch's global settings become facts."""

from __future__ import annotations

import torch

from titans_backends.contracts.contract import Call, Contract
from titans_backends.precision import float32_precision
from titans_backends.signature import Launch, Regime, Signature, TensorFacts

__all__ = ["signature_of", "with_sizes"]


def tensor_facts(tensor: torch.Tensor) -> TensorFacts:
    """One tensor's facts."""
    return TensorFacts(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.data_ptr() % 16 == 0)


def signature_of(
    contract: Contract,
    call: Call,
    dims: dict[str, int],
    *,
    regime: Regime = "inference",
    launch: Launch = "eager",
    batch_invariant: bool = False,
    may_save: bool = True,
    needs: frozenset[str] | None = None,
) -> Signature:
    """A validated call's signature; `dims` is what `validate` bound. `needs` None: in training, every tensor that takes a gradient."""
    tensors = contract.tensors(call)
    first = tensors[contract.operands[0]]
    if needs is None:
        needs = frozenset(name for name in contract.differentiable if name in tensors) if regime == "training" else frozenset()
    return Signature(
        op=contract.name,
        device=str(first.device),
        dtype=first.dtype,
        dims=tuple(sorted(with_sizes(dims).items())),
        options=tuple((o.name, getattr(call, o.name)) for o in contract.options),
        tensors=tuple((name, tensor_facts(tensor)) for name, tensor in tensors.items()),
        regime=regime,
        needs=needs,
        launch=launch,
        float32=float32_precision(first.device.type == "cuda"),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        batch_invariant=batch_invariant,
        may_save=may_save,
    )


def with_sizes(dims: dict[str, int]) -> dict[str, int]:
    """The bound letters; G defaults to H where an op has no q and k heads of its own, K to V where it has no keys."""
    defaults = {letter: dims[like] for letter, like in (("G", "H"), ("K", "V")) if like in dims}
    return {**defaults, **dims}

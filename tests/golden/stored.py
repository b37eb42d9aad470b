"""One golden file of the project's own: a call, its outputs, one gradient per output and the gradients that follow, as safetensors.

Inputs and the outputs' gradients are float32 values, results float64. The file holds its inputs, so nothing depends on a random generator.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from titans_backends.contracts import contract
from titans_backends.contracts.contract import Call, Contract, OptionValue

__all__ = ["Golden", "compute", "load", "save"]

_ROLES = ("input", "output", "cotangent", "gradient")


@dataclass(frozen=True, slots=True)
class Golden:
    """What a file holds. `options` are the arguments that are no tensors; an output that was not asked for is absent."""

    op: str
    options: Mapping[str, OptionValue]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    cotangents: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    @property
    def contract(self) -> Contract:
        """The op's contract."""
        return contract(self.op)

    def call(self, dtype: torch.dtype) -> Call:
        """The call in one dtype, on tensors of its own."""
        given = {name: t.to(dtype, copy=True) if t.is_floating_point() else t.clone() for name, t in self.inputs.items()}
        return self.contract.make_call(**given, **self.options)


def compute(made: Contract, call: Call, cotangents: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of a float64 call by the contract's reference and autograd through it."""
    leaves = {name: t.detach().requires_grad_() for name, t in made.tensors(call).items() if name in made.differentiable}
    outputs = made.reference(made.with_tensors(call, leaves))
    named = {spec.name: o for spec, o in zip(made.outputs, outputs, strict=True) if o is not None}
    found = torch.autograd.grad(list(named.values()), list(leaves.values()), [cotangents[name].double() for name in named], allow_unused=True)
    gradients = {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), found, strict=True)}
    return {name: o.detach() for name, o in named.items()}, gradients


def save(golden: Golden, path: Path) -> None:
    """Writes a file; the tensors' names are `input.q`, `output.o`, `cotangent.o`, `gradient.q`."""
    groups = zip(_ROLES, (golden.inputs, golden.outputs, golden.cotangents, golden.gradients), strict=True)
    tensors = {f"{role}.{name}": t.contiguous() for role, group in groups for name, t in group.items()}
    told = {**golden.metadata, "op": golden.op, "options": json.dumps(dict(golden.options), sort_keys=True)}
    save_file(tensors, path, metadata=told)


def load(path: Path) -> Golden:
    """Reads a file."""
    groups: dict[str, dict[str, Tensor]] = {role: {} for role in _ROLES}
    with safe_open(path, "pt") as opened:
        told = dict(opened.metadata())
        for key in opened.keys():  # noqa: SIM118  (no mapping)
            role, _, name = key.partition(".")
            groups[role][name] = opened.get_tensor(key)
    op, options = told.pop("op"), json.loads(told.pop("options"))
    inputs, outputs, cotangents, gradients = (groups[role] for role in _ROLES)
    return Golden(op, options, inputs, outputs, cotangents, gradients, told)

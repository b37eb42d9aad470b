"""Which version of the LAM layer a class computes, told by its outputs: its own forward and ours, on the same random weights and tokens, in float64 on the CPU.

The module itself is not run and not changed: a bare copy of it stands in, with other parameters, without its hooks. Once for each class and its options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from titans_backends.integrations.classes import swapped_class
from titans_backends.integrations.known import Conversion
from titans_backends.nn.dual_core import TitansDualCore
from titans_backends.verdict import Verdict, refused

__all__ = ["Sizes", "Told", "told_by_outputs", "unusual"]

_CALLS = ((200, True), (256, False))
"""Tokens, and whether a cache is asked for: a length that the original pads, and two of the current version's chunks, four of the earlier one's."""
_ALIKE = 1e-6
"""Largest difference over largest value: two float64 computations of one function stay below 1e-9, the versions differ by a tenth and more."""
_USUAL: dict[str, object] = {
    "qk_activation": "silu", "qk_norm": "l2", "allow_neg_eigval": False, "conv_size": 4, "use_beta": True, "use_gate": True, "use_short_conv": True,
    "use_hierarchical_decay": True, "use_output_gate": True, "use_delta_rule": True,
}  # fmt: skip
"""The original's options, as its models are built."""
_NOT_OPTIONS = frozenset(("training", "layer_idx", "forward"))


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a LAM layer: the width, the heads, the widths of all keys and all values, and the norm's eps."""

    d_model: int
    heads: int
    keys: int
    values: int
    eps: float

    def layer(self, kind: type[TitansDualCore], **more: object) -> TitansDualCore:
        """A layer of ours with these sizes; its parameters have the original's names."""
        expand_k, expand_v = ((width + 0.5) / self.d_model for width in (self.keys, self.values))
        return kind(self.d_model, self.heads, expand_k=expand_k, expand_v=expand_v, mode="flat", norm_eps=self.eps, **more)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Told:
    """`mode`: the version; `how` it was told; `trains_alike`: whether its training forward is that version's too, or else whether it is `random_in_training`."""

    mode: Literal["flat", "loop"]
    how: str
    trains_alike: bool
    random_in_training: bool


_TOLD: WeakKeyDictionary[type, dict[object, Told | Verdict]] = WeakKeyDictionary()


def told_by_outputs(module: nn.Module, sizes: Sizes, convert: Callable[[Literal["flat", "loop"], str], Conversion]) -> Told | Verdict:
    """The version of a module's class, or why it is neither. `convert(mode, backend)`: what it would become."""
    known = _TOLD.setdefault(type(module), {})
    key = (sizes, tuple(_options(module)), type(module).forward)
    found = known.get(key)
    if found is None:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
            torch.manual_seed(0)
            found = known[key] = _compared(module, sizes, convert)
    return found


def unusual(module: nn.Module) -> list[str]:
    """The options that the module was built with and the original's models are not, `name=value`."""
    return [f"{name}={getattr(module, name)!r}" for name, usual in _USUAL.items() if getattr(module, name, usual) != usual]


def _options(module: nn.Module) -> Iterator[tuple[str, str, object]]:
    """The plain values that the module and its parts hold, and the parts' classes: what a class's forward may depend on beside its parameters."""
    for path, part in module.named_modules():
        yield path, "", type(part)
        for name, value in sorted(part.__dict__.items()):
            if not name.startswith("_") and name not in _NOT_OPTIONS and isinstance(value, (bool, int, float, str, type(None))):
                yield path, name, value


# --- comparing


@dataclass(frozen=True, slots=True)
class _Outputs:
    """What one call gave: y, and where a cache was asked for the states; the loss, None where there is none."""

    tensors: tuple[Tensor | None, ...]

    def difference(self, other: _Outputs) -> float:
        """The largest difference over the largest value; infinite where one has a tensor that the other has not, or of another shape."""
        worst = 0.0
        for got, want in zip(self.tensors, other.tensors, strict=True):
            if got is None and want is None:
                continue
            if got is None or want is None or got.shape != want.shape or not got.isfinite().all():
                return float("inf")
            scale = float(want.abs().max())
            gap = float((got - want).abs().max())
            worst = max(worst, gap / scale if scale else gap)
        return worst


def _compared(module: nn.Module, sizes: Sizes, convert: Callable[[Literal["flat", "loop"], str], Conversion]) -> Told | Verdict:
    weights = _weights(sizes)
    calls = [(torch.randn(2, length, sizes.d_model, dtype=torch.float64), cached) for length, cached in _CALLS]
    theirs = _bare(module, weights, "")
    try:
        want = [_called(theirs, *call) for call in calls]
        trained = _called(theirs.train(), *calls[0])
        random_in_training = trained.difference(want[0]) > _ALIKE and _called(theirs, *calls[0]).difference(trained) > _ALIKE
    except Exception as error:  # whatever a stranger's forward may raise
        return refused(
            f"its forward raised {type(error).__name__} on random tokens in float64 on the CPU ({' '.join(str(error).split())[:200]}), so that what it computes "
            "cannot be compared; say which version it is: register_layer(titans_backends.integrations.lam.lam_layer(mode='flat')), or 'loop'"
        )
    differences: dict[str, float] = {}
    for mode in ("flat", "loop"):
        ours = _swapped(_bare(module, weights, ""), convert(mode, "eager"))
        worst = 0.0
        for call, wanted in zip(calls, want, strict=True):
            worst = worst if worst > _ALIKE else max(worst, _called(ours, *call).difference(wanted))
        differences[mode] = worst
        if worst <= _ALIKE:
            alike = not random_in_training and _called(ours.train(), *calls[0]).difference(trained) <= _ALIKE
            how = f"mode={mode!r}, told by its outputs on random tokens: ours differ by {worst:.0e} in float64"
            return Told(mode, how, alike, random_in_training)
    odd = ", ".join(unusual(module))
    return refused(
        f"its class computes neither of the original's versions: on random tokens it differs from 'flat' by {differences['flat']:.0e} and from 'loop' by "
        f"{differences['loop']:.0e} (largest difference over largest value){f'; it is built with {odd}' if odd else ''}"
    )


def _called(module: nn.Module, x: Tensor, cached: bool) -> _Outputs:
    """One call of the class's forward, in the way that all its versions share; TypeError where it does not return what they return."""
    found = type(module).forward(module, x, use_cache=cached)
    if not isinstance(found, tuple) or len(found) != 4:
        raise TypeError(f"it returns {type(found).__name__}, not (y, None, past_key_values, loss)")
    y, _, past, loss = found
    fast, slow = cast(tuple[Tensor, Tensor], past[-1]["recurrent_state"]) if cached else (None, None)
    return _Outputs((y, loss, fast, slow))


def _weights(sizes: Sizes) -> dict[str, Tensor]:
    """Parameters under the original's names, far from the initial ones: a flux of 0.5 everywhere would hide a wrong one."""
    layer = sizes.layer(TitansDualCore, dtype=torch.float64)
    for parameter in layer.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2)
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


def _bare(module: nn.Module, weights: dict[str, Tensor], path: str) -> nn.Module:
    """The module's class and options with these parameters: no hooks, nothing of an instance's own, plain Linears where it has projections; not training."""
    bare: nn.Module = object.__new__(type(module))
    options = {name: value for name, value in module.__dict__.items() if name not in ("forward", "_old_forward", "_hf_hook")}
    bare.__dict__.update({**options, **nn.Module().__dict__})
    for name, _ in module.named_parameters(recurse=False):
        bare.register_parameter(name, nn.Parameter(weights[path + name], requires_grad=False))
    for name, part in module._modules.items():
        weight = None if path else weights.get(f"{name}.weight")
        is_projection = weight is not None and weight.dim() == 2 and hasattr(part, "in_features")
        bare._modules[name] = _linear(weights, name) if is_projection else None if part is None else _bare(part, weights, f"{path}{name}.")
    return bare.eval()


def _linear(weights: dict[str, Tensor], name: str) -> nn.Linear:
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype).requires_grad_(False)
    made.weight.copy_(weight)
    if bias is not None:
        made.bias.copy_(bias)
    return made


def _swapped(module: nn.Module, conversion: Conversion) -> nn.Module:
    """The bare copy, as the module would be."""
    new = swapped_class(conversion.forward, type(module))
    module.__dict__.update(conversion.attributes)
    module.__class__ = new
    return module

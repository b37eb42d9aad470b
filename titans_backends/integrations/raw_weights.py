"""Whether a layer's weights are numbers that a forward can multiply with: raw int8 or float8 ones need a scale, which only the quantizer that made them knows.

A quantizer's own modules and tensor classes are not asked: they are called as they are. What is left is a plain tensor of such a dtype where torch's own
forward, or one of ours, reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from titans_backends.integrations.bypassed import hung_on

__all__ = ["raw_weights"]

_PLAIN = (nn.Parameter, Tensor)
_NAMED = 4


def raw_weights(module: nn.Module, read: Collection[str] = ()) -> tuple[str, ...]:
    """Why a layer's weights cannot be computed with, a reason for each dtype; none where all can be, or are in the hands of a quantizer's modules.

    `read`: the submodules whose parameters the new forward reads without calling them, whatever their class is.
    """
    found: dict[torch.dtype, list[str]] = {}
    for path, part in module.named_modules():
        if part is module or any(path == name or path.startswith(f"{name}.") for name in read) or _computes_plainly(part):
            for name, weight in _weights(part):
                if type(weight) in _PLAIN and _is_raw(weight.dtype):
                    found.setdefault(weight.dtype, []).append(f"{path}.{name}" if path else name)
    return tuple(
        f"{_listed(names)} {'is' if len(names) == 1 else 'are'} raw {dtype}, and nothing here knows the scale; load the model in a floating dtype, or by "
        "a quantizer that leaves these parts out or puts modules of its own in the projections' place, which are called"
        for dtype, names in found.items()
    )


def _is_raw(dtype: torch.dtype) -> bool:
    """Whole numbers, and floating ones of a byte, which torch's products refuse beside another dtype."""
    return dtype.itemsize < 2 or not (dtype.is_floating_point or dtype.is_complex)


def _computes_plainly(part: nn.Module) -> bool:
    """Whether its call is torch's own forward and nothing else: what hangs on it might scale."""
    forward = getattr(type(part), "forward", None)  # a script's class has none to give
    return str(getattr(forward, "__module__", "")).startswith("torch.nn.modules.") and not hung_on(part)


def _weights(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Its parameters, and what stands for one as a buffer, since whole numbers have no gradient."""
    for name, held in [*part._parameters.items(), *((name, part._buffers.get(name)) for name in ("weight", "bias"))]:
        if held is not None:
            yield name, held


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")

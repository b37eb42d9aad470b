"""Whether parts of a module may be computed without calling them: a fused op reads their parameters, and what hangs on their call would not happen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["bypassed", "hung_on", "is_plain"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def bypassed(module: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Why these submodules (`"q_conv1d"`, `"norm.inner"`), or anything in them, must be called; empty where nothing would be lost."""
    found = []
    for name in names:
        for inner, part in module.get_submodule(name).named_modules():
            found += [f"{name}{f'.{inner}' if inner else ''} {why}, and the new forward computes it without calling it" for why in hung_on(part)]
    return tuple(found)


def is_plain(module: nn.Module, known: type) -> bool:
    """Whether a call of this module is the forward of the class `known` and nothing else, so that an op may stand in for it.

    What was put in the module's place since the swap (an adapter's wrapper, say) has another.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooked and "forward" not in module.__dict__ and type(module).forward is known.forward  # type: ignore[attr-defined]  # a module's class has one


def hung_on(part: nn.Module) -> list[str]:
    """What a call of this module does beside its class's forward, but for placing it on a device."""
    reasons = [f"has {len(held)} of {name}" for name in _HOOKS if (held := part.__dict__.get(name))]
    if parametrize.is_parametrized(part):
        reasons.append("has parametrizations")
    hook = part.__dict__.get("_hf_hook")
    if hook is None and "forward" in part.__dict__ and getattr(part.__dict__["forward"], "__func__", None) is not type(part).forward:
        reasons.append("has a forward of its own on its instance")
    if hook is not None and not all(_only_places(one) for one in getattr(hook, "hooks", (hook,))):
        reasons.append(
            f"has a hook of accelerate's that does more than to place it ({type(hook).__name__}; offloaded weights come when it is called)"
        )
    return reasons


def _only_places(hook: object) -> bool:
    """Whether a hook of accelerate's has done its work at dispatch: the weights are on their device, and inputs that come from the layer are too."""
    return type(hook).__name__ == "AlignDevicesHook" and not cast(bool, getattr(hook, "offload", True))

"""A forward that an instance holds for itself: which of them follow a new class, and why the others cannot.

accelerate-the-library's hooks put a wrapper in `module.forward` and the class's own, bound, in `module._old_forward`; when they are removed the bound one
stays behind as `module.forward`. A bound one of the class follows the class; a wrapper of theirs stays and calls what stands behind it.
"""

from __future__ import annotations

import types

from torch import nn

__all__ = ["rebind", "why_not"]

_HELD = ("forward", "_old_forward")


def why_not(module: nn.Module) -> tuple[str, ...]:
    """The reasons why another class's forward would not be what a call of this module runs; none where it would."""
    held = module.__dict__
    found = []
    for name in _HELD:
        if name in held and not _is_bound(module, held[name], type(module)) and not (name == "forward" and _is_accelerates(module)):
            found.append(
                f"its instance holds a `{name}` of its own, {_told(held[name])}, which would go on being called; "
                f"remove it (`del module.{name}`), accelerate, and put it around the new forward"
            )
    return tuple(found)


def rebind(module: nn.Module, before: type, after: type) -> None:
    """What the instance holds of the class before becomes what the class after has."""
    for name in _HELD:
        if name in module.__dict__ and _is_bound(module, module.__dict__[name], before):
            module.__dict__[name] = types.MethodType(after.forward, module)  # type: ignore[attr-defined]  # both are modules' classes


def _is_bound(module: nn.Module, forward: object, kind: type) -> bool:
    return isinstance(forward, types.MethodType) and forward.__self__ is module and forward.__func__ is getattr(kind, "forward", None)


def _is_accelerates(module: nn.Module) -> bool:
    """Whether `forward` is the wrapper of a hook of accelerate's, which calls `_old_forward`."""
    forward = module.__dict__["forward"]
    wrapper = getattr(forward, "func", None) or getattr(forward, "__func__", forward)
    return "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ and getattr(wrapper, "__module__", "") == "accelerate.hooks"


def _told(forward: object) -> str:
    return f"{getattr(forward, '__module__', None) or type(forward).__module__}.{getattr(forward, '__qualname__', type(forward).__qualname__)}"

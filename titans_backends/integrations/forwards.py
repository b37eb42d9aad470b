"""A forward that an instance holds for itself: which of them follow a new class, and why the others cannot.

accelerate-the-library's hooks put a wrapper in `module.forward` and the class's own, bound, in `module._old_forward`; when they are removed the bound one
stays behind as `module.forward`. A bound one of the class follows the class; a wrapper of theirs stays and calls what stands behind it.
"""

from __future__ import annotations

import functools
import types

from torch import nn

from titans_backends.integrations.origin import names_used

__all__ = ["displaced", "rebind", "why_not"]

_HELD = ("forward", "_old_forward")
_TORCHS_CALL = frozenset(("__call__", "_call_impl", "_wrapped_call_impl"))


def why_not(module: nn.Module) -> tuple[str, ...]:
    """The reasons why another class's forward would not be what a call of this module runs; none where it would."""
    held = module.__dict__
    found = []
    call = type(module).__call__
    if call is not nn.Module.__call__ and not names_used(call) & _TORCHS_CALL:
        found.append(
            f"its class has a `__call__` of its own, {_told(call)}, which does not go through torch.nn.Module's, so that it may never run a new forward; "
            "let it end in super().__call__(...), or move it into forward"
        )
    for name in _HELD:
        if name in held and not _is_bound(module, held[name], type(module)) and not (name == "forward" and _is_accelerates(module)):
            found.append(
                f"its instance holds a `{name}` of its own, {_told(held[name])}, which would go on being called; "
                f"remove it (`del module.{name}`), accelerate, and put it around the new forward"
            )
    return tuple(found)


def displaced(module: nn.Module, new: type) -> str:
    """Why a call of a module that was given the class `new` runs another forward by now; empty where it runs that of `new`, itself or in a wrapper that tells.

    A wrapper tells what it wraps by `functools.wraps`, as a partial, or by `torch.compile`.
    """
    kind, ours = type(module), new.forward  # type: ignore[attr-defined]  # a module's class
    if not issubclass(kind, new) or kind.forward is not ours:
        return f"its class is {kind.__module__}.{kind.__qualname__}, whose forward is called in place of ours; undo what gave it that"
    name = "_old_forward" if "forward" in module.__dict__ and _is_accelerates(module) else "forward"
    held = module.__dict__.get(name)
    if held is None or _reaches(held, ours):
        return ""
    return (
        f"its instance got a `{name}` of its own, {_told(held)} (as transformers' kernelize() gives), which is called in place of ours; "
        f"`del module.{name}` takes it off"
    )


def rebind(module: nn.Module, before: type, after: type) -> None:
    """What the instance holds of the class before becomes what the class after has."""
    for name in _HELD:
        if name in module.__dict__ and _is_bound(module, module.__dict__[name], before):
            module.__dict__[name] = types.MethodType(after.forward, module)  # type: ignore[attr-defined]  # both are modules' classes


def _is_bound(module: nn.Module, forward: object, kind: type) -> bool:
    return isinstance(forward, types.MethodType) and forward.__self__ is module and forward.__func__ is getattr(kind, "forward", None)


def _reaches(forward: object, ours: object) -> bool:
    """Whether a forward is ours, or wraps it."""
    while forward is not None:
        forward = getattr(forward, "__func__", forward)
        if forward is ours:
            return True
        inner = forward.func if isinstance(forward, functools.partial) else getattr(forward, "__wrapped__", None)
        forward = getattr(forward, "_torchdynamo_orig_callable", None) if inner is None else inner
    return False


def _is_accelerates(module: nn.Module) -> bool:
    """Whether `forward` is the wrapper of a hook of accelerate's, which calls `_old_forward`."""
    forward = module.__dict__["forward"]
    wrapper = getattr(forward, "func", None) or getattr(forward, "__func__", forward)
    return "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ and getattr(wrapper, "__module__", "") == "accelerate.hooks"


def _told(forward: object) -> str:
    return f"{getattr(forward, '__module__', None) or type(forward).__module__}.{getattr(forward, '__qualname__', type(forward).__qualname__)}"

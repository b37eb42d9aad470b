"""Triton's interpreter without what it does again at every statement, and for nothing here: half of a test's time.

It replaces the functions of `triton.language` by its own whenever one jitted function calls another, a millisecond each, where they are replaced already; it
makes a table of all dtypes to look one up; and it does every sum and product of whole numbers a second time in 64 bits, to find what leaves 32, which nothing
does in calls of a few hundred tokens. Changes nothing that a kernel computes; leaves a Triton alone that has not these parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

__all__ = ["hasten"]

_LANGUAGES = (tl, tl.core)


@cache
def hasten() -> None:
    """For the rest of this process."""
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _from_memory(interpreter._get_np_dtype)
    builder = getattr(interpreter, "interpreter_builder", None)
    if hasattr(getattr(builder, "options", None), "sanitize_overflow"):
        builder.options = replace(builder.options, sanitize_overflow=False)


def _once_a_launch(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The outermost call, a launch, replaces and at its end puts back; a call below it replaces only in what the launch did not reach."""
    replaced = set[int]()
    seen_by: dict[str, frozenset[int]] = {}

    def replaced_once(function: Any) -> Any:
        module = function.__module__
        if module not in seen_by:
            seen_by[module] = frozenset(id(value) for value in function.__globals__.values() if any(value is language for language in _LANGUAGES))
        seen = seen_by[module]
        if replaced and seen <= replaced:
            return interpreter._LangPatchScope()
        outermost, scope = not replaced, patch(function)
        replaced.update(seen)
        if outermost:
            put_back = scope.restore

            def ended() -> None:
                put_back()
                replaced.clear()

            scope.restore = ended
        return scope

    return replaced_once


def _from_memory(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """NumPy's dtype of a dtype, and of a block of it."""
    remembered = cache(find)

    def found(kind: Any) -> Any:
        one = kind.element_ty if isinstance(kind, tl.block_type) else kind
        return find(one) if isinstance(one, tl.pointer_type) else remembered(one)

    return found
